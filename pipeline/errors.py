"""The one exception tree for errors that a user can correct.

A message names the offending value, the limit that it broke and what to do next; the command line
prints it without a traceback. Invariants of this code, which no user can break, are `assert`ed.

    if told := user_error(error):  # what a worker raised, wherever Ray keeps it
        raise told from error
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial
from typing import Any


class TesseraError(Exception):
    """Something the user can correct. The message names the value, the limit and the remedy."""


class RecipeError(TesseraError, ValueError):
    """A recipe or an override that is unknown, of the wrong type or contradicts itself."""


class DataError(TesseraError, ValueError):
    """Shards, images or captions that are missing, altered or unusable."""


class PluginError(TesseraError, ValueError):
    """A plugin directory or file (see pipeline/registry.py) that cannot be used."""


class BundleError(TesseraError, ValueError):
    """A model directory that is missing, damaged or of a kind this version does not load."""


class PretrainedNotFoundError(TesseraError, FileNotFoundError):
    """A pretrained model that is not on disk, in an installed package or on a hub."""


class MissingExtraError(TesseraError, ImportError):
    """A part of Tessera that needs packages which are not installed.

    Args:
        part: what needs them.
        extra: the extra of Tessera that installs them.
    """

    def __init__(self, part: str, extra: str) -> None:
        super().__init__(f"{part} needs more packages: pip install 'tessera[{extra}]'")
        self._made_of = part, extra

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker's error comes back pickled, and pickle knows the message alone."""
        return type(self), self._made_of


class ResourceError(TesseraError, RuntimeError):
    """The machine or the cluster lacks memory, disk, CPUs, a port or a server to do this."""


class TrainingError(TesseraError, RuntimeError):
    """Training cannot continue, for example because a loss is not a number."""


class PromotionError(TesseraError, RuntimeError):
    """A version that may not become champion: refused, overtaken by another, or not servable."""


class RequestError(TesseraError, ValueError):
    """A generation request outside what the model can do.

    Attributes:
        param: the name of the offending field, as the caller wrote it.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """A replica's error comes back pickled, and pickle knows no named arguments."""
        return partial(type(self), param=self.param), self.args


def user_error(error: BaseException) -> TesseraError | None:
    """What a user can correct of an error, if anything: the first `TesseraError` among the error
    and its causes, or a full disk as a ResourceError.

    Causes are what an error was raised from, what Ray keeps in an error of a task (`cause`), and
    what it keeps of each worker of a training (`worker_failures`).
    """
    for cause in _causes(error):
        if isinstance(cause, TesseraError):
            return cause
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return ResourceError("no space is left on the disk; free some, or move --home")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the innermost of Ray's first: its own class may pose as theirs, with
    a traceback for a message."""
    while error is not None:
        for failure in getattr(error, "worker_failures", {}).values():
            yield from _causes(failure)
        inner = getattr(error, "cause", None)
        if isinstance(inner, BaseException):
            yield from _causes(inner)
        yield error
        error = error.__cause__
