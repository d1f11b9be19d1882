"""The ingress: OpenAI's images API over HTTP.

    POST /v1/images/generations, /v1/images/edits, /v1/images/variations
    GET  /v1/models, /v1/models/NAME     GET /healthz, /readyz, /metrics

Routes are plain FastAPI functions over a `Pool` of generator replicas, which tests replace:

    api = create_api(pool)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from starlette.types import Lifespan

from pipeline import __version__
from serve.access import Access
from serve.answers import events, images_response, model_entry
from serve.edge import Edge
from serve.errors import CODE_HEADER, REQUEST_ID, ApiError, install, json_body, json_schema, shown
from serve.forms import Filled, form_body, form_schema
from serve.front import Address, listening
from serve.metrics import Metrics
from serve.pictures import Upload
from serve.pool import Pool
from serve.safety import load_safety
from serve.schemas import (
    CHAMPION,
    Drawable,
    EditRequest,
    ErrorEnvelope,
    Health,
    ImageRequest,
    ImagesResponse,
    Model,
    ModelList,
    VariationRequest,
)
from serve.settings import ServiceConfig
from serve.studio import Caller, Studio, check_name

GENERATOR = "generator"
"""The name of the generator deployment."""

DEADLINE_HEADER = "x-deadline-s"


async def _caller(request: Request) -> Caller:
    access: Access = request.app.state.access
    name = access.authenticate(request.headers.get("authorization"))
    request.state.said = {"caller": name}
    return Caller(
        name,
        deadline_s=_deadline_s(request.headers.get(DEADLINE_HEADER)),
        repeat_key=request.headers.get("idempotency-key"),
    )


def _deadline_s(said: str | None) -> float | None:
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ApiError(
            400,
            f"{DEADLINE_HEADER}={shown(said)} is not a time; send seconds above 0",
            code="invalid_value",
            param=DEADLINE_HEADER,
        )
    return seconds


async def _pool(request: Request) -> Pool:
    pool: Pool = request.app.state.pool
    return pool


async def _studio(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


Known = Annotated[Caller, Depends(_caller)]
Generators = Annotated[Pool, Depends(_pool)]
TheStudio = Annotated[Studio, Depends(_studio)]

router = APIRouter(dependencies=[Depends(_caller)])
"""Routes that need a key where there are keys."""

open_router = APIRouter()
"""Routes that never do."""


def _errors(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """What a route may answer instead, and any route 403 and 500."""
    said = {"model": ErrorEnvelope, "description": "serve/README.md lists the codes"}
    return dict.fromkeys((*statuses, 403, 500), said)


PICTURES: dict[str, Any] = {
    "response_model": ImagesResponse,
    "response_model_exclude_none": True,
    "responses": {
        200: {"content": {"text/event-stream": {}}, "description": "pictures, or events"},
        **_errors(400, 401, 404, 409, 413, 415, 429, 503),
    },
}
"""What every route that draws answers with."""


@router.post(
    "/v1/images/generations",
    openapi_extra=json_schema(ImageRequest),
    **PICTURES,
)
async def generate_images(
    request: Request,
    caller: Known,
    body: Annotated[ImageRequest, Depends(json_body(ImageRequest))],
    studio: TheStudio,
) -> ImagesResponse | Response:
    """Draw n pictures of a prompt."""
    return await _answer(request, studio, caller, body, "image_generation")


@router.post(
    "/v1/images/edits",
    openapi_extra=form_schema(EditRequest, "image", "mask"),
    **PICTURES,
)
async def edit_image(
    request: Request,
    caller: Known,
    form: Annotated[Filled, Depends(form_body(EditRequest, "image", "mask"))],
    studio: TheStudio,
) -> ImagesResponse | Response:
    """Draw a picture anew where its mask is transparent; all else stays as it is."""
    upload = Upload(form.files["image"], form.files.get("mask"))
    return await _answer(request, studio, caller, form.fields, "image_edit", upload)


@router.post(
    "/v1/images/variations",
    openapi_extra=form_schema(VariationRequest, "image"),
    **PICTURES,
)
async def vary_image(
    request: Request,
    caller: Known,
    form: Annotated[Filled, Depends(form_body(VariationRequest, "image"))],
    studio: TheStudio,
) -> ImagesResponse | Response:
    """Draw a picture again, a share of its tokens anew."""
    upload = Upload(form.files["image"], share=form.fields.variation)
    return await _answer(request, studio, caller, form.fields, "image_variation", upload)


async def _answer(
    request: Request,
    studio: Studio,
    caller: Caller,
    body: Drawable,
    event: str,
    upload: Upload | None = None,
) -> ImagesResponse | Response:
    request.state.said |= {
        "pictures": body.n, "prompt_chars": len(body.said), "user": body.user, "seed": body.seed,
    }  # fmt: skip
    if not body.stream:
        return images_response(body, await studio.pictures(body, caller, upload))
    answers = studio.stream(body, caller, upload)
    first = await anext(answers)  # what goes wrong before it is answered with its own status
    return StreamingResponse(
        events(event, body, first, answers, request), media_type="text/event-stream"
    )


@router.get("/v1/models", responses=_errors(401, 503))
async def list_models(generators: Generators) -> ModelList:
    """The served model, under both of its names."""
    card = await generators.card()
    return ModelList(data=[model_entry(n, card) for n in dict.fromkeys((CHAMPION, card.name))])


@router.get("/v1/models/{name}", responses=_errors("4XX", 503))
async def get_model(name: str, generators: Generators) -> Model:
    """The served model, under one of its names."""
    card = await generators.card()
    check_name(name, card)
    return model_entry(name, card)


@router.get("/metrics", response_class=PlainTextResponse, responses=_errors(401))
async def metrics(request: Request, generators: Generators) -> Response:
    """For Prometheus."""
    counted: Metrics = request.app.state.metrics
    rendered = counted.render(generators.known, lambda: generators.waiting)
    return Response(rendered, media_type=CONTENT_TYPE_LATEST)


@open_router.get("/healthz", response_model_exclude_none=True, responses=_errors())
async def healthz() -> Health:
    """This process is alive."""
    return Health(status="ok")


@open_router.get("/readyz", response_model_exclude_none=True, responses=_errors(503))
async def readyz(generators: Generators) -> Health:
    """A replica draws pictures; which model, and if a newer one is refused."""
    await generators.check_ready()
    card = await generators.card()
    return Health(
        status="ready", model=card.name, model_version=card.version, notice=card.notice or None
    )


def create_api(
    pool: Pool | None = None,
    service: ServiceConfig | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """The FastAPI application over `pool`; in a Serve replica, over the generator deployment."""
    service, counted = service or ServiceConfig(), Metrics()
    pool = pool or Pool(serve.get_deployment_handle(GENERATOR))
    pool.on_picture = counted.drawn
    access = Access(service.keys)
    api = FastAPI(
        title="Tessera",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    install(api)
    api.include_router(router)
    api.include_router(open_router)
    state = api.state
    state.pool, state.access, state.service, state.metrics = pool, access, service, counted
    state.studio = Studio(pool, access, load_safety(service), counted, service)
    api.add_middleware(Edge, metrics=counted, service=service)
    if service.cors_origins:  # outside, so that a page can read every answer
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients of other makers send headers of their own
            expose_headers=[REQUEST_ID, "retry-after", CODE_HEADER],
        )
    return api


def api_with(
    service: ServiceConfig, listen: Address | None, *, at_once: int
) -> Callable[[], FastAPI]:
    """`create_api` as Serve calls it in the ingress replica: a function without arguments.

    Args:
        service: as for `create_api`.
        listen: where the replica listens itself; None: it is behind proxies only.
        at_once: requests it then has at a time.
    """

    def build() -> FastAPI:
        door = None if listen is None else partial(listening, address=listen, at_once=at_once)
        return create_api(None, service, door)

    return build
