"""Starting the server: what must be refused before and while Ray starts, and the config file."""

from __future__ import annotations

import socket
from functools import partial
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import yaml
from harness import HashGenerator, Running, no_weights, settings
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema
from served import free_port

from pipeline.config import ServeConfig
from pipeline.errors import BundleError, RecipeError, ResourceError
from serve.app import assemble, gpus_per_replica
from serve.launch import check_capacity, deploy, launch, start_server
from serve.listener import Address
from serve.settings import ApiKey, ServiceConfig, check_exposure
from serve.versions import ModelVersion

CONFIG_FILE = Path(__file__).parents[2] / "infra" / "serve.yaml"


def test_an_occupied_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        port = occupant.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"port {port}: .*--port"):
            start_server("asset:base", ServiceConfig(), home=str(tmp_path), port=port)


def test_an_impossible_port_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="port 70000"):
        start_server("asset:base", ServiceConfig(), home=str(tmp_path), port=70_000)


def test_replicas_that_fit_nowhere_are_refused() -> None:
    check_capacity(ServeConfig(min_replicas=2, max_replicas=2, num_cpus=4), {"CPU": 8.0})
    with pytest.raises(ResourceError, match=r"1 replicas with serve.num_gpus=1 need 1 .* has 0"):
        check_capacity(ServeConfig(num_gpus=1), {"CPU": 8.0})
    with pytest.raises(ResourceError, match=r"3 replicas with serve.num_cpus=4 need 12 .* has 8"):
        check_capacity(ServeConfig(min_replicas=3, max_replicas=3, num_cpus=4), {"CPU": 8.0})
    with pytest.raises(ValidationError, match=r"max_replicas=2 is less than serve.min_replicas=5"):
        ServeConfig(min_replicas=5)


def test_a_replica_takes_a_gpu_where_there_is_one() -> None:
    with_gpus, without = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}
    assert gpus_per_replica(ServeConfig(), with_gpus) == 1
    assert gpus_per_replica(ServeConfig(), without) == 0
    assert gpus_per_replica(ServeConfig(num_gpus=0.5), without) == 0.5
    assert gpus_per_replica(ServeConfig(num_gpus=0), with_gpus) == 0
    with pytest.raises(ResourceError, match=r"2 replicas with serve.num_gpus=1 need 2 .* has 1"):
        check_capacity(ServeConfig(min_replicas=2, max_replicas=2), with_gpus)


def test_a_missing_model_is_named_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no-such-bundle"):
        start_server("no-such-bundle", ServiceConfig(), home=str(tmp_path), port=0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_other_machines_need_keys(host: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tessera key NAME.*--config"):
        start_server("asset:base", ServiceConfig(), home=str(tmp_path), host=host, port=0)
    for mine in ("127.0.0.1", "::1", "localhost"):
        check_exposure(mine, ServiceConfig())
    check_exposure(host, ServiceConfig(keys=(ApiKey(name="me", sha256="0" * 64),)))
    check_exposure(host, ServiceConfig(allow_anonymous=True))


def test_behind_haproxy_there_is_no_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    check_exposure("127.0.0.1", ServiceConfig())
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(RecipeError, match=r"host 0\.0\.0\.0 lets other machines draw"):
        check_exposure("127.0.0.1", ServiceConfig())


def test_a_second_server_on_one_cluster_is_refused(server: Running, tmp_path: Path) -> None:
    version = ModelVersion("tiny", "4", partial(HashGenerator, tmp_path / "log"))
    build = partial(assemble, version, settings())
    with pytest.raises(ResourceError, match="already runs"):
        launch(build, host="127.0.0.1", port=1, ready_timeout_s=1)
    with server.http() as http:
        assert http.get("/readyz").status_code == 200


def test_a_model_that_does_not_load_is_one_clear_line(server: Running) -> None:
    address = Address("127.0.0.1", free_port())
    app = assemble(ModelVersion("broken", "1", no_weights), settings(), listen=address)
    with pytest.raises(ResourceError, match=r"BundleError: no weights in the bundle$"):
        deploy(app, name="broken", route_prefix="/broken")
    status = serve.status().applications["broken"].deployments["generator"]
    assert "no weights in the bundle" in status.message
    with httpx.Client(base_url=address.url, timeout=60) as http:
        assert http.get("/healthz").status_code == 200
        answer = http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].endswith("BundleError; the replicas' log says why")
    serve.delete("broken")


def test_the_config_file_is_valid(tiny_bundle: Path, tmp_path: Path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG_FILE.read_text()))
    (app,) = config.applications
    module, _, builder = app.import_path.partition(":")
    build = getattr(import_module(module), builder)
    here = {"model": str(tiny_bundle), "home": str(tmp_path)}
    assert isinstance(build(app.args | here), serve.Application)
    with pytest.raises(RecipeError, match="API key"):
        build(app.args | here | {"service": {}})
    replicas = {"service": app.args["service"] | {"serve": {"max_replicas": 3}}}
    with pytest.raises(ValidationError, match=r"service\.serve.* are the same section"):
        build(app.args | here | replicas)
    with pytest.raises(ValidationError, match="modell"):
        build(app.args | here | {"modell": "asset:base"})
