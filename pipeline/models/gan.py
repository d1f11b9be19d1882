"""The family gan: see pipeline/models/networks/gan.py."""

from pipeline.models.networks.gan import (  # noqa: F401
    CAPTIONS,
    GUIDANCE_SCALE,
    READS,
    UNREAD,
    Generator,
    build,
)
