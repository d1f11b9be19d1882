"""What the service refuses to generate: a hook on prompts and one on images.

The default, `safety: words`, refuses prompts with a word of blocked.txt and looks at no image.
`safety: off` refuses nothing. `safety: package.module:factory` takes another hook: `factory()`
returns an object with the two methods of `Safety`.
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
_SHORT = 1_000  # characters
_INVISIBLE = {"Cf", "Mn"}  # zero-width characters and stacked accents hide a word from a list


class Safety(Protocol):
    """Both methods return None to let something pass, else the reason for the client."""

    def prompt(self, text: str) -> str | None: ...

    def picture(self, pixels: NDArray[np.uint8]) -> str | None:
        """uint8 (H, W, 3), RGB, before it is encoded; finished or, in a stream, unfinished."""


class AllowAll:
    """Lets everything pass."""

    def prompt(self, text: str) -> str | None:
        return None

    def picture(self, pixels: NDArray[np.uint8]) -> str | None:
        return None


class WordList(AllowAll):
    """Refuses prompts that contain a word: whole words in alphabets, anywhere in Chinese."""

    def __init__(self, words: Iterable[str]) -> None:
        plain = [_normalized(word) for word in words]
        bounded = "|".join(re.escape(word) for word in plain if word.isascii())
        anywhere = "|".join(re.escape(word) for word in plain if not word.isascii())
        parts = [rf"\b(?:{bounded})\b"] * bool(bounded) + [anywhere] * bool(anywhere)
        self._pattern = re.compile("|".join(parts)) if parts else None

    def prompt(self, text: str) -> str | None:
        if self._pattern is None or not self._pattern.search(_normalized(text)):
            return None
        return "the prompt asks for something that this service does not draw"


async def check_prompt(safety: Safety, prompt: str) -> str | None:
    """Why a hook refuses a prompt; an operator's own hook may block, and a long prompt takes the
    word list up to 0.5 s, so those run in a thread."""
    if type(safety) in (AllowAll, WordList) and len(prompt) <= _SHORT:
        return safety.prompt(prompt)
    return await asyncio.to_thread(safety.prompt, prompt)


def _normalized(text: str) -> str:
    """Without case, width, accents and invisible characters, and with single blanks."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    kept = "".join(c for c in folded if unicodedata.category(c) not in _INVISIBLE)
    return " ".join(kept.split())


def load_safety(service: ServiceConfig) -> Safety:
    """The hook that the settings name.

    Raises:
        RecipeError: it cannot be imported or lacks a method.
    """
    if service.safety == "off":
        return AllowAll()
    if service.safety == "words":
        lines = BLOCKED.read_text(encoding="utf-8").splitlines()
        listed = [line for line in lines if line and not line.startswith("#")]
        return WordList([*listed, *service.blocked_words])
    module, _, name = service.safety.partition(":")
    try:
        hook: Safety = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"safety={service.safety!r} cannot be loaded ({error}); say 'words', 'off' or "
            "package.module:factory"
        ) from error
    for method in ("prompt", "picture"):
        if not callable(getattr(hook, method, None)):
            raise RecipeError(
                f"safety={service.safety!r} has no method {method}(); see serve.safety"
            )
    return hook
