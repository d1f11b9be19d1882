"""Steps: done once, in order, again when an input, a setting or the version changes, and why."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import AugmentConfig, EncodeConfig, GeneratorConfig
from pipeline.errors import DataError
from pipeline.progress import Progress
from pipeline.tracking.runs import RunLogger, Tracker, curves
from pipeline.tracking.steps import (
    DONE,
    Step,
    StepContext,
    StepResult,
    Workspace,
    in_order,
    statuses,
    step_settings,
)


class Silent:
    """A reporter that keeps what was skipped."""

    def __init__(self) -> None:
        self.skipped: dict[str, bool] = {}

    def started(self, step: str) -> None:
        pass

    def progress(self, step: str, progress: Progress) -> None:
        pass

    def finished(self, step: str, seconds: float, *, skipped: bool) -> None:
        self.skipped[step] = skipped


def table(shift: int = 1, **changes: Any) -> dict[str, Step]:
    """Two steps: numbers, and their sum moved by a setting."""

    def numbers(context: StepContext) -> dict[str, Any]:
        (context.path / "numbers.json").write_text("[1, 2]")
        return {"count": 2}

    def total(context: StepContext) -> dict[str, Any]:
        found = json.loads((context.results["numbers"].path / "numbers.json").read_text())
        return {"total": sum(found) + shift}

    steps = [
        Step("numbers", numbers, settings={}, inputs={"source": "abc"}),
        Step("total", total, settings={"shift": shift}, needs=("numbers",)),
    ]
    return {step.name: replace(step, **changes.get(step.name, {})) for step in steps}


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """A real MLflow database, which the tests' homes share."""
    return Tracker(tmp_path_factory.mktemp("tracker"))


@pytest.fixture
def run(tracker: Tracker, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Runs a table to a target: (results, what was skipped, how often Ray would have started)."""
    with tracker.run("test") as parent:

        def run(steps: dict[str, Step], target: str = "total") -> Any:
            starts: list[int] = []

            @contextlib.contextmanager
            def start() -> Iterator[None]:
                starts.append(1)
                yield

            reporter = Silent()
            workspace = Workspace(tmp_path, tracker, parent, reporter, start)
            try:
                return workspace.run(steps, target), reporter.skipped, len(starts)
            finally:
                workspace.close()

        yield run


def why(steps: dict[str, Step], home: Path) -> dict[str, str]:
    return {status.name: status.why for status in statuses(steps, ["total"], home)[0]}


def test_what_was_done_is_skipped_and_nothing_is_started(run: Callable[..., Any]) -> None:
    results, skipped, starts = run(table())
    assert results["total"].values == {"total": 4} and starts == 1
    assert skipped == {"numbers": False, "total": False}
    again, skipped, starts = run(table())
    assert again["total"].values == {"total": 4} and starts == 0
    assert skipped == {"numbers": True, "total": True}


def test_a_status_says_what_changed(run: Callable[..., Any], tmp_path: Path) -> None:
    assert why(table(), tmp_path) == {"numbers": "was never done", "total": "needs numbers"}
    run(table())
    assert all(said.startswith("in ") for said in why(table(), tmp_path).values())
    assert why(table(shift=2), tmp_path)["total"] == "changed: shift 1 -> 2"
    other = table(numbers={"inputs": {"source": "def"}})
    assert why(other, tmp_path)["numbers"] == "changed: input.source is another"
    newer = table(total={"version": 2})
    assert why(newer, tmp_path)["total"] == "changed: version 1 -> 2"
    (interrupted := table(shift=3))["total"]
    results = statuses(interrupted, ["total"], tmp_path)[1]
    interrupted["total"].path(tmp_path, results).mkdir()
    assert why(interrupted, tmp_path)["total"] == "was interrupted and goes on"


def test_a_step_that_is_worked_on_is_running(run: Callable[..., Any], tmp_path: Path) -> None:
    seen = []

    def total(context: StepContext) -> dict[str, Any]:
        seen.append(why(steps, tmp_path)["total"])
        if len(seen) == 1:
            raise DataError("it ends early")
        return {"total": 1}

    steps = table(total={"work": total})
    with pytest.raises(DataError):
        run(steps)
    assert why(steps, tmp_path)["total"] == "was interrupted and goes on"
    run(steps)
    assert seen == [f"is running in process {os.getpid()}"] * 2
    assert why(steps, tmp_path)["total"].startswith("in ")


def test_records_of_an_earlier_version_are_no_mistake(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    results, _, _ = run(table())
    record = results["total"].path / DONE
    record.write_text(json.dumps({"key": "old", "seconds": 1.0, "values": {}}))
    assert "earlier version" in why(table(shift=2), tmp_path)["total"]


def test_a_result_that_is_not_good_enough_is_refused_each_time(run: Callable[..., Any]) -> None:
    def accept(result: StepResult) -> None:
        raise DataError(f"{result.values['count']} is too few")

    picky = table(numbers={"accept": accept})
    for _ in range(2):
        with pytest.raises(DataError, match="2 is too few"):
            run(picky)


def test_only_what_a_target_needs_is_in_order() -> None:
    assert in_order(table(), ["numbers"]) == ["numbers"]
    assert in_order(table(), ["total"]) == ["numbers", "total"]


def test_settings_at_their_defaults_stay_out_of_keys() -> None:
    assert step_settings(EncodeConfig()) == {}
    in_place = EncodeConfig(num_views=2, augment=AugmentConfig(shift=2, flip=0.0))
    assert step_settings(in_place) == {"num_views": 2}, "the default of its place"
    elsewhere = EncodeConfig(num_views=2, augment=AugmentConfig())
    assert step_settings(elsewhere) != step_settings(in_place)
    stated = GeneratorConfig.model_validate({"gan": {}, "causal": {"top_k": 5}})
    assert step_settings(stated.completed()) == step_settings(GeneratorConfig().completed())


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"values": null, "seconds": null}'])
def test_a_damaged_record_is_work_to_do(run: Callable[..., Any], tmp_path: Path, text: str) -> None:
    results, _, _ = run(table())
    (results["numbers"].path / DONE).write_text(text)
    assert "removed or altered" in why(table(), tmp_path)["numbers"]
    _, skipped, _ = run(table())
    assert skipped == {"numbers": False, "total": True}


def test_a_model_that_was_removed_or_altered_is_made_again(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    def train(context: StepContext) -> dict[str, Any]:
        (context.path / "bundle").mkdir(exist_ok=True)
        (context.path / "bundle" / "config.json").write_text("{}")
        return {}

    steps = {"total": Step("total", train, settings={})}
    results, _, _ = run(steps)
    config = results["total"].bundle / "config.json"
    for damage in (lambda: config.write_text("{ }"), lambda: config.unlink()):
        assert run(steps)[1] == {"total": True}
        damage()
        assert "removed or altered" in why(steps, tmp_path)["total"]
        assert run(steps)[1] == {"total": False}


def test_curves_are_a_runs_metrics_over_its_steps(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    with tracker.run("train") as run:
        logger = RunLogger(run)
        for step, loss in ((20, 2.0), (10, 3.0), (20, 1.0)):  # step 20 again, after an interruption
            logger.metrics({"train_loss": loss, "images_per_s": 5.0}, step=step)
        logger.metrics({"train_loss": 1.0})
    found = curves(tracker.uri, run.run_id, "train_", "validation_")
    assert found == {"train_loss": [(10, 3.0), (20, 1.0)]}
    assert curves(tracker.uri, "gone", "train_") == curves(tracker.uri, None, "train_") == {}
