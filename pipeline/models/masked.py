"""The family masked: see pipeline/models/networks/masked.py."""

from pipeline.models.networks.masked import (  # noqa: F401
    CAPTIONS,
    GUIDANCE_SCALE,
    READS,
    UNREAD,
    Generator,
    build,
)
