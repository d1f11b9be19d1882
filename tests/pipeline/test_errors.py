"""What a user can correct is found, however Ray wraps it and wherever it was raised."""

from __future__ import annotations

import errno
import pickle

import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from pipeline.errors import (
    DataError,
    MissingExtraError,
    RequestError,
    ResourceError,
    TesseraError,
    user_error,
)


def in_a_task(cause: Exception) -> RayTaskError:
    """What Ray raises here for an error in a task."""
    return RayTaskError("task", "Traceback ...", cause).as_instanceof_cause()


def raised_from(cause: BaseException) -> RuntimeError:
    error = RuntimeError("something failed")
    error.__cause__ = cause
    return error


DAMAGED = DataError("shard 3 is damaged")


@pytest.mark.parametrize(
    "error",
    [
        DAMAGED,
        in_a_task(DAMAGED),
        raised_from(in_a_task(DAMAGED)),
        in_a_task(raised_from(DAMAGED)),
        WorkerGroupError("failed", {0: RuntimeError("stopped"), 1: in_a_task(DAMAGED)}),
    ],
)
def test_the_error_of_a_worker_is_found(error: Exception) -> None:
    found = user_error(error)
    assert type(found) is DataError and str(found) == "shard 3 is damaged"


def test_a_full_disk_is_told_and_other_errors_are_not_the_users() -> None:
    full = user_error(in_a_task(OSError(errno.ENOSPC, "full")))
    assert isinstance(full, ResourceError) and "no space" in str(full)
    assert user_error(in_a_task(OSError(errno.EIO, "broken"))) is None
    assert user_error(raised_from(KeyError("x"))) is None


@pytest.mark.parametrize(
    "error",
    [
        ResourceError("too small"),
        MissingExtraError("LoRA", "lora"),
        RequestError("seed=-1 is below 0", param="seed"),
    ],
)
def test_errors_survive_the_way_from_a_worker(error: TesseraError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)
