"""What the two deployments say to each other: the served model's card, pictures and refusals.

Light on purpose: the ingress imports this and never loads PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.contracts import GenerationRequest

PROBE = GenerationRequest(prompt="a red circle")
"""What a replica draws once before it takes requests, and what readiness asks of it."""


@dataclass(frozen=True)
class Card:
    """What clients need to know of the served model.

    Attributes:
        name: its name in the registry.
        version: its version there.
        image_size: pixels a side.
        styles: what `style` may be.
        loaded: Unix time, seconds.
    """

    name: str
    version: str
    image_size: int
    styles: tuple[str, ...]
    loaded: int

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"


@dataclass(frozen=True)
class Picture:
    """A drawn picture as PNG, and the model that drew it."""

    png: bytes
    seed: int
    card: Card


@dataclass(frozen=True)
class Refusal:
    """The model cannot draw this request; `param` names the field at fault.

    A value and not an exception: exceptions cross processes as tracebacks.
    """

    message: str
    param: str
