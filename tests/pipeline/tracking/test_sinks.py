"""TensorBoard and Weights & Biases (offline) get what MLflow gets."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config import load_recipe
from pipeline.errors import MissingExtraError, RecipeError
from pipeline.tracking.runs import RunHandle, RunLogger, Tracker


def write(handle: RunHandle) -> None:
    """As a step does: the driver, then a worker, then the driver again."""
    with RunLogger(handle) as driver:
        driver.params({"learning_rate": 0.5})
    with RunLogger(handle) as worker:
        worker.metrics({"train_loss": 3.0}, step=10)
        worker.metrics({"train_loss": 2.0}, step=20)
        worker.image("samples", Image.new("RGB", (8, 8), "red"), step=20)
    with RunLogger(handle) as driver:
        driver.metrics({"seconds": 7.0})


def leveldb_records(log: bytes, *, header: int = 7, block: int = 32_768) -> Iterator[bytes]:
    """Records of a LevelDB log behind a header of the application's: what wandb writes offline."""
    at, parts = header, b""
    while at < len(log):
        if block - at % block < 7:  # no room for a record's head: zeros
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_tensorboard_gets_what_mlflow_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(tmp_path, ["tensorboard"])
    with tracker.run("generator") as handle:
        write(handle)
    [folder] = (tmp_path / "tensorboard").iterdir()
    assert folder.name == f"generator-{handle.run_id[:8]}"
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(10, 3.0), (20, 2.0)]
    history = tracker.client.get_metric_history(handle.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(10, 3.0), (20, 2.0)]
    assert [e.value for e in events.Scalars("seconds")] == [7.0]
    assert [e.step for e in events.Images("samples")] == [20]
    assert "parameters/text_summary" in events.Tags()["tensors"]


def test_weights_and_biases_gets_them_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tmp_path, ["wandb"])
    with tracker.run("generator") as handle:
        write(handle)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files and all(handle.run_id in file.name for file in files)
    losses, configured = [], False
    for file in files:
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "train_loss" in items:
                losses.append((int(items["step"]), float(items["train_loss"])))
            configured |= "learning_rate" in str(record.config) + str(record.run.config)
    assert losses == [(10, 3.0), (20, 2.0)] and configured


def test_a_missing_extra_is_named_before_anything_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tessera\[wandb\]'"):
        Tracker(tmp_path / "home", ["wandb"])
    assert not (tmp_path / "home").exists()


def test_an_unknown_sink_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"sinks.*'comet'.*'tensorboard' or 'wandb'"):
        load_recipe("smoke", ["tracking.sinks=[comet]"], environment={})
