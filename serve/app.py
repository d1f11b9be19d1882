"""The Ray Serve application: two deployments around one model.

    tessera serve                         # one machine
    serve deploy infra/serve.yaml         # a cluster, through `app_builder`

`api` answers HTTP (api.py: cheap, many requests in flight, no PyTorch), `generator` generates
(replica.py: autoscaled, batching). serve/README.md lists endpoints, fields and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from pydantic import Field, model_validator
from ray import serve
from ray.serve import Application

from pipeline.bundles.bundle import load_generator
from pipeline.bundles.registry import resolve_model
from pipeline.config import Config, ServeConfig
from serve.api import GENERATOR, api_builder
from serve.listener import Address
from serve.replica import GeneratorReplica
from serve.settings import ServiceConfig, check_exposure
from serve.versions import FindVersion, ModelVersion

_INGRESS_CONCURRENCY = 256
"""Requests that one ingress holds: more than wait for generators, whose full queue answers 429."""
_HEALTH_CHECK_S = 2
"""Seconds between Serve's looks whether the ingress is alive; nobody answers until it notices."""


def assemble(
    version: ModelVersion,
    service: ServiceConfig,
    *,
    find: FindVersion | None = None,
    listen: Address | None = None,
) -> Application:
    """The Serve application around any ImageGenerator.

    Args:
        version: the model to begin with; replicas that start later begin with what `find` finds.
        service: all settings.
        find: looks for a newer model; None where there is nothing to look for.
        listen: where the ingress replica listens itself, besides being behind Serve's proxies.
    """
    logging_config = {
        "encoding": "JSON" if service.log_format == "json" else "TEXT",
        "enable_access_log": False,
    }
    generator = serve.deployment(
        name=GENERATOR,
        logging_config=logging_config,
        max_constructor_retry_count=2,
        **_generator_options(service.serve),
    )(GeneratorReplica)
    build_api = api_builder(service, listen, max_concurrency=_INGRESS_CONCURRENCY)
    api = serve.deployment(
        name="api",
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=_HEALTH_CHECK_S,
        max_ongoing_requests=_INGRESS_CONCURRENCY,
        logging_config=logging_config,
    )(serve.ingress(build_api)())
    return api.bind(generator.bind(version, find, service))


def _generator_options(config: ServeConfig) -> dict[str, Any]:
    """Replicas, their resources and their queue, as Ray Serve takes them."""
    return {
        "ray_actor_options": {
            "num_cpus": config.num_cpus,
            "num_gpus": gpus_per_replica(config, cluster_resources()),
        },
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        },
        "max_ongoing_requests": 2 * config.max_batch_size,  # one batch runs, the next one waits
        "max_queued_requests": config.max_queued_requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
    }


def build_app(
    model: str, service: ServiceConfig, *, home: str, listen: Address | None = None
) -> Application:
    """The Serve application around a trained model.

    An alias such as models:/tessera@champion is looked up here, and again by every replica every
    few seconds: when it moves, replicas change over.

    Args:
        model: a bundle directory, "asset:base", or "models:/NAME@ALIAS".
        service: all settings.
        home: the directory of the registry and of converted pretrained models.
        listen: as for `assemble`.

    Raises:
        BundleError: there is no such model.
    """
    device = "cuda" if gpus_per_replica(service.serve, cluster_resources()) else "cpu"
    find = partial(_find, model, Path(home).absolute(), device)
    moves = model.startswith("models:/") and "@" in model
    return assemble(find(), service, find=find if moves else None, listen=listen)


def gpus_per_replica(config: ServeConfig, resources: Mapping[str, float]) -> float:
    """What the settings say, or one where the cluster has any."""
    if config.num_gpus is None:
        return float(resources.get("GPU", 0) > 0)
    return config.num_gpus


def cluster_resources() -> Mapping[str, float]:
    """Ray's resources by name; none before Ray is started."""
    if not ray.is_initialized():
        return {}
    found: dict[str, float] = ray.cluster_resources()
    return found


def _find(model: str, home: Path, device: str) -> ModelVersion:
    found = resolve_model(model, home=home)
    load = partial(
        load_generator,
        found.path.absolute(),
        pretrained_cache=home / "pretrained",
        device=device,
    )
    return ModelVersion(found.name, found.version, load)


class AppArgs(Config):
    """`args` of an application in a Serve config file."""

    model: str = Field(description="a bundle directory, asset:base, or models:/NAME@ALIAS")
    home: str = Field(".tessera", description="of the registry and of converted pretrained models")
    serve: ServeConfig | None = Field(
        None, description="the section `serve` of `service`, which may stand here as well"
    )
    service: ServiceConfig = ServiceConfig()

    @model_validator(mode="after")
    def _replicas_once(self) -> AppArgs:
        if self.serve is not None and "serve" in self.service.model_fields_set:
            raise ValueError("`serve` and `service.serve` are the same section: keep one of them")
        return self

    @property
    def resolved_service(self) -> ServiceConfig:
        """All settings of the service."""
        if self.serve is None:
            return self.service
        return self.service.model_copy(update={"serve": self.serve})


def app_builder(args: dict[str, Any]) -> Application:
    """What `import_path: serve.app:app_builder` names in a Serve config file.

    Raises:
        ValidationError: `args` are not AppArgs.
        BundleError: there is no such model.
        RecipeError: there are no keys; a cluster is never one's own machine alone.
    """
    checked = AppArgs.model_validate(args)
    check_exposure("a cluster", checked.resolved_service)
    return build_app(checked.model, checked.resolved_service, home=checked.home)
