"""Running a recipe's chain: the steps of its plan, then the promotion gate.

    plan = resolve(recipe, home)
    outcome = retrain(plan, reporter)           # every step, then the decision
    results = run_steps(plan, reporter, "tokens")

Ray is started when the first step has work to do; with nothing to do it is not started at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifacts import bundle_digest
from pipeline.bundles.bundle import read_bundle
from pipeline.bundles.decisions import Verdict
from pipeline.bundles.registry import ModelRegistry, ResolvedModel, lineage
from pipeline.chain.judging import (
    Ruling,
    contest,
    evaluation_needs,
    evaluation_of,
    evaluation_step,
    gate_step,
    ruling_of,
    write_report,
)
from pipeline.chain.plan import Plan
from pipeline.chain.table import pixels_of, training_steps
from pipeline.contracts import Decision, EvalReport
from pipeline.errors import PromotionError, TesseraError
from pipeline.evaluation.reports import Evaluation, metric_values
from pipeline.runtime import check_disk, ray_runtime
from pipeline.tracking.runs import RunHandle, RunLogger, Tracker, recorded_run
from pipeline.tracking.steps import (
    Reporter,
    Results,
    Step,
    StepResult,
    StepStatus,
    Workspace,
    exclusive,
    statuses,
)  # fmt: skip

HEADLINE = ("imagenet_r1/all", "aligner_r1/all", "kid/all")
"""Metrics that `tessera models` shows of every version."""
SPARE_MB = 500
"""Disk space for logs, grids and MLflow's copies, besides the steps' results."""


@dataclass(frozen=True)
class Outcome:
    """The result of a retrain.

    Attributes:
        bundle: the candidate's directory.
        reports: by subject: the candidate, the floors, untuned and champion where they exist; of
            several candidates the others by their names. Empty if the candidate is the champion.
        decision: whether the candidate was promoted, and why.
        choice: why this candidate was chosen, one sentence per candidate; empty if there was one.
        version: the candidate's version in the model registry.
        seconds: of each step; 0 for steps that were done before.
        run: the parent MLflow run.
        pixels: the preprocessed images, to compare with.
        page: the report, one self-contained HTML file.
    """

    bundle: Path
    reports: dict[str, EvalReport]
    decision: Decision
    version: str
    seconds: dict[str, float]
    run: RunHandle
    pixels: Path
    choice: tuple[str, ...] = ()
    page: Path | None = None


@dataclass(frozen=True)
class Judged:
    """The candidates after the gate.

    Attributes:
        evaluation: numbers of candidates, champion, untuned base and floors.
        ruling: which candidate was chosen, and the decision about it.
        champion: what it was compared with, if there is one.
    """

    evaluation: Evaluation
    ruling: Ruling
    champion: ResolvedModel | None


class Session:
    """A plan that is being run: its home directory is locked and its parent MLflow run is open."""

    def __init__(self, plan: Plan, workspace: Workspace) -> None:
        self.plan, self.workspace = plan, workspace
        self.models = ModelRegistry(plan.home, workspace.tracker.client)
        self.table = training_steps(plan)
        self._is_checked = False

    def run(self, *steps: str) -> dict[str, StepResult]:
        """Do these steps and those they need; returns all results so far, by step."""
        return self.workspace.run(self.table, *steps)

    @property
    def results(self) -> dict[str, StepResult]:
        """Of the steps done so far, by step."""
        return self.run()

    def check_evaluation(self) -> None:
        """Preprocess, and check once, before any training, that its result is enough to judge by.

        Raises:
            DataError: it is not.
        """
        results = self.run("preprocess")
        if self._is_checked:
            return
        if waiting_steps(self.plan):
            from pipeline.chain.preflight import check_evaluation  # as in `check_to_do`

            check_evaluation(self.plan, pixels_of(results))
        self._is_checked = True

    def judge(self) -> Judged:
        """Train and evaluate all candidates, choose one, and decide whether it is promoted."""
        self.check_evaluation()
        plan, results = self.plan, self.run(*evaluation_needs(self.plan))
        champion = self.models.champion(plan.recipe.promote.model_name)
        found = contest(plan, results, champion)
        steps = [evaluation_step(plan, found), gate_step(plan, found)]
        done = self.workspace.run({**self.table, **{step.name: step for step in steps}}, "gate")
        return Judged(evaluation_of(done["evaluate"]), ruling_of(done["gate"]), champion)


@contextmanager
def opened(plan: Plan, reporter: Reporter, *targets: str, debug: bool = False) -> Iterator[Session]:
    """Check the plan if there is work to do, lock its home directory and open a parent run.

    Args:
        targets: the steps that will be asked for; none stands for all.

    Raises:
        TesseraError: as `preflight.check`; another run holds the home directory; there is too
            little disk space.
    """
    check_to_do(plan, *targets)
    tracker = Tracker(plan.home, plan.recipe.tracking.sinks)
    with exclusive(plan.home), _run_of(tracker, plan) as parent:
        with RunLogger(parent) as logger:
            logger.params({"recipe": plan.recipe.name, "base": plan.recipe.base})
            licenses = {name for m in plan.shards.values() for name in m.licenses}
            logger.tags({"licenses": ", ".join(sorted(licenses))})
        for uri, manifest in plan.shards.items():
            name = uri.rstrip("/").rpartition("/")[2]
            tracker.log_dataset(parent, name=name, digest=manifest.digest, uri=uri)
        workspace = Workspace(
            plan.home, tracker, parent, reporter, lambda: ray_runtime(debug=debug)
        )
        try:
            yield Session(plan, workspace)
        finally:
            workspace.close()


@contextmanager
def _run_of(tracker: Tracker, plan: Plan) -> Iterator[RunHandle]:
    """The parent run, after those of a process that died in this home directory are ended."""
    tracker.end_abandoned()
    with tracker.run(plan.recipe.name) as parent:
        yield parent


def waiting_steps(plan: Plan, *targets: str) -> list[str]:
    """The training steps that are not done, of the targets and those they need; without targets of
    all."""
    table = training_steps(plan)
    found, _ = statuses(table, targets or table, plan.home)
    return [status.name for status in found if status.state == "to do"]


def check_to_do(plan: Plan, *targets: str) -> None:
    """Check the plan, and the disk space that the waiting steps take, if any is waiting.

    Raises:
        TesseraError: the plan cannot be carried out.
    """
    if waiting := waiting_steps(plan, *targets):
        from pipeline.chain.preflight import check, disk_mb  # builds networks: seconds to import

        check(plan, waiting)
        needed = disk_mb(plan)
        check_disk(plan.home, round(SPARE_MB + sum(needed.get(name, 0) for name in waiting)))


def run_steps(
    plan: Plan, reporter: Reporter, *steps: str, debug: bool = False
) -> dict[str, StepResult]:
    """Do these steps and what they need; what was done before is skipped.

    Raises:
        TesseraError: something the user can mend; finished steps are kept.
    """
    with opened(plan, reporter, *steps, debug=debug) as session:
        return session.run(*steps)


CheckServable = Callable[[Path], None]
"""Draws with a bundle through the real service, in a process of its own.

Raises:
    TesseraError: the bundle cannot be served as it should be.
"""


def retrain(
    plan: Plan, reporter: Reporter, *, check_servable: CheckServable, debug: bool = False
) -> Outcome:
    """Every step, in order, to the gate's decision; what was done before is skipped.

    Args:
        check_servable: called with a bundle that won, before it is promoted.

    Raises:
        TesseraError: something the user can mend; finished steps are kept.
    """
    with opened(plan, reporter, debug=debug) as session:
        session.check_evaluation()
        results, parent = session.run(*training_targets(plan)), session.workspace.parent
        champion = session.models.champion(plan.recipe.promote.model_name)
        if champion is not None and is_champion(plan, results, champion):
            (candidate,) = plan.candidates.values()
            reason = f"it is already the champion, version {champion.version}"
            return Outcome(
                results[candidate.step].bundle, {}, Decision(True, (reason,)),
                champion.version, dict(session.workspace.seconds), parent, pixels_of(results),
            )  # fmt: skip
        judged = session.judge()
        results, ruling = session.results, judged.ruling
        bundle = results[plan.candidates[ruling.winner].step].bundle
        shown = dict(judged.evaluation.reports)
        if plan.recipe.candidates:
            report = shown.pop(ruling.winner)
            shown["candidate"] = replace(report, subject=f"candidate ({ruling.winner})")
            RunLogger(parent).tags({"candidate": ruling.winner})
        decision, version = _promote(session, judged, bundle, check_servable)
        with RunLogger(parent) as logger:
            logger.metrics(metric_values(shown["candidate"]))
        return Outcome(
            bundle, shown, decision, version, dict(session.workspace.seconds), parent,
            pixels_of(results), ruling.choice, ruling.page,
        )  # fmt: skip


def is_champion(plan: Plan, results: Results, champion: ResolvedModel) -> bool:
    """Whether the plan's only candidate is the champion already: there is nothing to judge."""
    if len(plan.candidates) > 1:
        return False
    (candidate,) = plan.candidates.values()
    return results[candidate.step].digest == bundle_digest(champion.path)


def training_targets(plan: Plan) -> tuple[str, ...]:
    """The steps that train the candidates, and the preprocessing that their images come from."""
    return ("preprocess", *(candidate.step for candidate in plan.candidates.values()))


def _promote(
    session: Session, judged: Judged, bundle: Path, check_servable: CheckServable
) -> tuple[Decision, str]:
    """Register the candidate, and make it champion if it won and can be served. Idempotent."""
    plan, parent, champion = session.plan, session.workspace.parent, judged.champion
    decision = judged.ruling.decision
    decision = replace(decision, reasons=(*decision.reasons, *other_splits(plan, champion)))
    shutil.copytree(judged.ruling.card, bundle, dirs_exist_ok=True)
    name = plan.recipe.promote.model_name
    made_from = lineage(plan.recipe, {uri: m.digest for uri, m in plan.shards.items()})
    version = session.models.register(bundle, model_name=name, handle=parent, tags=made_from)
    if decision.promoted:
        decision = _if_servable(decision, bundle, check_servable)
    verdict = Verdict(
        decision.promoted,
        champion.version if champion else None,
        decision.reasons,
        evaluation=f"runs:/{recorded_run(judged.ruling.page.parent)}/{judged.ruling.page.name}",
    )
    found = metric_values(judged.evaluation.reports[judged.ruling.winner])
    headline = (plan.recipe.promote.choose_by, *HEADLINE)
    shown = {metric: found[metric] for metric in dict.fromkeys(headline) if metric in found}
    session.models.record(name, version, verdict, metrics=shown)
    record = {"promoted": decision.promoted, "reasons": decision.reasons, "version": version}
    if judged.ruling.choice:
        record["choice"] = judged.ruling.choice
    session.workspace.tracker.log_decision(parent, record)
    if decision.promoted:
        try:
            session.models.promote(name, version, verdict)
        except PromotionError as error:
            _show(session, judged, _refused(decision, str(error)))
            raise
    else:
        session.models.refuse(name, version, verdict)
    _show(session, judged, decision)
    return decision, version


def _if_servable(decision: Decision, bundle: Path, check_servable: CheckServable) -> Decision:
    """The decision, or a refusal if the bundle cannot be served."""
    try:
        check_servable(bundle)
    except TesseraError as error:
        return _refused(decision, f"it won, but cannot be served: {error}")
    return decision


def _refused(decision: Decision, reason: str) -> Decision:
    """A decision to promote that came to nothing."""
    reasons = (f"not promoted: {reason}", *decision.reasons[1:])
    return replace(decision, promoted=False, reasons=reasons)


def _show(session: Session, judged: Judged, decision: Decision) -> None:
    """Write the report again if it shows another decision than came of the gate's in the end."""
    ruling = judged.ruling
    shown = json.loads(ruling.page.with_suffix(".json").read_text(encoding="utf-8"))["decision"]
    if (shown["promoted"], tuple(shown["reasons"])) != (decision.promoted, decision.reasons):
        gate = recorded_run(ruling.page.parent)
        assert gate is not None, "every step has a run"
        run = RunHandle(session.workspace.parent.tracking_uri, gate)
        final = replace(ruling, decision=decision)
        write_report(session.plan, session.results, judged.evaluation, final, run)


def other_splits(plan: Plan, champion: ResolvedModel | None) -> Iterator[str]:
    """One sentence for the base, and one for the champion, if it was trained with another split and
    may have seen what is held out here."""
    here = plan.recipe.data.split
    paths = {"base": plan.base, "champion": champion.path if champion else None}
    for name, path in paths.items():
        there = None if path is None else read_bundle(path).split
        if there not in (None, here):
            yield (
                f"note: the {name} was trained with another split ({there}) and may have seen "
                f"what is unseen in this one ({here})"
            )


def plan_statuses(plan: Plan) -> list[StepStatus]:
    """Whether each step is done, the evaluation included. Nothing is done or started."""
    table: dict[str, Step] = training_steps(plan)
    found, results = statuses(table, table, plan.home)
    missing = [name for name in evaluation_needs(plan) if name not in results]
    if missing:
        why = f"needs {', '.join(missing)}"
        last = StepStatus("gate", "to do", "needs evaluate", None, {})
        return [*found, StepStatus("evaluate", "to do", why, None, {}), last]
    champion = ModelRegistry(plan.home).champion(plan.recipe.promote.model_name)
    if champion is not None and is_champion(plan, results, champion):
        why = f"not needed: the candidate is the champion, version {champion.version}"
        return [*found, *(StepStatus(n, "done", why, None, {}) for n in ("evaluate", "gate"))]
    found_contest = contest(plan, results, champion)
    steps = [evaluation_step(plan, found_contest), gate_step(plan, found_contest)]
    table |= {step.name: step for step in steps}
    return statuses(table, table, plan.home)[0]
