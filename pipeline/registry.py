"""A file's name is its registration: `load("models", "masked")` imports pipeline/models/masked.py.

To add a model family, a tokenizer, a source or a task, add a file to its folder. Names that start
with an underscore are helpers, not registrations.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from types import ModuleType

from pipeline.errors import RecipeError

_ROOT = Path(__file__).parent


def names(kind: str) -> list[str]:
    """Everything registered under `kind`, sorted."""
    return sorted(p.stem for p in (_ROOT / kind).glob("*.py") if not p.stem.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """Import `pipeline.<kind>.<name>`.

    Raises:
        RecipeError: nothing of that name exists; the message lists what does.
    """
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"no {kind.rstrip('s')} is called {name!r}; there are: {', '.join(known)}.{hint}"
        )
    return importlib.import_module(f"pipeline.{kind}.{name}")
