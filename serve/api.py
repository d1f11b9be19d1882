"""The ingress: OpenAI's images API over HTTP.

    POST /v1/images/generations     GET /v1/models, /v1/models/NAME     GET /healthz, /readyz

Routes are plain FastAPI functions over a `Pool` of generator replicas, which tests replace:

    api = create_api(pool)
"""

from __future__ import annotations

import base64
import secrets
import time
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from ray import serve

from pipeline import __version__
from pipeline.contracts import MAX_SEED
from serve.errors import ApiError, install, json_body, json_schema, shown
from serve.pictures import Card
from serve.pool import Pool
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
"""The name of the generator deployment."""

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
