"""Steps: pure functions of their inputs' digests and their settings, done once.

A step's key is the sha256 of its name, its settings and its inputs' digests; its results lie in
HOME/steps/NAME-KEY. A finished step left a DONE.json and is skipped; an interrupted one is run
again in the same directory, where a training finds its checkpoints and goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import ResourceError
from pipeline.progress import OnProgress, Progress
from pipeline.tracking import RunHandle, RunLogger, Tracker

DONE = "DONE.json"


class Reporter(Protocol):
    """Who tells the user what is going on."""

    def started(self, step: str) -> None: ...

    def progress(self, step: str, progress: Progress) -> None: ...

    def finished(self, step: str, seconds: float, *, skipped: bool) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """A finished step.

    Attributes:
        path: its directory.
        digest: its key, which stands for its content since a step is a pure function.
        values: what it returned, JSON.
        seconds: how long it worked; 0 when it was skipped.
    """

    name: str
    path: Path
    digest: str
    values: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class StepContext:
    """What a step's work is given.

    Attributes:
        path: its own directory, which may hold what an interrupted attempt left.
        run: its MLflow run.
        on_progress: where to tell how far it is.
    """

    path: Path
    run: RunHandle
    on_progress: OnProgress


Work = Callable[[StepContext], dict[str, Any]]


class Workspace:
    """The steps of one home directory, run under one parent run."""

    def __init__(self, home: Path, tracker: Tracker, parent: RunHandle, reporter: Reporter) -> None:
        self.home, self.tracker, self.parent, self.reporter = home, tracker, parent, reporter
        self.seconds: dict[str, float] = {}  # by step, of this run; 0 if skipped
        self.cost: dict[str, float] = {}  # by step, whenever it was done

    def run(
        self, name: str, work: Work, *, settings: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> StepResult:
        """Do `work`, or skip it if the same was done before.

        Args:
            name: the step's name, also its MLflow run's.
            work: returns JSON values; numbers among them become metrics.
            settings: all that the result depends on beside the inputs, JSON.
            inputs: digests by name.
        """
        key = step_key(name, settings, inputs)
        path = self.home / "steps" / f"{name}-{key[:12]}"
        done = path / DONE
        if done.is_file():
            record = json.loads(done.read_text())
            self.cost[name] = record["seconds"]
            self._finish(name, 0.0, skipped=True)
            return StepResult(name, path, key, record["values"], 0.0)
        path.mkdir(parents=True, exist_ok=True)
        self.reporter.started(name)
        began = time.monotonic()
        with self.tracker.run(name, parent=self.parent, resume=_previous_run(path)) as handle:
            (path / "run.json").write_text(json.dumps({"run_id": handle.run_id}))
            logger = RunLogger(handle)
            logger.params(_flat({"settings": settings, "inputs": inputs}))
            logger.close()  # the step's workers write meanwhile
            report = lambda progress: self.reporter.progress(name, progress)  # noqa: E731
            values = work(StepContext(path, handle, report))
            seconds = time.monotonic() - began
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            logger.metrics(numbers | {"seconds": seconds})
            logger.close()
        record = {"key": key, "seconds": seconds, "values": values}
        staging = done.with_suffix(".partial")
        staging.write_text(json.dumps(record, indent=2))
        staging.rename(done)
        self.cost[name] = seconds
        self._finish(name, seconds, skipped=False)
        return StepResult(name, path, key, values, seconds)

    def _finish(self, name: str, seconds: float, *, skipped: bool) -> None:
        self.seconds[name] = seconds
        self.reporter.finished(name, seconds, skipped=skipped)


def step_key(name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 of everything a step's result depends on."""
    text = json.dumps([name, settings, dict(inputs)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def exclusive(home: Path) -> Iterator[None]:
    """One chain at a time in a home directory; the lock dies with its process.

    Raises:
        ResourceError: another process holds it.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise ResourceError(
                f"another run (process {holder}) is using {home}: wait for it, or choose another "
                "directory with --home"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _previous_run(path: Path) -> str | None:
    record = path / "run.json"
    return json.loads(record.read_text())["run_id"] if record.is_file() else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
