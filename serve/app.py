"""The Ray Serve application: two deployments around one model.

    tessera serve                         # one machine
    serve deploy infra/serve.yaml         # a cluster, through `app_builder`

`api` answers HTTP (api.py; cheap, many requests in flight, no PyTorch), `generator` draws
(replica.py; autoscaled, batching).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from ray import serve
from ray.serve import Application

from pipeline.bundle import load_generator
from pipeline.config import Config, ServeConfig
from pipeline.tracking import resolve_model
from serve.api import GENERATOR, create_api
from serve.replica import Generator, Load

_IN_FLIGHT = 256
"""Requests one ingress holds: more than generators take, so that it says no in its own words."""


def assemble(load: Load, name: str, version: str, config: ServeConfig) -> Application:
    """The Serve application around any ImageGenerator.

    Args:
        load: loads the model; called in every replica.
        name, version: of the model, as clients see them.
        config: replicas and batches.
    """
    generator = serve.deployment(
        name=GENERATOR,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        },
        # one batch in the model, the next one waiting for it
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_constructor_retry_count=2,
    )(Generator)
    api = serve.deployment(
        name="api", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_IN_FLIGHT
    )(serve.ingress(create_api)())
    return api.bind(generator.bind(load, name, version, config))


def build_app(model: str, config: ServeConfig, *, home: str) -> Application:
    """The Serve application around a trained model.

    An alias such as models:/tessera@champion is looked up here, once: every replica, whenever it
    starts, draws with the same version.

    Args:
        model: a bundle directory, "asset:base", or "models:/NAME@ALIAS".
        config: replicas and batches.
        home: the directory of the registry and of converted pretrained models.

    Raises:
        BundleError: there is no such model.
    """
    directory = Path(home).absolute()
    found = resolve_model(model, home=directory)
    load = partial(
        load_generator,
        found.path.absolute(),
        pretrained_cache=directory / "pretrained",
        device="cuda" if config.num_gpus else "cpu",
    )
    return assemble(load, found.name, found.version, config)


class AppArgs(Config):
    """`args` of an application in a Serve config file."""

    model: str = Field(description="a bundle directory, asset:base, or models:/NAME@ALIAS")
    home: str = Field(".tessera", description="of the registry and of converted pretrained models")
    serve: ServeConfig = ServeConfig()


def app_builder(args: dict[str, Any]) -> Application:
    """What `import_path: serve.app:app_builder` names in a Serve config file.

    Raises:
        ValidationError: `args` are not AppArgs.
        BundleError: there is no such model.
    """
    checked = AppArgs.model_validate(args)
    return build_app(checked.model, checked.serve, home=checked.home)
