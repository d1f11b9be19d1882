"""The family causal: see pipeline/models/networks/causal.py."""

from pipeline.models.networks.causal import (  # noqa: F401
    CAPTIONS,
    GUIDANCE_SCALE,
    READS,
    UNREAD,
    Generator,
    build,
    export,
    language_model_config,
)
