"""All settings of the service, with their defaults, units and limits: one model, `ServiceConfig`.

    service = resolve_service(recipe.serve, Path("service.yaml"))

Its section `serve`, replicas and batches, is the one that a recipe has too (it lies below, in
pipeline/config/serve.py, because pipeline/ does not know serve/). Each setting of that section is
what the environment says (TESSERA__SERVE__MAX_BATCH_SIZE=32), else the file, else the recipe, else
the default. All others are the file's alone:

    keys:
      - {name: alice, sha256: 9f86d0..., pictures_per_minute: 60}     # from `tessera key alice`
    cors_origins: [https://example.org]
    serve: {max_replicas: 4}

`serve deploy` takes the same settings from `args` of its own file (app.AppArgs; infra/serve.yaml).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config import Config, ServeConfig, load_serve_section
from pipeline.config.overrides import stated
from pipeline.config.section import merged
from pipeline.errors import RecipeError
from serve.messages import Fit

LOCAL_ALIASES = (
    "tessera", "dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-*", "chatgpt-image-*",
)  # fmt: skip
"""What clients call the model where nobody chose a name: a trained model's usual one, and OpenAI's
image models, whose names are written into many clients."""


class ApiKey(Config):
    """One client. The key itself is stored nowhere, only its digest."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key, in hexadecimal")
    pictures_per_minute: float = Field(60, ge=1, description="images; as many at once")
    megapixels_per_day: float = Field(1_000, gt=0, description="width * height * n / 1e6")


class C2paConfig(Config):
    """What signs images; the files are read where replicas run."""

    certificates: Path = Field(description="PEM chain, the signing certificate first")
    private_key: Path = Field(description="PEM, of the signing certificate")
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"


class ServiceConfig(Config):
    """The service: access, limits, safety, caches, and in the section `serve` its replicas."""

    keys: tuple[ApiKey, ...] = Field((), description="who may call; empty lets everybody call")
    allow_anonymous: bool = Field(
        False, description="serve without keys even where other machines reach it"
    )
    cors_origins: tuple[str, ...] = Field((), description="web pages that may call, by origin")
    aliases: tuple[str, ...] | None = Field(
        None,
        description="further names that requests may call the model by; * stands for any text. "
        "None: LOCAL_ALIASES where this machine alone is served, else none",
    )
    safety: str = Field(
        "words", description="'words', 'off', or module:factory of a serve.safety.Safety"
    )
    blocked_words: tuple[str, ...] = Field((), description="in addition to serve/blocked.txt")
    c2pa: C2paConfig | None = Field(None, description="sign images; needs the extra c2pa")
    fit: Fit = Field(
        "pad",
        description="what becomes of an image of another shape than the model's: 'pad' with white, "
        "'crop', or 'refuse', which refuses every size but the model's",
    )
    response_format: Literal["auto", "b64_json", "url"] = Field(
        "auto",
        description="of answers to requests that name none; 'auto' is as OpenAI does: 'url' for "
        "dall-e-2 and dall-e-3, else 'b64_json'",
    )
    link_bytes: int = Field(
        256_000_000,
        ge=130_000_000,  # of ten images of 2048 x 2048 pixels
        description="images kept for an hour under the URLs of answers with response_format url",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="where clients reach the service, for those URLs; None: as a request names it",
    )
    deadline_s: float = Field(
        60, gt=0, le=3600, description="seconds within which a request is answered"
    )
    body_timeout_s: float = Field(
        30, gt=0, le=3600, description="seconds within which a request's body must have come"
    )
    max_upload_bytes: int = Field(8_000_000, ge=1, description="of a multipart body")
    result_cache_bytes: int = Field(64_000_000, ge=0, description="images kept; 0 keeps none")
    idempotency_ttl_s: float = Field(
        600, gt=0, description="seconds that an answer is kept under its Idempotency-Key"
    )
    watch_every_s: float = Field(
        5, gt=0, description="seconds between a replica's looks whether its alias has moved"
    )
    log_format: Literal["json", "text"] = Field("json", description="of the replicas' logs")
    serve: ServeConfig = Field(ServeConfig(), description="replicas and batches")

    @property
    def loopback_only(self) -> bool:
        """Whether this machine alone is served: other machines need keys, or the word to do without
        (`check_exposure`)."""
        return not (self.keys or self.allow_anonymous)

    @property
    def model_aliases(self) -> tuple[str, ...]:
        """Further names that requests may call the model by."""
        if self.aliases is None:
            return LOCAL_ALIASES if self.loopback_only else ()
        return self.aliases

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/?#@*\s]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin: write the scheme and host of a page, and its port "
                    "if it has one, as https://example.org"
                )
        return tuple(origin.lower() for origin in origins)

    @model_validator(mode="after")
    def _distinct(self) -> ServiceConfig:
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {what}")
        return self


def resolve_service(
    serve: ServeConfig | None = None,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServiceConfig:
    """The settings of a service from all places that may say them, see the top of this file.

    Args:
        serve: a recipe's section `serve`.
        file: YAML, a mapping of ServiceConfig's settings.
        environment: TESSERA__SERVE__KEY=value; os.environ unless given.

    Raises:
        RecipeError: the file cannot be read, a setting is unknown or has a wrong value.
    """
    given = _read(file) if file else {}
    recipe = {} if serve is None else stated(serve)
    section = load_serve_section(environment, merged(recipe, given.get("serve", {})))
    try:
        return ServiceConfig.model_validate({**given, "serve": section})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]  # it may be a secret
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(ServiceConfig.model_fields)
        raise RecipeError(f"{file}: {where}: {first['msg']}; settings: {known}") from error


def _read(file: Path) -> dict[str, Any]:
    """The file's settings as a mapping, of which the section `serve` is one too."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not isinstance(values.get("serve", {}), dict):
        raise RecipeError(f"{file} must hold a mapping of settings; so must its section `serve`")
    return values


def behind_haproxy() -> bool:
    """Whether the environment makes Ray Serve put HAProxy in front."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def check_exposure(host: str, service: ServiceConfig) -> None:
    """Refuse to listen to other machines without API keys.

    Raises:
        RecipeError: other machines reach `host`, and there is no key.
    """
    if not service.loopback_only:
        return
    if behind_haproxy():
        host = "0.0.0.0"  # Ray's replicas then listen on all interfaces, whatever is asked for
    if is_loopback(host):
        return
    raise RecipeError(
        f"host {host} lets other machines draw without an API key. Make one with `tessera key "
        "NAME`, name its digest in a file and pass --config FILE (`allow_anonymous: true` in it "
        "does without)"
    )


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
