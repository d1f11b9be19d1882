"""The ingress: OpenAI's images API over HTTP.

    POST /v1/images/generations, /v1/images/edits, /v1/images/variations
    GET  /v1/models, /v1/models/NAME     GET /files/NAME, /healthz, /readyz, /metrics, /openapi.json

Routes are plain FastAPI functions over a `ReplicaPool`, which tests replace:

    api = create_api(pool)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Depends, FastAPI, Form, Header, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from starlette.types import Lifespan

from pipeline import __version__
from serve.access import AccessControl
from serve.cache import MAX_KEY_CHARS, LinkedImages
from serve.errors import CODE_HEADER, REQUEST_ID, ApiError, install_error_handlers
from serve.guard import MULTIPART, GuardedRoute
from serve.listener import Address, listening
from serve.messages import GeneratedImage, ImageFormat, PartialImage, Upload
from serve.metrics import Metrics
from serve.middleware import BodyMiddleware, OriginGuardMiddleware, RequestLogMiddleware
from serve.pool import ReplicaPool
from serve.responses import images_response, model_entry, stream_events
from serve.safety import load_safety
from serve.schemas import (
    EditRequest,
    ErrorEnvelope,
    Health,
    ImageOptions,
    ImageRequest,
    ImagesResponse,
    Model,
    ModelList,
    VariationRequest,
)
from serve.service import Client, ImageService
from serve.settings import ServiceConfig
from serve.understand import Understood, check_model, model_names

_OWN = "x-tessera-"
UNUSED_HEADER = f"{_OWN}unused"
"""The fields that were sent and change nothing, by name."""
TOKENS_HEADERS = {
    "prompt": f"{_OWN}prompt-tokens",
    "negative_prompt": f"{_OWN}negative-prompt-tokens",
}
"""By field, of a prompt that is cut: tokens used/given."""

GENERATOR = "generator"
"""The name of the generator deployment."""


async def _pool(request: Request) -> ReplicaPool:
    pool: ReplicaPool = request.app.state.pool
    return pool


async def _service(request: Request) -> ImageService:
    service: ImageService = request.app.state.image_service
    return service


async def _settings(request: Request) -> ServiceConfig:
    service: ServiceConfig = request.app.state.settings
    return service


async def _client(
    request: Request,
    x_deadline_s: Annotated[
        float | None,
        Header(gt=0, allow_inf_nan=False, description="seconds within which to answer"),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=MAX_KEY_CHARS,
            description="a request sent again under the same key gets the answer of the first",
        ),
    ] = None,
) -> Client:
    return Client(request.state.client_name, x_deadline_s, idempotency_key)


Pool = Annotated[ReplicaPool, Depends(_pool)]
Service = Annotated[ImageService, Depends(_service)]
Settings = Annotated[ServiceConfig, Depends(_settings)]
Caller = Annotated[Client, Depends(_client)]

_ENVELOPE = {"model": ErrorEnvelope, "description": "serve/README.md lists the codes"}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ENVELOPE, "5XX": _ENVELOPE}
"""What any route may answer instead."""

IMAGES: dict[str, Any] = {
    "response_model": ImagesResponse,
    "responses": {200: {"content": {"text/event-stream": {}}, "description": "images, or events"}},
}
"""What every route that generates answers with."""

FILES: dict[str, Any] = {f"image/{kind}": {} for kind in get_args(ImageFormat)}
"""What images are by media type."""

guarded_router = APIRouter(route_class=GuardedRoute)
"""Routes that need an API key where there are keys."""

open_router = APIRouter()
"""Routes that never need one."""


@guarded_router.post("/v1/images/generations", **IMAGES)
async def generate_images(
    request: Request, client: Caller, service: Service, body: ImageRequest
) -> Response:
    """Generate n images of a prompt."""
    return await _answer(request, service, client, body, "image_generation")


@guarded_router.post("/v1/images/edits", **IMAGES)
async def edit_image(
    request: Request,
    client: Caller,
    service: Service,
    body: Annotated[EditRequest, Form(media_type=MULTIPART)],
) -> Response:
    """Generate an image anew where its mask says so, and all else stays as it is; without a mask,
    anywhere, as much as `strength` says."""
    mask = await body.mask.read() if body.mask else None
    upload = Upload(await body.image.read(), mask, share=body.strength)
    return await _answer(request, service, client, body, "image_edit", upload)


@guarded_router.post("/v1/images/variations", **IMAGES)
async def vary_image(
    request: Request,
    client: Caller,
    service: Service,
    body: Annotated[VariationRequest, Form(media_type=MULTIPART)],
) -> Response:
    """Generate an image again, a share of its tokens anew."""
    image = await body.image.read()
    upload = Upload(image, share=body.variation, transparency_is_mask=False)
    return await _answer(request, service, client, body, "image_variation", upload)


async def _answer(
    request: Request,
    service: ImageService,
    client: Client,
    body: ImageOptions,
    event: str,
    upload: Upload | None = None,
) -> Response:
    request.state.log_fields |= {
        "pictures": body.n,
        "prompt_chars": len(body.prompt_text),
        "user": body.user,
        "seed": body.seed,
    }
    asked = await service.understand(body, upload)
    if not body.stream:
        images = await service.generate(asked, client)
        urls = _links(request, client, asked, images) if asked.links else None
        answer = images_response(asked, images, urls).model_dump_json(exclude_none=True)
        headers = _notes(request, asked, images[0])
        return Response(answer, headers=headers, media_type="application/json")
    stream = service.stream(asked, client)
    first = await anext(stream)  # an error before the first image still has a status of its own
    events = stream_events(event, asked, first, stream, request)
    headers = _notes(request, asked, first)
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


def _links(
    request: Request, client: Client, asked: Understood, images: Sequence[GeneratedImage]
) -> list[str]:
    """URLs under which a client's images are to be had for an hour."""
    service: ServiceConfig = request.app.state.settings
    links: LinkedImages = request.app.state.links
    base = (service.public_url or str(request.base_url)).rstrip("/")
    names = [links.add(client.name, image.encoded, asked.output.format) for image in images]
    return [f"{base}/files/{name}" for name in names]


def _notes(
    request: Request, asked: Understood, image: PartialImage | GeneratedImage
) -> dict[str, str]:
    """Headers that say what of a request was not used; the log says it, too.

    Args:
        request: whose log line it is.
        asked: what it was understood as.
        image: any of its images.
    """
    headers = {TOKENS_HEADERS[name]: f"{c.used}/{c.given}" for name, c in image.cut.items()}
    if unused := (*asked.unused, *image.unused):
        headers[UNUSED_HEADER] = ", ".join(unused)
    request.state.log_fields |= {name.removeprefix(_OWN): said for name, said in headers.items()}
    return headers


@guarded_router.get("/files/{name}", response_class=Response, responses={200: {"content": FILES}})
async def get_file(request: Request, name: str) -> Response:
    """An image that an answer links to; to the client that asked for it, for an hour."""
    links: LinkedImages = request.app.state.links
    found = links.get(request.state.client_name, name)
    if found is None:
        raise ApiError(
            404,
            "there is no such image, or no longer: URLs are good for an hour; ask for it again",
            code="file_not_found",
        )
    return Response(found.encoded, media_type=f"image/{found.format}")


@guarded_router.get("/v1/models")
async def list_models(pool: Pool, service: Settings) -> ModelList:
    """The served model, under each of its names."""
    model = await pool.model_info()
    names = model_names(model, service)
    return ModelList(data=[model_entry(name, model) for name in names])


@guarded_router.get("/v1/models/{name}")
async def get_model(name: str, pool: Pool, service: Settings) -> Model:
    """The served model, under one of its names."""
    model = await pool.model_info()
    check_model(name, model, service)
    return model_entry(name, model)


@guarded_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, pool: Pool) -> Response:
    """For Prometheus."""
    counted: Metrics = request.app.state.metrics
    rendered = counted.render(pool.known_model, pool.num_waiting)
    return Response(rendered, media_type=CONTENT_TYPE_LATEST)


@open_router.get("/healthz", response_model_exclude_none=True)
async def healthz() -> Health:
    """This process is alive."""
    return Health(status="ok")


@open_router.get("/readyz", response_model_exclude_none=True)
async def readyz(pool: Pool) -> Health:
    """A replica generates; which model, and whether a newer one is refused."""
    await pool.check_ready()
    model = await pool.model_info()
    return Health(
        status="ready", model=model.name, model_version=model.version, notice=model.notice or None
    )


def create_api(
    pool: ReplicaPool | None = None,
    service: ServiceConfig | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """The FastAPI application over `pool`; in a Serve replica, over the generator deployment."""
    service, counted = service or ServiceConfig(), Metrics()
    pool = pool or ReplicaPool(serve.get_deployment_handle(GENERATOR))
    pool.on_image = counted.record_image
    access = AccessControl(service.keys)
    api = FastAPI(
        title="Tessera",
        version=__version__,
        docs_url=None,  # Swagger's page would load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        responses=ERRORS,
        lifespan=lifespan,
    )
    install_error_handlers(api)
    # for the schema alone: GuardedRoute has checked the key
    bearer = [Depends(HTTPBearer(auto_error=False))] if service.keys else []
    api.include_router(guarded_router, dependencies=bearer)
    api.include_router(open_router)
    state = api.state
    state.pool, state.access, state.metrics, state.settings = pool, access, counted, service
    state.links = LinkedImages(service.link_bytes)
    state.image_service = ImageService(pool, access, load_safety(service), counted, service)
    _add_middleware(api, counted, service)
    return api


def _add_middleware(api: FastAPI, counted: Metrics, service: ServiceConfig) -> None:
    """From the inside out."""
    api.add_middleware(
        BodyMiddleware,
        max_multipart_bytes=service.max_upload_bytes,
        timeout_s=service.body_timeout_s,
    )
    api.add_middleware(OriginGuardMiddleware, service=service)
    api.add_middleware(RequestLogMiddleware, metrics=counted, log_text=service.log_format == "text")
    if service.cors_origins:  # outside, so that a page can read every answer
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's clients send headers of their own
            expose_headers=[
                REQUEST_ID,
                "retry-after",
                CODE_HEADER,
                UNUSED_HEADER,
                *TOKENS_HEADERS.values(),
            ],
        )


def api_builder(
    service: ServiceConfig, listen: Address | None, *, max_concurrency: int
) -> Callable[[], FastAPI]:
    """`create_api` as Serve calls it in the ingress replica: a function without arguments.

    Args:
        service: all settings.
        listen: where the replica listens itself; None: it is behind proxies only.
        max_concurrency: requests that it then answers at a time.
    """

    def build() -> FastAPI:
        if listen is None:
            return create_api(None, service)
        lifespan = partial(listening, address=listen, max_concurrency=max_concurrency)
        return create_api(None, service, lifespan)

    return build
