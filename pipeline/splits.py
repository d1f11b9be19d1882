"""Train, validation or test: decided by what a picture is of, never row by row.

The same emoji recurs across vendors and skin tones; a split by rows would leak it.

    split_of("1f34e", seed=0, validation_fraction=0.05, test_fraction=0.1)    # "train"
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(group: str, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    """The split of a group: a function of these arguments alone, so new samples move no old one."""
    place = hash_fraction("split", group, seed)
    if place < validation_fraction:
        return "validation"
    return "test" if place < validation_fraction + test_fraction else "train"


def hash_fraction(purpose: str, text: str, seed: int) -> float:
    """A uniform number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
