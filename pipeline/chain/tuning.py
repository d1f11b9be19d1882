"""Searching better settings for a recipe's generator: Ray Tune with ASHA over Ray Train.

    trials = draw_trials(plan)
    with opened(plan, reporter) as session:
        result = search(session, trials)

A trial is a Tune function that starts an ordinary training (loop.fit) with its own settings, under
an MLflow run nested in the search's. Every report of a trial is also kept in its directory. A
search that was interrupted and is started again gives those reports to the scheduler once more, so
that it decides as before, and the trainings continue from their checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from pipeline.artifacts import publishing
from pipeline.chain.idle import idle_settings
from pipeline.chain.plan import Candidate, Plan
from pipeline.chain.preflight import check_candidate
from pipeline.chain.table import generator_inputs, generator_task
from pipeline.chain.workflow import Session
from pipeline.config import Recipe, TuneConfig
from pipeline.config.overrides import stated
from pipeline.errors import RecipeError, ResourceError, TesseraError, TrainingError
from pipeline.progress import OnProgress, Progress
from pipeline.runtime import cluster_resources
from pipeline.tracking.runs import RunHandle, RunLogger, Tracker, recorded_run
from pipeline.tracking.steps import Step, StepContext, step_settings
from pipeline.training import loop
from pipeline.training.generator import GeneratorTask

METRIC = "validation_loss"
TRIAL_CPUS = 0.01  # a trial itself only waits for its training
REPORTS, FAILURE, ENDED = "reports.jsonl", "failure.txt", "ended"


@dataclass(frozen=True)
class Trial:
    """One combination of settings, by dotted key, and the generator to train with them."""

    number: int
    settings: dict[str, Any]
    candidate: Candidate

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"


def draw_trials(plan: Plan) -> list[Trial]:
    """All trials of a plan's search, each checked as if it were a recipe of its own.

    Raises:
        RecipeError: there is nothing to search, or a combination cannot be trained.
    """
    recipe = plan.recipe
    if recipe.tune is None:
        raise RecipeError(
            f"recipe {recipe.name} has no section `tune`: say what to search, for example "
            "tune: {space: {generator.train.learning_rate: {loguniform: [1.0e-4, 3.0e-3]}}}"
        )
    check_effects(recipe)
    trials = []
    for number, settings in enumerate(recipe.tune.draws()):
        try:
            candidate = plan.candidate(recipe.with_settings(settings).generator)
            check_candidate(candidate)
        except TesseraError as error:
            raise RecipeError(f"tune.space allows {settings}, but {error}") from error
        trials.append(Trial(number, settings, candidate))
    return trials


def check_effects(recipe: Recipe) -> None:
    """Refuse a search over a setting without effect.

    Raises:
        RecipeError: all trials of that setting would be alike.
    """
    assert recipe.tune is not None
    space = recipe.tune.space
    for key, values in space.items():
        made = recipe.with_settings({key: values.ends[0]})
        for idle in idle_settings(made):
            searched = any(key == name or key.startswith(f"{name}.") for name in idle.keys)
            if searched and idle.decided_by not in space:
                raise RecipeError(f"tune.space: {key!r} is without effect {idle.reason}")


def check_room(config: TuneConfig, trials: Sequence[Trial]) -> None:
    """Refuse a search whose trials would wait forever for each other's CPUs or GPUs.

    Raises:
        ResourceError: the cluster has no room for `max_concurrent` trainings at once.
    """
    resources = cluster_resources()
    workers = [loop.scaling_for(t.candidate.config.train.num_workers, resources) for t in trials]
    for kind in ("CPU", "GPU"):
        each = max(w.total_resources.get(kind, 0) for w in workers)
        have = resources.get(kind, 0) - (config.max_concurrent * TRIAL_CPUS) * (kind == "CPU")
        if each * config.max_concurrent > have:
            raise ResourceError(
                f"tune.max_concurrent={config.max_concurrent} trainings need "
                f"{each * config.max_concurrent:g} of Ray's {kind}s and the cluster has "
                f"{resources.get(kind, 0):g}: lower it or generator.train.num_workers"
            )


def search(session: Session, trials: Sequence[Trial]) -> dict[str, Any]:
    """Train the trials as a step of the chain.

    Returns:
        "path" of the best recipe, "settings" and `METRIC` of the best trial, all "trials", best
        first.

    Raises:
        TrainingError: not one trial came to an end.
        ResourceError: the cluster is too small.
    """
    plan, recipe = session.plan, session.plan.recipe
    assert recipe.tune is not None
    needs, inputs = generator_inputs(plan, trials[0].candidate)
    step = Step(
        "tune",
        partial(_search, session, trials),
        settings={
            "tune": step_settings(recipe.tune),
            "generator": step_settings(recipe.generator.completed()),
        },
        needs=needs,
        inputs=inputs,
    )
    result = session.workspace.run({**session.table, step.name: step}, step.name)[step.name]
    # Written anew each time: settings that are not searched may have changed since the search.
    path = result.path / "best.yaml"
    write_recipe(recipe.with_settings(result.values["settings"]), path)
    return {"path": str(path), **result.values}


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe's stated settings as YAML that `load_recipe` reads."""
    text = yaml.safe_dump(stated(recipe), sort_keys=False, allow_unicode=True)
    with publishing(path) as new:
        new.write_text(text, encoding="utf-8")


def _search(session: Session, trials: Sequence[Trial], context: StepContext) -> dict[str, Any]:
    plan, recipe = session.plan, session.plan.recipe
    config, budget = recipe.tune, recipe.generator.train.max_steps
    assert config is not None
    check_room(config, trials)
    tasks = [generator_task(plan, trial.candidate, context.results) for trial in trials]
    folders = [context.path / "trials" / trial.name for trial in trials]
    jobs = [
        _Job(trial.name, trial.settings, task, folder, plan.home, context.run)
        for trial, task, folder in zip(trials, tasks, folders, strict=True)
    ]
    scheduler = ASHAScheduler(
        time_attr="step",
        max_t=budget,
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
        stop_last_trials=False,  # at its last step a training ends by itself
    )
    with _quiet_tune():
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, jobs=jobs), {"CPU": TRIAL_CPUS}),
            param_space={"number": tune.grid_search([trial.number for trial in trials])},
            tune_config=tune.TuneConfig(
                metric=METRIC, mode="min", scheduler=scheduler,
                max_concurrent_trials=config.max_concurrent,
            ),
            run_config=tune.RunConfig(
                name="ray-tune", storage_path=str(context.path), verbose=0,
                callbacks=[_Follower(jobs, budget, session.workspace.tracker, context.on_progress)],
            ),
        )  # fmt: skip
        results = tuner.fit()
    failures = {
        result.config["number"]: _reason(result.error, folders[result.config["number"]])
        for result in map(results.__getitem__, range(len(results)))
        if result.error is not None and result.config is not None
    }
    for trial, job in zip(trials, jobs, strict=True):
        if trial.number not in failures:  # an interrupted attempt may have left the run open
            _close_run(job, session.workspace.tracker)
    return _conclude(trials, folders, failures, recipe, context)


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Keep Tune from writing log files of its own, from printing a table that `verbose=0` does not
    stop, and from ending the search as if it were done when Ctrl-C is pressed."""
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- A trial ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Everything a trial needs, wherever it runs.

    Attributes:
        folder: the training's storage, kept from one attempt to the next.
        home: the home directory, for the tracker.
        search: the MLflow run of the search, in which the trial's own is nested.
    """

    name: str
    settings: Mapping[str, Any]
    task: GeneratorTask
    folder: Path
    home: Path
    search: RunHandle


def _reports(folder: Path) -> list[dict[str, float]]:
    """A trial's reports so far, by rising step; a line that a kill cut short is left out."""
    file = folder / REPORTS
    found: dict[float, dict[str, float]] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            report = json.loads(line)
            found[report["step"]] = report
    return [found[step] for step in sorted(found)]


def _trial(config: dict[str, Any], jobs: Sequence[_Job]) -> None:
    """The Tune function: repeats the reports of earlier attempts, then trains on."""
    job = jobs[config["number"]]
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / FAILURE).unlink(missing_ok=True)
    for report in _reports(job.folder):
        tune.report(report)
    sinks = job.search.sinks
    tracker = Tracker(job.home, sinks.names if sinks else ())
    with tracker.run(job.name, parent=job.search, folder=job.folder) as run:
        with RunLogger(run) as logger:
            logger.params(job.settings)
        try:
            loop.fit(
                job.task.build, job.task.config.train, storage=job.folder, name="generator",
                run=run, callbacks=[_Recorder(job.folder)],
            )  # fmt: skip
        except TesseraError as error:
            with publishing(job.folder / FAILURE) as new:
                new.write_text(str(error))
            raise
        (job.folder / ENDED).touch()


class _Recorder(TuneReportCallback):
    """Passes a training's reports on to Tune and appends them to the trial's file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder = folder
        known = _reports(folder)
        self.step = known[-1]["step"] if known else 0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        report = {name: float(value) for name, value in metrics[0].items()}
        if report["step"] <= self.step:  # repeated, after a worker died
            return
        self.step = report["step"]
        with (self.folder / REPORTS).open("a") as file:
            file.write(json.dumps(report) + "\n")
        super().after_report(run_context, [report], None)


def _close_run(job: _Job, tracker: Tracker) -> None:
    """End the MLflow run of a trial that did not fail but was stopped by ASHA, or killed."""
    run_id = recorded_run(job.folder)
    if run_id is None:
        return
    if tracker.client.get_run(run_id).info.status != "FINISHED":
        tracker.client.set_tag(run_id, "stopped_by", "ASHA")
        tracker.client.set_terminated(run_id, "FINISHED")


class _Follower(tune.Callback):
    """Reports the search's progress on the driver and ends the MLflow runs of stopped trials."""

    def __init__(
        self, jobs: Sequence[_Job], budget: int, tracker: Tracker, on_progress: OnProgress
    ) -> None:
        self.jobs, self.budget = jobs, budget
        self.tracker, self.on_progress = tracker, on_progress
        self.steps: dict[int, float] = {}
        self.best = float("inf")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, and a terminal and a database cannot be pickled."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.best = min(self.best, result[METRIC])
        self._tell(trial.config["number"], result["step"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _close_run(self.jobs[trial.config["number"]], self.tracker)
        self._tell(trial.config["number"], self.budget)

    def _tell(self, number: int, step: float) -> None:
        self.steps[number] = step
        share = sum(self.steps.values()) / (self.budget * len(self.jobs))
        best = {METRIC: self.best} if self.best < float("inf") else {}
        self.on_progress(Progress(share=share, step=len(self.steps), metrics=best))


# ---- The result ------------------------------------------------------------------------------


def _reason(error: BaseException, folder: Path) -> str:
    """Why a trial failed: its own message, or the last line of what Tune says."""
    failure = folder / FAILURE
    return failure.read_text() if failure.is_file() else str(error).strip().splitlines()[-1]


def _conclude(
    trials: Sequence[Trial],
    folders: Sequence[Path],
    failures: Mapping[int, str],
    recipe: Recipe,
    context: StepContext,
) -> dict[str, Any]:
    """Rank the trials and record the ranking.

    Raises:
        TrainingError: no trial has a loss to rank by.
    """
    keep_last = recipe.generator.train.restore == "last"
    table = [
        summarise(_reports(folder), keep_last=keep_last)
        | {"name": t.name, "settings": t.settings, "failure": failures.get(t.number)}
        | {"ended": (folder / ENDED).is_file()}
        for t, folder in zip(trials, folders, strict=True)
    ]
    ranked = rank(table, keep_last=keep_last)
    if not ranked:
        reasons = "; ".join(f"{row['name']}: {row['failure'] or 'no report'}" for row in table)
        raise TrainingError(f"not one trial came to an end: {reasons}. Widen or move tune.space")
    best, everything = ranked[0], ranked + [row for row in table if row not in ranked]
    with publishing(context.path / "trials.json") as new:
        new.write_text(json.dumps(everything, indent=2))
    RunLogger(context.run).files(context.path / "trials.json", folder="")
    RunLogger(context.run).tags({"best_trial": best["name"]})
    return {"settings": best["settings"], METRIC: best[METRIC], "trials": everything}


def summarise(reports: Sequence[Mapping[str, float]], *, keep_last: bool) -> dict[str, Any]:
    """A trial's number of steps, and the loss of the checkpoint that training would keep: the
    lowest, or the last one."""
    if not reports:
        return {"steps": 0, METRIC: None}
    losses = [report[METRIC] for report in reports]
    return {"steps": int(reports[-1]["step"]), METRIC: losses[-1] if keep_last else min(losses)}


def rank(table: Sequence[dict[str, Any]], *, keep_last: bool) -> list[dict[str, Any]]:
    """The trials that did not fail, by loss, best first.

    Where the last checkpoint is kept, the loss may rise while training goes on, so that only trials
    that trained for equally long can be compared: those that reached their limit of steps or time
    come first, then those stopped early, the later ones before the earlier ones.
    """

    def place(row: dict[str, Any]) -> tuple[float, float]:
        stopped_at = float("inf") if row["ended"] else row["steps"]
        return (-stopped_at if keep_last else 0.0, row[METRIC])

    fine = [row for row in table if row["failure"] is None and row[METRIC] is not None]
    return sorted(fine, key=place)
