"""Runs in real MLflow on sqlite: how they end, nest and continue."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ResourceError
from pipeline.tracking.runs import PARENT, RunHandle, RunLogger, Tracker, connect, recorded_run


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker(tmp_path)


def status(tracker: Tracker, handle: RunHandle) -> str:
    found: str = tracker.client.get_run(handle.run_id).info.status
    return found


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "FINISHED"),
        (ValueError, "FAILED"),
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),
    ],
)
def test_a_run_ends_as_its_block_does(
    tracker: Tracker, error: type[BaseException] | None, expected: str
) -> None:
    if error is None:
        with tracker.run("step") as handle:
            assert status(tracker, handle) == "RUNNING"
    else:
        with pytest.raises(error), tracker.run("step") as handle:
            raise error
    assert status(tracker, handle) == expected


def test_a_step_is_nested_in_its_retrain(tracker: Tracker) -> None:
    with tracker.run("retrain") as parent, tracker.run("step", parent=parent) as handle:
        assert tracker.client.get_run(handle.run_id).data.tags[PARENT] == parent.run_id


def test_an_interrupted_run_continues(tracker: Tracker, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    assert recorded_run(folder) is None
    with pytest.raises(KeyboardInterrupt), tracker.run("step", folder=folder) as first:
        RunLogger(first).params({"learning_rate": 0.1})
        raise KeyboardInterrupt
    assert recorded_run(folder) == first.run_id
    with tracker.run("step", folder=folder) as again:
        assert again.run_id == first.run_id and status(tracker, again) == "RUNNING"
        RunLogger(again).params({"learning_rate": 0.2, "batch_size": 8})
        params = tracker.client.get_run(first.run_id).data.params
        assert params == {"learning_rate": "0.1", "batch_size": "8"}
    assert status(tracker, first) == "FINISHED"


def test_a_run_that_is_gone_begins_anew(tracker: Tracker, tmp_path: Path) -> None:
    with tracker.run("step", folder=tmp_path / "step") as first:
        pass
    another_server = Tracker(tmp_path / "another")
    with another_server.run("step", folder=tmp_path / "step") as second:
        assert second.run_id != first.run_id
    assert recorded_run(tmp_path / "step") == second.run_id


def test_a_logger_without_a_run_does_nothing() -> None:
    with RunLogger(None) as logger:
        logger.params({"a": 1})
        logger.metrics({"loss": 1.0})
        logger.tags({"a": "b"})


def test_a_server_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ResourceError, match=r"no MLflow at http://127\.0\.0\.1:9.*Start"):
        connect(tmp_path)


@pytest.mark.parametrize(
    "uri",
    [
        "nowhere",
        "foo://bar",
        "postgresql://nobody@127.0.0.1:1/mlflow",
        "sqlite:////proc/self/status",
    ],
)
def test_an_address_that_is_none_is_named(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ResourceError, match=f"no MLflow at {uri}: .* set MLFLOW_TRACKING_URI to"):
        connect(tmp_path)


def test_a_damaged_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = tmp_path / "mlflow.db"
    database.write_text("no database, and longer than the header of one is" * 9)
    with pytest.raises(ResourceError, match=f"{database}, cannot be used: .*move it away"):
        connect(tmp_path)


def test_an_experiment_that_was_deleted_is_restored(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    with first.run("one") as one:
        pass
    first.client.delete_experiment(first.experiment_id)
    again = Tracker(tmp_path)
    with again.run("two") as two:
        pass
    runs = again.client.search_runs([again.experiment_id])
    assert {run.info.run_id for run in runs} == {one.run_id, two.run_id}


def test_runs_of_a_process_that_died_are_ended_and_no_others(tmp_path: Path) -> None:
    here = Tracker(tmp_path)
    dead = [here._create("parent", None), here._create("step", None)]
    elsewhere = Tracker(tmp_path)
    elsewhere.home = tmp_path / "other"
    alive = elsewhere._create("alive", None)
    assert here.end_abandoned() == 2 and here.end_abandoned() == 0
    status = {run: here.client.get_run(run).info.status for run in (*dead, alive)}
    assert status == {**dict.fromkeys(dead, "KILLED"), alive: "RUNNING"}
