"""Errors of Ray Data's workers, told in this process as they were raised.

Ray Data drops the cause of what a worker raises, or appends to its message, and of an actor that
could not be made it keeps a text alone. These hand an error over whole:

    dataset.map_batches(Telling(work), ...)
    dataset.map_batches(TellingActor, fn_constructor_args=(Encoder, *arguments), ...)

    with worker_errors():  # raises a TesseraError of a worker as itself
        for block in dataset.iter_batches(...):
            ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import pyarrow as pa
from ray.exceptions import RayError, UserCodeException

from pipeline.errors import TesseraError, user_error

Work = Callable[[pa.Table], pa.Table | Iterator[pa.Table]]


class WorkerError(UserCodeException):
    """What a worker raised, as text and, if a user can correct it, as the error itself.

    The error is an argument of its own, since Ray Data appends to the first one.
    """

    def __init__(self, text: str, cause: TesseraError | None) -> None:
        super().__init__(text, cause)
        self.cause = cause


class Telling:
    """A function of blocks whose errors come back whole.

    Args:
        work: gives one block or several for each.
    """

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        try:
            made = self.work(block)
            yield from [made] if isinstance(made, pa.Table) else made
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise WorkerError(text, user_error(error)) from error


class TellingActor:
    """The same for a class of such functions, of which each actor makes one.

    It is made for the first block, not with the actor, so that an error in its making is an error
    of the work.

    Args:
        make: the class.
        arguments: the class' own.
    """

    def __init__(self, make: Callable[..., Work], *arguments: object) -> None:
        self._make = partial(make, *arguments)

    @cached_property
    def _work(self) -> Work:
        return self._make()

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        return Telling(lambda given: self._work(given))(block)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """What workers, or this process on a full disk, raise in the block is raised as the
    TesseraError that a user can correct, if there is one.

    Raises:
        TesseraError: see above.
    """
    try:
        yield
    except (RayError, OSError) as error:
        told = user_error(error)
        if told is None:
            raise
        raise told from error
