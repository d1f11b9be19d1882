"""The ingress: OpenAI's images API over HTTP, and the builder of the Ray Serve application.

    tessera serve                         # one machine
    serve deploy infra/serve.yaml         # a cluster, through `app_builder`

Two deployments: `api` (this file; cheap, many requests in flight) and `generator` (replica.py;
autoscaled, batching). Routes are plain FastAPI functions over a `Pool`, which tests can replace.
"""

from __future__ import annotations

import base64
import secrets
import time
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import Field
from ray import serve
from ray.serve import Application

from pipeline import __version__
from pipeline.config import Config, ServeConfig
from pipeline.contracts import MAX_SEED
from serve.errors import ApiError, install, json_body, json_schema, shown
from serve.pool import Pool
from serve.replica import Card, Generator, Load
from serve.schemas import (
    CHAMPION,
    Health,
    ImageData,
    ImageRequest,
    ImagesResponse,
    Model,
    ModelList,
)

GENERATOR = "generator"
_IN_FLIGHT = 256  # requests one ingress holds: more than generators take, so that it says no itself

router = APIRouter()


def _pool(request: Request) -> Pool:
    pool: Pool = request.app.state.pool
    return pool


Generators = Annotated[Pool, Depends(_pool)]


@router.post("/v1/images/generations", openapi_extra=json_schema(ImageRequest))
async def generate_images(
    body: Annotated[ImageRequest, Depends(json_body(ImageRequest))], generators: Generators
) -> ImagesResponse:
    """Draw n pictures of a prompt."""
    _check_against(body, await generators.card())
    first_seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
    pictures = await generators.draw(body.pictures(first_seed))
    card = pictures[0].card
    return ImagesResponse(
        created=int(time.time()),
        data=[
            ImageData(b64_json=base64.b64encode(picture.png).decode(), seed=picture.seed)
            for picture in pictures
        ],
        size=card.size,
        model=card.name,
        model_version=card.version,
    )


@router.get("/v1/models")
async def list_models(generators: Generators) -> ModelList:
    """The served model, under both of its names."""
    card = await generators.card()
    return ModelList(data=[_model(name, card) for name in dict.fromkeys((CHAMPION, card.name))])


@router.get("/v1/models/{name}")
async def get_model(name: str, generators: Generators) -> Model:
    """The served model, under one of its names."""
    card = await generators.card()
    _check_name(name, card)
    return _model(name, card)


@router.get("/healthz")
async def healthz() -> Health:
    """This process is alive."""
    return Health(status="ok")


@router.get("/readyz")
async def readyz(generators: Generators) -> Health:
    """A replica draws pictures."""
    await generators.check_ready()
    return Health(status="ready")


def _check_against(body: ImageRequest, card: Card) -> None:
    """Refuse what this model cannot do.

    Raises:
        ApiError: 404 another model, 400 another size or style.
    """
    _check_name(body.model, card)
    if body.size not in ("auto", card.size):
        raise ApiError(
            400,
            f"size={shown(body.size)}: this model draws {card.size}; ask for that or 'auto'",
            code="invalid_value",
            param="size",
        )
    if body.style is not None and body.style not in card.styles:
        known = ", ".join(card.styles) or "none; leave style out"
        raise ApiError(
            400,
            f"style={shown(body.style)}: this model's styles are {known}",
            code="invalid_value",
            param="style",
        )


def _check_name(name: str, card: Card) -> None:
    if name not in (CHAMPION, card.name):
        raise ApiError(
            404,
            f"the model {shown(name)} is not served here; use {CHAMPION!r} or {card.name!r}",
            code="model_not_found",
            param="model",
        )


def _model(name: str, card: Card) -> Model:
    return Model(
        id=name, created=card.loaded, version=card.version, size=card.size, styles=card.styles
    )


def create_api(pool: Pool | None = None) -> FastAPI:
    """The FastAPI application over `pool`; in a Serve replica, over the generator deployment."""
    api = FastAPI(
        title="Tessera", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    install(api)
    api.include_router(router)
    api.state.pool = pool or Pool(serve.get_deployment_handle(GENERATOR))
    return api


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
    # imported here because api and generator replicas import this file and need no MLflow
    from pipeline.bundle import load_generator
    from pipeline.tracking import resolve_model

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


def app_builder(args: AppArgs) -> Application:
    """What `import_path: serve.app:app_builder` names in a Serve config file."""
    return build_app(args.model, args.serve, home=args.home)
