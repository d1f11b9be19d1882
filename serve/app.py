"""The Ray Serve application: two deployments around one model.

    tessera serve                         # one machine
    serve deploy infra/serve.yaml         # a cluster, through `app_builder`

`api` answers HTTP (api.py; cheap, many requests in flight, no PyTorch), `generator` draws
(replica.py; autoscaled, batching). serve/README.md lists endpoints, fields and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from pydantic import Field
from ray import serve
from ray.serve import Application

from pipeline.bundle import load_generator
from pipeline.config import Config, ServeConfig
from pipeline.model_registry import resolve_model
from serve.api import GENERATOR, api_with
from serve.front import Address
from serve.replica import Find, Found, Generator
from serve.settings import ServiceConfig, check_exposure

_IN_FLIGHT = 256
"""Requests one ingress holds: more than generators take, so that it says no in its own words."""
_LOOK_EVERY_S = 2
"""How often Serve looks whether the ingress is alive; nobody answers until it has."""


def assemble(
    found: Found,
    config: ServeConfig,
    service: ServiceConfig | None = None,
    *,
    find: Find | None = None,
    listen: Address | None = None,
) -> Application:
    """The Serve application around any ImageGenerator.

    Args:
        found: the model to begin with; replicas that start later begin with what `find` finds.
        config: replicas and batches.
        service: access, limits, safety and caches.
        find: looks for a newer model; None where there is nothing to look for.
        listen: where the ingress replica listens itself, besides being behind Serve's proxies.
    """
    service = service or ServiceConfig()
    gpus = gpus_of_replica(config, cluster_resources())
    logging_config = {
        "encoding": "JSON" if service.log_format == "json" else "TEXT",
        "enable_access_log": False,
    }
    generator = serve.deployment(
        name=GENERATOR,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": gpus},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        },
        # one batch in the model, the next one waiting for it
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_constructor_retry_count=2,
        logging_config=logging_config,
    )(Generator)
    api = serve.deployment(
        name="api",
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=_LOOK_EVERY_S,
        max_ongoing_requests=_IN_FLIGHT,
        logging_config=logging_config,
    )(serve.ingress(api_with(service, listen, at_once=_IN_FLIGHT))())
    return api.bind(generator.bind(found, find, config, service))


def build_app(
    model: str,
    config: ServeConfig,
    service: ServiceConfig | None = None,
    *,
    home: str,
    listen: Address | None = None,
) -> Application:
    """The Serve application around a trained model.

    An alias such as models:/tessera@champion is looked up here, and again by every replica every
    few seconds: when it moves, replicas change over.

    Args:
        model: a bundle directory, "asset:base", or "models:/NAME@ALIAS".
        config: replicas and batches.
        service: access, limits, safety and caches.
        home: the directory of the registry and of converted pretrained models.
        listen: as for `assemble`.

    Raises:
        BundleError: there is no such model.
    """
    device = "cuda" if gpus_of_replica(config, cluster_resources()) else "cpu"
    find = partial(_find, model, Path(home).absolute(), device)
    moves = model.startswith("models:/") and "@" in model
    return assemble(find(), config, service, find=find if moves else None, listen=listen)


def gpus_of_replica(config: ServeConfig, resources: Mapping[str, float]) -> float:
    """What the config says, or one where the cluster has any."""
    if config.num_gpus is None:
        return float(resources.get("GPU", 0) > 0)
    return config.num_gpus


def cluster_resources() -> Mapping[str, float]:
    """By name; none before Ray is started."""
    if not ray.is_initialized():
        return {}
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def _find(model: str, home: Path, device: str) -> Found:
    found = resolve_model(model, home=home)
    load = partial(
        load_generator,
        found.path.absolute(),
        pretrained_cache=home / "pretrained",
        device=device,
    )
    return Found(found.name, found.version, load)


class AppArgs(Config):
    """`args` of an application in a Serve config file."""

    model: str = Field(description="a bundle directory, asset:base, or models:/NAME@ALIAS")
    home: str = Field(".tessera", description="of the registry and of converted pretrained models")
    serve: ServeConfig = ServeConfig()
    service: ServiceConfig = ServiceConfig()


def app_builder(args: dict[str, Any]) -> Application:
    """What `import_path: serve.app:app_builder` names in a Serve config file.

    Raises:
        ValidationError: `args` are not AppArgs.
        BundleError: there is no such model.
        RecipeError: there are no keys; a cluster is never one's own machine alone.
    """
    checked = AppArgs.model_validate(args)
    check_exposure("a cluster", checked.service)
    return build_app(checked.model, checked.serve, checked.service, home=checked.home)
