"""`tessera serve`: starts the image API on this machine, waits until it is ready, takes it down.

    server = start_server("models:/tessera@champion", service, home=".tessera")
    ...                      # OpenAI(base_url=server.url + "/v1", api_key="none")
    server.close()

On a cluster use `serve deploy infra/serve.yaml` instead.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application

from pipeline.bundles.registry import resolve_model
from pipeline.config import ServeConfig
from pipeline.errors import ResourceError
from pipeline.runtime import start_ray
from serve.app import build_app, cluster_resources, gpus_per_replica
from serve.errors import last_error
from serve.listener import Address, ingress_may_listen
from serve.settings import ServiceConfig, check_exposure

logger = logging.getLogger(__name__)

APP_NAME = "tessera"
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Serve kills a proxy that takes 3 x 5 s to start, as it may on two cores that also train."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""This machine is asked itself, whatever proxy the environment names."""


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`, without a trailing slash."""

    url: str
    started_ray: bool

    def wait(self) -> None:
        """Block until Ctrl-C or SIGTERM."""
        stop = threading.Event()
        terminated = signal.signal(signal.SIGTERM, lambda *_: stop.set())
        try:
            while not stop.wait(0.5):
                pass
        except KeyboardInterrupt:
            logger.info("interrupted; shutting down")
        finally:
            signal.signal(signal.SIGTERM, terminated)

    def close(self) -> None:
        """Stop answering; take Ray down too if it was started for this server."""
        serve.shutdown()
        if self.started_ray:
            ray.shutdown()


def start_server(
    model: str,
    service: ServiceConfig,
    *,
    home: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready_timeout_s: float = 300.0,
) -> Server:
    """Serve `model` at http://host:port; return when it generates.

    Args:
        model: a bundle directory, "asset:base", or "models:/NAME@ALIAS".
        service: all settings.
        home: the directory of the registry and of converted pretrained models.
        host, port: where to listen; only this machine can reach the default host.
        ready_timeout_s: how long the first image may take.

    Raises:
        ResourceError: the port is taken, Serve runs already, or no replica became ready.
        BundleError: there is no such model.
        RecipeError: other machines could reach it and there are no keys.
    """
    check_exposure(host, service)
    check_port(host, port)
    resolve_model(model, home=Path(home))  # before Ray is started
    return launch(
        partial(build_app, model, service, home=home),
        host=host,
        port=port,
        ready_timeout_s=ready_timeout_s,
        config=service.serve,
    )


def launch(
    build: Callable[..., Application],
    *,
    host: str,
    port: int,
    ready_timeout_s: float,
    config: ServeConfig | None = None,
) -> Server:
    """`start_server` for any application.

    Args:
        build: called with `listen`, as app.py's functions are once all else is given.
        host, port, ready_timeout_s: as for `start_server`.
        config: replicas that must have room; None checks nothing.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its progress lines only puzzle
    address = Address(host, port)
    direct = ingress_may_listen()
    server = Server(url=address.url, started_ray=start_ray())
    if _serve_runs():
        raise ResourceError(
            "Ray Serve already runs on this cluster, with a port of its own; use "
            "`serve deploy infra/serve.yaml`, or stop it first with `serve shutdown`"
        )
    try:
        if config is not None:
            check_capacity(config, cluster_resources())
        app = build(listen=address if direct else None)
        _start(address, proxies=not direct)
        deploy(app)
        _wait_until_ready(server.url, ready_timeout_s)
    except BaseException:
        server.close()
        raise
    logger.info("%s generates images", server.url)
    return server


def check_capacity(config: ServeConfig, resources: Mapping[str, float]) -> None:
    """Raise ResourceError if the replicas to begin with can never be placed: Serve would wait."""
    replicas = max(1, config.min_replicas)
    gpus = gpus_per_replica(config, resources)
    for name, each, kind in (("cpus", config.num_cpus, "CPU"), ("gpus", gpus, "GPU")):
        have = resources.get(kind, 0)
        if replicas * each > have:
            raise ResourceError(
                f"{replicas} replicas with serve.num_{name}={each:g} need {replicas * each:g} of "
                f"Ray's {kind}s and the cluster has {have:g}: lower it, or add nodes"
            )


def check_port(host: str, port: int) -> None:
    """Raise ResourceError unless host:port can be listened on."""
    with socket.socket(Address(host, port).family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"cannot listen on {host}, port {port}: {error}. Stop what uses it, or choose "
                "another with --port"
            ) from error


def _serve_runs() -> bool:
    status = serve.status()
    return bool(status.proxies or status.applications)


def _start(address: Address, *, proxies: bool) -> None:
    """Serve's controller, and proxies that listen."""
    try:
        serve.start(
            proxy_location="EveryNode" if proxies else "Disabled",
            http_options={"host": address.host, "port": address.port},
            controller_options={"runtime_env": {"env_vars": _PATIENCE}},
        )
    except (RayError, TimeoutError) as error:
        raise ResourceError(
            f"Ray Serve did not start on {address.host}, port {address.port}: {error}. If the "
            "machine is very busy try again later, else see the logs that `tessera doctor` names"
        ) from error


def deploy(app: Application, *, name: str = APP_NAME, route_prefix: str = "/") -> None:
    """serve.run, and if that fails one line instead of a replica's traceback.

    Raises:
        ResourceError: no replica could load its model.
    """
    try:
        serve.run(app, name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        deployments = serve.status().applications[name].deployments.values()
        failed = "\n".join(d.message for d in deployments if d.status.value == "DEPLOY_FAILED")
        logger.debug("deployment failed: %s", failed)
        raise ResourceError(f"the model did not load: {last_error(failed)}") from error


def _wait_until_ready(url: str, timeout_s: float) -> None:
    """Poll /readyz until it answers 200."""
    deadline = time.monotonic() + timeout_s
    while True:
        reason = _not_ready(url)
        if reason is None:
            return
        if time.monotonic() > deadline:
            raise ResourceError(f"{url} drew nothing within {timeout_s:g} s: {reason}")
        time.sleep(0.2)


def _not_ready(url: str) -> str | None:
    """None if /readyz says 200, else why not."""
    try:
        with DIRECT.open(f"{url}/readyz", timeout=30):
            return None
    except urllib.error.HTTPError as error:
        body = error.read()
        with_reason = error.headers.get_content_type() == "application/json"
        return str(json.loads(body)["error"]["message"]) if with_reason else str(error)
    except OSError as error:
        return str(error)
