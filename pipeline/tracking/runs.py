"""Runs: what was tried, with settings, metrics and images, recorded in MLflow.

The tracking URI is MLFLOW_TRACKING_URI, or a sqlite database under the home directory. One parent
run per retrain, one nested run per step; runs are created on the driver and workers write to them
by id, so a restarted worker goes on in the same run. Optional sinks (pipeline/tracking/sinks.py)
are told what MLflow is told of a run. Which model is the champion is for
pipeline/bundles/registry.py.

    tracker = Tracker(home)
    with tracker.run("train") as handle, RunLogger(handle) as logger:
        logger.metrics({"loss": 0.5}, step=10)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

from pipeline.artifacts import publishing
from pipeline.errors import ResourceError
from pipeline.tracking.sinks import Sink, SinkAddress, check_sinks, open_sinks

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

LOG = logging.getLogger(__name__)
EXPERIMENT = "tessera"
PARENT = "mlflow.parentRunId"
HOME = "tessera.home"
"""The tag that names the home directory which a run was begun for."""
MAX_RUNNING = 1_000
RUN_FILE = "run.json"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for what is not there, and for a name that nothing can have."""


def _mlflow() -> ModuleType:
    """MLflow, imported when it is first needed: that takes a second, and of many workers only one
    writes."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bundle is few files
    import mlflow.data.http_dataset_source
    import mlflow.data.meta_dataset

    return mlflow


@dataclass(frozen=True)
class RunHandle:
    """Where a run is recorded; small enough to send to any worker."""

    tracking_uri: str
    run_id: str
    sinks: SinkAddress | None = None


class RunLogger:
    """Writes parameters, metrics, images and files of one run; does nothing without a handle.

    Sinks are opened when they are first written to, and the process that opened them closes them
    (`close`, or the end of a with block), since only one process at a time may write to a run's
    sinks.
    """

    def __init__(self, handle: RunHandle | None) -> None:
        self.run_id = handle.run_id if handle else ""
        self.client = _mlflow().MlflowClient(handle.tracking_uri) if handle else None
        self._address = handle.sinks if handle else None
        self._open: list[Sink] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sinks; what is logged later opens them again."""
        for sink in self._open:
            sink.close()
        self._open = []

    def _sinks(self) -> list[Sink]:
        if not self._open:
            self._open = open_sinks(self._address)
        return self._open

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings. Those that an earlier, interrupted attempt logged stay as they are, since
        MLflow refuses to change a parameter."""
        if self.client is not None:
            known = self.client.get_run(self.run_id).data.params
            param = _mlflow().entities.Param
            fresh = [param(k, str(v)[:6000]) for k, v in values.items() if k not in known]
            self.client.log_batch(self.run_id, params=fresh)
        for sink in self._sinks():
            sink.params(values)

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Log numbers of a step."""
        if self.client is not None:
            now, metric = int(time.time() * 1000), _mlflow().entities.Metric
            batch = [metric(name, float(value), now, step) for name, value in values.items()]
            self.client.log_batch(self.run_id, metrics=batch)
        for sink in self._sinks():
            sink.metrics(values, step)

    def image(self, name: str, image: Image, *, step: int) -> None:
        """Log an image of a step, as the artifact NAME/STEP.png."""
        if self.client is not None:
            self.client.log_image(self.run_id, image, artifact_file=f"{name}/{step:07d}.png")
        for sink in self._sinks():
            sink.image(name, image, step)

    def files(self, path: Path, *, folder: str) -> None:
        """Log a file, or a directory's content, as artifacts under `folder`; sinks get none."""
        if self.client is not None:
            log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            log(self.run_id, str(path), folder)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run; sinks get none."""
        if self.client is not None:
            for name, value in values.items():
                self.client.set_tag(self.run_id, name, value)


class Tracker:
    """Begins and ends runs, on the driver.

    Args:
        home: where the database lies unless MLFLOW_TRACKING_URI names a server.
        sinks: keys of `sinks.SINKS`: where runs are recorded too.

    Raises:
        MissingExtraError: a sink's package is not installed.
        ResourceError: nothing answers at the tracking URI.
    """

    def __init__(self, home: Path, sinks: Sequence[str] = ()) -> None:
        check_sinks(sinks)
        self.home, self.sinks = home, tuple(sinks)
        self.uri = tracking_uri(home)
        self.client = connect(home)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            self.experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":  # MLflow finds it by name all the same
                LOG.warning("the MLflow experiment %s was deleted: it is restored", EXPERIMENT)
                self.client.restore_experiment(self.experiment_id)
        else:
            location = None if _is_remote(self.uri) else (home / "mlartifacts").absolute().as_uri()
            self.experiment_id = self.client.create_experiment(EXPERIMENT, location)

    @contextlib.contextmanager
    def run(
        self, name: str, *, parent: RunHandle | None = None, folder: Path | None = None
    ) -> Iterator[RunHandle]:
        """A run for the duration of the block. It ends as FINISHED, on an error as FAILED, and as
        KILLED on Ctrl-C and where the process is told to exit (`runtime.exit_on_sigterm`).

        Args:
            name: shown in MLflow.
            parent: the run this one is nested in.
            folder: remembers the run's id in RUN_FILE; a run that was interrupted there is
                continued, if it still exists.
        """
        known = recorded_run(folder) if folder is not None else None
        run_id = self._reopen(known) or self._create(name, parent)
        status = "FAILED"
        try:
            if folder is not None:
                with publishing(folder / RUN_FILE) as record:
                    record.write_text(json.dumps({"run_id": run_id}))
            yield RunHandle(self.uri, run_id, self._sinks_of(run_id, name, parent))
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            self.client.set_terminated(run_id, status)

    def end_abandoned(self) -> int:
        """End the runs of this home directory that still count as running as KILLED: those of a
        process that died without a word. Only for who holds the home directory's lock.

        Returns:
            How many there were.
        """
        home = str(self.home.absolute())
        abandoned = [
            run
            for run in self.client.search_runs(
                [self.experiment_id], "attributes.status = 'RUNNING'", max_results=MAX_RUNNING
            )
            if run.data.tags.get(HOME) == home
        ]
        for run in abandoned:
            self.client.set_terminated(run.info.run_id, "KILLED")
        if abandoned:
            LOG.warning("%d runs that were cut off before are ended as KILLED", len(abandoned))
        return len(abandoned)

    def _sinks_of(self, run_id: str, name: str, parent: RunHandle | None) -> SinkAddress | None:
        if not self.sinks:
            return None
        group = parent.run_id if parent else run_id
        return SinkAddress(self.sinks, str(self.home.absolute()), run_id, name, group)

    def _create(self, name: str, parent: RunHandle | None) -> str:
        tags = {HOME: str(self.home.absolute()), **({PARENT: parent.run_id} if parent else {})}
        run_id: str = self.client.create_run(
            self.experiment_id, run_name=name, tags=tags
        ).info.run_id
        return run_id

    def _reopen(self, run_id: str | None) -> str | None:
        if run_id is None:
            return None
        try:
            self.client.update_run(run_id, status="RUNNING")
        except _mlflow().MlflowException:  # another server, or a deleted run
            return None
        return run_id

    def log_dataset(self, handle: RunHandle, *, name: str, digest: str, uri: str) -> None:
        """Log which data a run saw, for MLflow's view of data sets.

        Args:
            digest: of the data; MLflow keeps 36 characters.
        """
        mlflow = _mlflow()
        source = mlflow.data.http_dataset_source.HTTPDatasetSource(uri)
        dataset = mlflow.data.meta_dataset.MetaDataset(source, name=name, digest=digest[:36])
        entity = mlflow.entities.DatasetInput(dataset._to_mlflow_entity(), [])
        self.client.log_inputs(handle.run_id, datasets=[entity])

    def log_decision(self, handle: RunHandle, record: Mapping[str, Any]) -> None:
        """Log a promotion's decision, its reasons and numbers, as decision.json."""
        text = json.dumps(record, indent=2, ensure_ascii=False)
        self.client.log_text(handle.run_id, text, "decision.json")


def recorded_run(folder: Path) -> str | None:
    """The id of the run that `Tracker.run` last began for a folder; None if it began none."""
    record = folder / RUN_FILE
    if not record.is_file():
        return None
    run_id: str = json.loads(record.read_text())["run_id"]
    return run_id


def curves(
    tracking_uri: str, run_id: str | None, *prefixes: str
) -> dict[str, list[tuple[float, float]]]:
    """The metrics of a run over its steps.

    Args:
        prefixes: of the metrics' names that are wanted.

    Returns:
        Points (step, value) in order by metric; a step that was logged again after an
        interruption has its last value, and step 0, where a run's results are, is left out. Empty
        if there is no such run.
    """
    mlflow = _mlflow()
    client = mlflow.MlflowClient(tracking_uri)
    try:
        names = client.get_run(run_id).data.metrics if run_id else {}
    except mlflow.MlflowException as error:
        if error.error_code in ABSENT:
            return {}
        raise
    return {
        name: sorted({m.step: m.value for m in points if m.step}.items())
        for name in sorted(names)
        if name.startswith(prefixes) and (points := client.get_metric_history(run_id, name))
    }


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database under `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').absolute()}"


def connect(home: Path) -> MlflowClient:
    """An MLflow client whose server has answered; a database gets its tables.

    Raises:
        ResourceError: nothing answers at the tracking URI, it is none, or the database is damaged.
    """
    uri = tracking_uri(home)
    home.mkdir(parents=True, exist_ok=True)
    mlflow = _mlflow()
    for library in ("alembic", "mlflow"):  # importing it sets levels of its own
        logging.getLogger(library).setLevel(logging.WARNING)
    from sqlalchemy.exc import SQLAlchemyError  # MLflow lets a database's own errors through

    try:
        client: MlflowClient = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (mlflow.MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise ResourceError(_unusable(uri, error)) from error
    return client


def _unusable(uri: str, error: Exception) -> str:
    """What is wrong with a tracking URI, and what to do."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return (
            f"the database of runs and models, {uri.removeprefix('sqlite:///')}, cannot be used: "
            f"{said}. Restore it, or move it away to begin with an empty one, which knows no "
            "champion and no earlier runs"
        )
    return (
        f"no MLflow at {uri}: {said}. Start the server, set MLFLOW_TRACKING_URI to one "
        "(http://HOST:PORT) or to a database (sqlite:////PATH/mlflow.db), or unset it to use a "
        "database under --home"
    )


def _is_remote(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))
