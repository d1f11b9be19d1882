"""Running a recipe's chain: the steps of its plan, then the promotion gate.

    plan = resolve(recipe, home)
    outcome = retrain(plan, reporter)           # every step, then the decision
    results = run_steps(plan, reporter, "tokens")

Ray is started when the first step has work to do; with nothing to do it is not started at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifacts import bundle_digest
from pipeline.bundles.bundle import read_bundle
from pipeline.bundles.decisions import Verdict
from pipeline.bundles.registry import ModelRegistry, ResolvedModel, lineage
from pipeline.chain.plan import Plan
from pipeline.chain.report_gate import choose, decide
from pipeline.chain.table import (
    champion_subject,
    evaluation_needs,
    evaluation_step,
    pixels_of,
    reports_of,
    training_steps,
)  # fmt: skip
from pipeline.contracts import Decision, EvalReport
from pipeline.evaluation import reports
from pipeline.runtime import check_disk, ray_runtime
from pipeline.tracking.runs import RunHandle, RunLogger, Tracker
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

SPARE_MB = 500
"""Disk space for logs, grids and MLflow's copies, besides the steps' results."""


@dataclass(frozen=True)
class Outcome:
    """The result of a retrain.

    Attributes:
        bundle: the candidate's directory.
        reports: by subject: candidate, real and tokenizer; untuned and champion where they exist;
            of several candidates the others by their names.
        decision: whether the candidate was promoted, and why.
        choice: why this candidate was chosen, one sentence per candidate; empty if there was one.
        version: the candidate's version in the model registry.
        seconds: of each step; 0 for steps that were done before.
        run: the parent MLflow run.
        pixels: the preprocessed images, to compare with.
    """

    bundle: Path
    reports: dict[str, EvalReport]
    decision: Decision
    version: str
    seconds: dict[str, float]
    run: RunHandle
    pixels: Path
    choice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """The candidates after evaluation.

    Attributes:
        reports: by subject.
        winner: the name of the candidate that goes to the gate.
        choice: why it was chosen, one sentence per candidate; empty if there is only one.
        champion: what it is compared with, if there is one.
        champion_report: the champion's report, which may be a candidate's.
    """

    evaluation: StepResult
    reports: dict[str, EvalReport]
    winner: str
    choice: tuple[str, ...]
    champion: ResolvedModel | None
    champion_report: EvalReport | None


class Session:
    """A plan that is being run: its home directory is locked and its parent MLflow run is open."""

    def __init__(self, plan: Plan, workspace: Workspace) -> None:
        self.plan, self.workspace = plan, workspace
        self.models = ModelRegistry(plan.home, workspace.tracker.client)
        self.table = training_steps(plan)

    def run(self, *steps: str) -> dict[str, StepResult]:
        """Do these steps and those they need; returns all results so far, by step."""
        return self.workspace.run(self.table, *steps)

    @property
    def results(self) -> dict[str, StepResult]:
        """Of the steps done so far, by step."""
        return self.run()

    def judge(self) -> Judged:
        """Train and evaluate all candidates, and choose the one that goes to the gate."""
        plan, results = self.plan, self.run(*evaluation_needs(self.plan))
        champion = self.models.champion(plan.recipe.promote.model_name)
        step = evaluation_step(plan, results, champion)
        evaluation = self.workspace.run({**self.table, step.name: step}, step.name)[step.name]
        found = reports_of(evaluation)
        subject = champion_subject(plan, results, champion)
        champion_report = None if subject is None else found[subject]
        winner, choice = next(iter(plan.candidates)), tuple[str, ...]()
        if plan.recipe.candidates:
            candidates = {name: found[name] for name in plan.candidates}
            winner, choice = choose(candidates, champion_report, plan.recipe.promote)
        return Judged(evaluation, found, winner, choice, champion, champion_report)


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
    with exclusive(plan.home), tracker.run(plan.recipe.name) as parent:
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


def retrain(plan: Plan, reporter: Reporter, *, debug: bool = False) -> Outcome:
    """Every step, in order, to the gate's decision; what was done before is skipped.

    Raises:
        TesseraError: something the user can mend; finished steps are kept.
    """
    with opened(plan, reporter, debug=debug) as session:
        judged = session.judge()
        results, parent = session.results, session.workspace.parent
        bundle = results[plan.candidates[judged.winner].step].bundle
        found = dict(judged.reports)
        if plan.recipe.candidates:
            report = found.pop(judged.winner)
            found["candidate"] = replace(report, subject=f"candidate ({judged.winner})")
            RunLogger(parent).tags({"candidate": judged.winner})
        decision, version = _promote(session, judged, bundle, found, results)
        with RunLogger(parent) as logger:
            logger.metrics(reports.metric_values(found["candidate"]))
        return Outcome(
            bundle, found, decision, version, dict(session.workspace.seconds), parent,
            pixels_of(results), judged.choice,
        )  # fmt: skip


def _promote(
    session: Session,
    judged: Judged,
    bundle: Path,
    found: Mapping[str, EvalReport],
    results: Results,
) -> tuple[Decision, str]:
    """Decide, register the candidate, and make it champion if it won. Idempotent."""
    plan, parent, champion = session.plan, session.workspace.parent, judged.champion
    name = plan.recipe.promote.model_name
    if champion is not None and bundle_digest(champion.path) == bundle_digest(bundle):
        reason = f"it is already the champion, version {champion.version}"
        return Decision(True, (reason,)), champion.version
    from pipeline.chain.card import write_card

    decision = decide(found["candidate"], judged.champion_report, plan.recipe.promote)
    decision = replace(decision, reasons=(*decision.reasons, *other_splits(plan, champion)))
    write_card(
        bundle, plan.recipe, found, list(plan.shards.values()),
        pixels=pixels_of(results), seconds=session.workspace.cost,
    )  # fmt: skip
    made_from = lineage(plan.recipe, {uri: m.digest for uri, m in plan.shards.items()})
    version = session.models.register(bundle, model_name=name, handle=parent, tags=made_from)
    verdict = Verdict(
        decision.promoted,
        champion.version if champion else None,
        decision.reasons,
        evaluation=f"runs:/{parent.run_id}",
    )
    session.models.record(name, version, verdict)
    record = {"promoted": decision.promoted, "reasons": decision.reasons, "version": version}
    if judged.choice:
        record["choice"] = judged.choice
    session.workspace.tracker.log_decision(parent, record)
    if decision.promoted:
        session.models.promote(name, version, verdict)
    else:
        session.models.refuse(name, version, verdict)
    return decision, version


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
        return [*found, StepStatus("evaluate", "to do", why, None, {})]
    champion = ModelRegistry(plan.home).champion(plan.recipe.promote.model_name)
    step = evaluation_step(plan, results, champion)
    return statuses({**table, step.name: step}, [*table, step.name], plan.home)[0]
