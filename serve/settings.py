"""Who may use the service and how much: every setting with its default, unit and limits.

A YAML file for `tessera serve --config FILE`, or `args.service` of a Serve config file:

    keys:
      - {name: alice, sha256: 9f86d0..., pictures_per_minute: 60}     # from `tessera key alice`
    cors_origins: [https://example.org]
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config import Config
from pipeline.errors import RecipeError


class ApiKey(Config):
    """One client; the key itself is nowhere, only its digest."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key, in hexadecimal")
    pictures_per_minute: float = Field(60, ge=1, description="pictures; as many at once")
    megapixels_per_day: float = Field(1_000, gt=0, description="width * height * n / 1e6")


class C2paConfig(Config):
    """What signs pictures; the files are read where replicas run."""

    certificates: Path = Field(description="PEM chain, the signing certificate first")
    private_key: Path = Field(description="PEM, of the signing certificate")
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"


class ServiceConfig(Config):
    """Access, limits, safety and caches."""

    keys: tuple[ApiKey, ...] = Field((), description="who may draw; empty lets everybody draw")
    allow_anonymous: bool = Field(
        False, description="serve without keys even where other machines reach it"
    )
    cors_origins: tuple[str, ...] = Field((), description="web pages that may call, by origin")
    safety: str = Field(
        "words", description="'words', 'off', or module:factory of a serve.safety.Safety"
    )
    c2pa: C2paConfig | None = Field(None, description="sign pictures; needs the extra c2pa")
    blocked_words: tuple[str, ...] = Field((), description="in addition to serve/blocked.txt")
    deadline_s: float = Field(60, gt=0, le=3600, description="a picture is answered within it")
    max_upload_bytes: int = Field(8_000_000, ge=1, description="of a multipart body")
    result_cache_bytes: int = Field(64_000_000, ge=0, description="pictures kept; 0 keeps none")
    idempotency_ttl_s: float = Field(600, gt=0, description="an Idempotency-Key is known so long")
    watch_every_s: float = Field(5, gt=0, description="how often a moved alias is looked for")
    log_format: Literal["json", "text"] = Field("json", description="of the replicas' logs")

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


def load_service(path: Path) -> ServiceConfig:
    """Read a YAML file.

    Raises:
        RecipeError: it cannot be read, or says something that is not a setting.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ServiceConfig.model_validate({} if values is None else values)
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(ServiceConfig.model_fields)
        raise RecipeError(f"{path}: {where}: {first['msg']}; settings: {known}") from error


def behind_haproxy() -> bool:
    """Whether Ray's HAProxy is asked for."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def check_exposure(host: str, config: ServiceConfig) -> None:
    """Refuse to listen to other machines without API keys.

    Raises:
        RecipeError: `host` is not this machine's alone and there is no key.
    """
    if config.keys or config.allow_anonymous:
        return
    if behind_haproxy():
        host = "0.0.0.0"  # behind HAProxy Ray's replicas listen everywhere, whatever is asked for
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
