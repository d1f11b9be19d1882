"""What is not drawn: a hook on prompts and one on pictures.

The default refuses prompts with a word of blocked.txt; it looks at no picture. `safety: off`
switches it off; `safety: package.module:factory` puts another in its place: `factory()` gives an
object with the two methods of `Safety`.
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RecipeError
from serve.settings import ServiceConfig

BLOCKED = Path(__file__).with_name("blocked.txt")
_INVISIBLE = {"Cf", "Mn"}  # zero-width characters and stacked accents hide a word from a list


class Safety(Protocol):
    """Both methods return None to let something pass, else why not: a sentence for the client."""

    def prompt(self, text: str) -> str | None: ...

    def picture(self, pixels: NDArray[np.uint8]) -> str | None:
        """uint8 (H, W, 3), RGB, before it is encoded."""


class Everything:
    """Lets everything pass."""

    def prompt(self, text: str) -> str | None:
        return None

    def picture(self, pixels: NDArray[np.uint8]) -> str | None:
        return None


class Words(Everything):
    """Refuses prompts that contain a word; whole words in alphabets, anywhere in Chinese."""

    def __init__(self, words: Iterable[str]) -> None:
        plain = [plainly(word) for word in words]
        bounded = "|".join(re.escape(word) for word in plain if word.isascii())
        anywhere = "|".join(re.escape(word) for word in plain if not word.isascii())
        parts = [rf"\b(?:{bounded})\b"] * bool(bounded) + [anywhere] * bool(anywhere)
        self._found = re.compile("|".join(parts)) if parts else None

    def prompt(self, text: str) -> str | None:
        if self._found is None or not self._found.search(plainly(text)):
            return None
        return "the prompt asks for something that this service does not draw"


async def objection(safety: Safety, prompt: str) -> str | None:
    """What a hook has against a prompt; one that is not ours may take its time, in a thread."""
    if type(safety) in (Everything, Words):
        return safety.prompt(prompt)
    return await asyncio.to_thread(safety.prompt, prompt)


def plainly(text: str) -> str:
    """Case, width, accents and invisible characters taken away, blanks made single."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    kept = "".join(c for c in folded if unicodedata.category(c) not in _INVISIBLE)
    return " ".join(kept.split())


def load_safety(config: ServiceConfig) -> Safety:
    """The hook that the configuration names.

    Raises:
        RecipeError: it cannot be imported or lacks a method.
    """
    if config.safety == "off":
        return Everything()
    if config.safety == "words":
        lines = BLOCKED.read_text(encoding="utf-8").splitlines()
        listed = [line for line in lines if line and not line.startswith("#")]
        return Words([*listed, *config.blocked_words])
    module, _, name = config.safety.partition(":")
    try:
        made: Safety = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"safety={config.safety!r} cannot be loaded ({error}); say 'words', 'off' or "
            "package.module:factory"
        ) from error
    for method in ("prompt", "picture"):
        if not callable(getattr(made, method, None)):
            raise RecipeError(
                f"safety={config.safety!r} has no method {method}(); see serve.safety"
            )
    return made
