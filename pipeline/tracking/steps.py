"""Steps: pure functions of their settings and their inputs' contents, each done once.

A chain is a table of `Step`s. A step's key is the sha256 of its name, its version, its settings and
its inputs' digests; its results lie in HOME/steps/NAME-KEY, of the key the first 12 digits. A
finished step left a DONE.json and is skipped; an interrupted one is run again in the same
directory, where a training finds its checkpoints and goes on.

    table = {step.name: step for step in (preprocess, tokenizer, tokens)}
    results = workspace.run(table, "tokens")      # and what it needs

Settings at their defaults stay out of a key (`step_settings`): a new setting whose default is what
was done before leaves finished work finished. When a default or a step's work changes what comes
out, the step's `version` is raised, and its work is done anew everywhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.artifacts import bundle_digest, publishing
from pipeline.config.section import Config
from pipeline.errors import BundleError, ResourceError
from pipeline.progress import OnProgress, Progress
from pipeline.tracking.runs import RunHandle, RunLogger, Tracker

DONE = "DONE.json"
AT_WORK = ".lock"
"""In the directory of a step, locked by the process that works on it, whose id it holds."""
BUNDLE = "bundle"
"""The directory inside a step's own that holds the model it made."""


class Reporter(Protocol):
    """Tells the user what is going on."""

    def started(self, step: str) -> None: ...

    def progress(self, step: str, progress: Progress) -> None: ...

    def finished(self, step: str, seconds: float, *, skipped: bool) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """A finished step.

    Attributes:
        path: its directory.
        digest: names its content: the digest of the model it made, else its key.
        values: what its work returned, JSON.
        seconds: how long the work took, whenever it was done; of a step that was interrupted, the
            last attempt alone.
    """

    name: str
    path: Path
    digest: str
    values: dict[str, Any]
    seconds: float

    @property
    def bundle(self) -> Path:
        """The directory of the model that it made."""
        return self.path / BUNDLE


Results = Mapping[str, StepResult]
"""Finished steps by name."""


@dataclass(frozen=True)
class StepContext:
    """What a step's work is given.

    Attributes:
        path: its own directory, which may hold what an interrupted attempt left.
        run: its MLflow run.
        on_progress: where to tell how far it is.
        results: of the steps that it needs.
        seconds: that each step so far took, whenever it was done.
    """

    path: Path
    run: RunHandle
    on_progress: OnProgress
    results: Results
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Step:
    """One row of a chain's table.

    Attributes:
        name: also its MLflow run's.
        work: does it in the context's directory and returns JSON values; the numbers among them
            become metrics of its run.
        settings: what the result depends on beside its inputs, as JSON (`step_settings`).
        needs: the steps whose results are its inputs.
        inputs: digests by name of inputs that no step makes.
        version: raised when the same settings and inputs give another result than before.
        accept: raises TesseraError for a result that is not good enough, also for one that was
            made before.
    """

    name: str
    work: Callable[[StepContext], dict[str, Any]]
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    version: int = 1
    accept: Callable[[StepResult], None] | None = None

    def all_inputs(self, results: Results) -> dict[str, str]:
        """Digests by name of everything that goes in."""
        return {**self.inputs, **{name: results[name].digest for name in self.needs}}

    def key(self, results: Results) -> str:
        """The sha256 of everything that the result depends on."""
        parts = [self.name, self.version, self.settings, self.all_inputs(results)]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, home: Path, results: Results) -> Path:
        """The directory of its results."""
        return home / "steps" / f"{self.name}-{self.key(results)[:12]}"

    def finished(self, home: Path, results: Results) -> StepResult | None:
        """What it left when it was done before with these settings and inputs; None if it was
        not."""
        path = self.path(home, results)
        record = _record(path / DONE)
        if record is None:
            return None
        try:
            result = self._result(path, results, record["values"], record["seconds"])
        except BundleError:  # its model was removed
            return None
        return result if record.get("bundle") in (None, result.digest) else None

    def _result(
        self, path: Path, results: Results, values: dict[str, Any], seconds: float
    ) -> StepResult:
        made = path / BUNDLE
        digest = bundle_digest(made) if made.is_dir() else self.key(results)
        return StepResult(self.name, path, digest, values, seconds)


def step_settings(config: Config, **options: Any) -> dict[str, Any]:
    """A section as it enters a step's key: JSON, what is at its default left out.

    Args:
        options: of pydantic's `model_dump`, for example `exclude`.
    """
    return config.model_dump(mode="json", exclude_defaults=True, **options)


class Workspace:
    """The steps of one home directory, run under one parent run.

    Args:
        start: entered before the first step that has work to do (it starts Ray), left by `close`.

    Attributes:
        seconds: by step, of this run; 0 for steps that were done before.
        cost: by step, whenever it was done.
    """

    def __init__(
        self,
        home: Path,
        tracker: Tracker,
        parent: RunHandle,
        reporter: Reporter,
        start: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.home, self.tracker, self.parent, self.reporter = home, tracker, parent, reporter
        self.seconds: dict[str, float] = {}
        self.cost: dict[str, float] = {}
        self._start, self._running = start, contextlib.ExitStack()
        self._has_started = False
        self._results: dict[str, StepResult] = {}

    def run(self, table: Mapping[str, Step], *targets: str) -> dict[str, StepResult]:
        """Do the target steps and those they need, in the table's order; what was done before is
        skipped.

        Returns:
            All results so far, by step.
        """
        for name in in_order(table, targets):
            if name not in self._results:
                self._results[name] = self._run(table[name])
        return dict(self._results)

    def close(self) -> None:
        """Leave what `start` entered."""
        self._running.close()

    def _run(self, step: Step) -> StepResult:
        result = step.finished(self.home, self._results)
        skipped = result is not None
        if result is None:
            result = self._work(step)
        self.cost[step.name] = result.seconds
        self.seconds[step.name] = 0.0 if skipped else result.seconds
        self.reporter.finished(step.name, self.seconds[step.name], skipped=skipped)
        if step.accept is not None:
            step.accept(result)
        return result

    def _work(self, step: Step) -> StepResult:
        if not self._has_started:
            self._running.enter_context(self._start())
            self._has_started = True
        path = step.path(self.home, self._results)
        path.mkdir(parents=True, exist_ok=True)
        self.reporter.started(step.name)
        with _at_work(path):
            return self._do(step, path)

    def _do(self, step: Step, path: Path) -> StepResult:
        began = time.monotonic()
        inputs = step.all_inputs(self._results)
        with self.tracker.run(step.name, parent=self.parent, folder=path) as handle:
            logger = RunLogger(handle)
            logger.params(flat({"settings": step.settings, "inputs": inputs}))
            logger.close()  # the step's workers write meanwhile
            report = lambda progress: self.reporter.progress(step.name, progress)  # noqa: E731
            needed = {name: self._results[name] for name in step.needs}
            values = step.work(StepContext(path, handle, report, needed, dict(self.cost)))
            seconds = time.monotonic() - began
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            logger.metrics(numbers | {"seconds": seconds})
            logger.close()
        result = step._result(path, self._results, values, seconds)
        record = {
            "key": step.key(self._results), "seconds": seconds, "values": values,
            "version": step.version, "settings": step.settings, "inputs": inputs,
            "bundle": result.digest if result.bundle.is_dir() else None,
        }  # fmt: skip
        with publishing(path / DONE) as file:
            file.write_text(json.dumps(record, indent=2))
        return result


def in_order(table: Mapping[str, Step], targets: Iterable[str]) -> list[str]:
    """The targets and all that they need, in the table's order."""
    wanted: set[str] = set()
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += table[name].needs
    return [name for name in table if name in wanted]


@dataclass(frozen=True)
class StepStatus:
    """Whether a step is done, and why not.

    Attributes:
        why: one phrase.
        path: of its results; None while inputs of it are still to be made, by which it is named.
        inputs: digests by name of the inputs that are known.
    """

    name: str
    state: Literal["done", "to do"]
    why: str
    path: Path | None
    inputs: Mapping[str, str]


def statuses(
    table: Mapping[str, Step], targets: Iterable[str], home: Path
) -> tuple[list[StepStatus], dict[str, StepResult]]:
    """What `Workspace.run` would do, without doing anything.

    Returns:
        The statuses in the table's order, and the results of the steps that are done.
    """
    results: dict[str, StepResult] = {}
    found = []
    for name in in_order(table, targets):
        status, result = _status(table[name], results, home)
        found.append(status)
        if result is not None:
            results[name] = result
    return found, results


def _status(step: Step, results: Results, home: Path) -> tuple[StepStatus, StepResult | None]:
    """A step's status, and its result if it is done."""
    missing = [name for name in step.needs if name not in results]
    if missing:
        why = f"needs {', '.join(missing)}"
        known = {name: results[name].digest for name in step.needs if name in results}
        return StepStatus(step.name, "to do", why, None, {**step.inputs, **known}), None
    path, inputs = step.path(home, results), step.all_inputs(results)
    if result := step.finished(home, results):
        return StepStatus(step.name, "done", f"in {result.seconds:.0f} s", path, inputs), result
    if process := _worker(path):
        why = f"is running in process {process}"
    elif (path / DONE).is_file():
        why = "was done, but its result was removed or altered"
    else:
        why = "was interrupted and goes on" if path.is_dir() else _changes(step, inputs, home)
    return StepStatus(step.name, "to do", why, path, inputs), None


def _worker(path: Path) -> str | None:
    """The process that works on a step now; None if none does."""
    with contextlib.suppress(FileNotFoundError), (path / AT_WORK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read() or "unknown"
    return None


@contextlib.contextmanager
def _at_work(path: Path) -> Iterator[None]:
    """Mark a step as being worked on by this process, for as long as it lives."""
    with (path / AT_WORK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
        (path / AT_WORK).unlink()


def _record(file: Path) -> dict[str, Any] | None:
    """What a finished step left; None if there is nothing, or nothing that can be read."""
    try:
        record = json.loads(file.read_text())
        return record if record["values"] is not None and record["seconds"] >= 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _changes(step: Step, inputs: Mapping[str, str], home: Path) -> str:
    """What differs from the latest time that the step was done in this home."""
    records = sorted(
        (home / "steps").glob(f"{step.name}-{'[0-9a-f]' * 12}/{DONE}"),
        key=lambda file: file.stat().st_mtime,
    )
    if not records:
        return "was never done"
    record = _record(records[-1])
    if record is None or "settings" not in record:  # versions of Tessera with other keys left none
        return "was done by an earlier version of Tessera"
    before = flat({"settings": record["settings"], "input": record["inputs"]})
    now = flat({"settings": json.loads(json.dumps(step.settings)), "input": inputs})
    changed = [
        f"{name.removeprefix('settings.')} {_change(name, before, now)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if record["version"] != step.version:
        changed.insert(0, f"version {record['version']} -> {step.version}")
    return "changed: " + ", ".join(changed)


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name.startswith("input."):
        return "is another"
    return f"{before.get(name, 'default')} -> {now.get(name, 'default')}"


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


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
