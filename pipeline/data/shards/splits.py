"""Train, validation or test: decided by what an image is of (its group), never row by row.

The same emoji recurs across vendors and skin tones: a split by rows would put one of its images
into training and another into the test.

    split_of("1f34e", seed=0, validation_fraction=0.05, test_fraction=0.1)    # "train"
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(group: str, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    """The split of a group, a function of the arguments alone: new samples move no old one.

    Args:
        validation_fraction: share of the groups held out to stop training by, in [0, 1].
        test_fraction: share of the groups held out to judge by, in [0, 1].
    """
    place = hash_fraction("split", group, seed)
    if place < validation_fraction:
        return "validation"
    return "test" if place < validation_fraction + test_fraction else "train"


def hash_fraction(purpose: str, text: str, seed: int) -> float:
    """A number that depends on the arguments alone; over texts, uniform in [0, 1).

    Args:
        purpose: what it decides; numbers for different purposes are independent.
    """
    digest = hashlib.sha256(f"{purpose}:{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
