"""The last two steps of a chain: candidates are evaluated, then the gate decides.

evaluate      candidates, champion and untuned base on the same images -> measurements, numbers
gate          numbers, rules -> the candidate that was chosen, the decision, its card, report.html

step = evaluation_step(plan, contest(plan, results, champion))
evaluation = evaluation_of(workspace.run(table, "evaluate")["evaluate"])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts import bundle_digest
from pipeline.bundles.registry import ResolvedModel
from pipeline.chain.plan import Plan
from pipeline.chain.table import bundles_of, judge_steps, judges_of, pixels_of, tokenizer_of
from pipeline.contracts import Decision, Interval, RuleVerdict
from pipeline.evaluation import reports
from pipeline.evaluation.measured import SHUFFLED
from pipeline.tracking.runs import RunHandle, RunLogger, curves, recorded_run
from pipeline.tracking.steps import Results, Step, StepContext, StepResult, step_settings

CARD = "card"


@dataclass(frozen=True)
class Contest:
    """Which bundles are evaluated together, and which gains are reported.

    Attributes:
        given: bundles that no step of the plan makes, by the subject's name.
        pairs: (before, after) subjects.
        incumbent: the subject that a candidate must beat: the champion, without one the untuned
            base, without a base "shuffled".
    """

    given: Mapping[str, Path]
    pairs: tuple[tuple[str, str], ...]
    incumbent: str = SHUFFLED


def contest(plan: Plan, results: Results, champion: ResolvedModel | None) -> Contest:
    """The candidates against the champion and the untuned base.

    Args:
        results: of the candidates' steps: a champion that is one of them is evaluated once.
    """
    champion_is = champion_subject(plan, results, champion)
    given: dict[str, Path] = {}
    if plan.base is not None:
        given["untuned"] = plan.base
    if champion is not None and champion_is == "champion":
        given["champion"] = champion.path
    before = [name for name in ("untuned", champion_is) if name is not None]
    before = [name for name in before if name in given or name in plan.candidates]
    pairs = [(b, after) for after in plan.candidates for b in before if b != after]
    return Contest(given, tuple(pairs), (before or [SHUFFLED])[-1])


def evaluation_step(plan: Plan, contest: Contest) -> Step:
    """The plan's candidates and the given bundles on the same images, the floors beside them."""
    inputs = {name: bundle_digest(path) for name, path in contest.given.items()}
    if plan.aligner is not None and "aligner" in plan.recipe.evaluate.judges:
        inputs["aligner"] = bundle_digest(plan.aligner)
    if plan.tokenizer.source is not None and not plan.tokenizer.trains:
        inputs["tokenizer"] = bundle_digest(plan.tokenizer.source)
    settings = step_settings(plan.recipe.evaluate, exclude={"num_workers"})
    return Step(
        "evaluate",
        partial(_evaluate, plan, contest),
        settings={**settings, "pairs": [list(pair) for pair in contest.pairs]},
        needs=evaluation_needs(plan),
        inputs=inputs,
        version=reports.FORMAT,
    )


def evaluation_needs(plan: Plan) -> tuple[str, ...]:
    """The steps that the evaluation needs."""
    candidates = [candidate.step for candidate in plan.candidates.values()]
    tokenizer = ["tokenizer"] if plan.tokenizer.trains else []
    return ("preprocess", *tokenizer, *candidates, *judge_steps(plan))


def champion_subject(plan: Plan, results: Results, champion: ResolvedModel | None) -> str | None:
    """The evaluation's name for the champion: that of a candidate which is the same bundle, else
    "champion"; None while there is no champion."""
    if champion is None:
        return None
    digest = bundle_digest(champion.path)
    for name, candidate in plan.candidates.items():
        if results[candidate.step].digest == digest:
            return name
    return "champion"


def _evaluate(plan: Plan, contest: Contest, context: StepContext) -> dict[str, Any]:
    from pipeline.evaluation.eval_set import EvalSet
    from pipeline.evaluation.features import FeaturesSpec
    from pipeline.evaluation.judges.spec import judge_specs
    from pipeline.evaluation.measuring import Instruments, measure
    from pipeline.evaluation.subjects import (
        BlurredImages,
        BundleImages,
        RealImages,
        ReconstructedImages,
        Subject,
    )  # fmt: skip
    from pipeline.evaluation.validity import validity_of

    recipe, results = plan.recipe, context.results
    config = recipe.evaluate
    eval_set = EvalSet.from_parquet(
        pixels_of(results), config, image_size=recipe.preprocess.image_size
    )
    bundles = {**bundles_of(plan, results), **contest.given}
    subjects: list[Subject] = [
        RealImages(),
        ReconstructedImages(tokenizer_of(plan, results)),
        BlurredImages(),
        RealImages(SHUFFLED, offset=1),
        *(BundleImages(name, path, plan.cache) for name, path in bundles.items()),
    ]
    judges = judge_specs(
        config.judges,
        trained=judges_of(plan, results),
        caption_encoder=plan.encoder.config,
        cache=plan.cache,
    )
    features = FeaturesSpec(config.features, recipe.imagenet_judge.resolution)
    instruments = Instruments.prepare(
        eval_set, judges, features=features, encoder=plan.encoder.load(), config=config,
        models=[tokenizer_of(plan, results), *bundles.values()],
    )  # fmt: skip
    measured = measure(
        subjects, instruments, num_workers=config.num_workers, on_progress=context.on_progress
    )
    for name, candidate in plan.candidates.items():
        loss = results[candidate.step].values["validation_loss"]
        costs = {**measured[name].scalars, "validation_loss": loss}
        measured[name] = replace(measured[name], scalars=costs)
    how = {"bootstrap": config.bootstrap, "seed": config.seed}
    names = [judge.name for judge in instruments.judges]
    reports.Evaluation.make(
        context.path, measured, validity_of(names, measured, **how), pairs=contest.pairs,
        details=instruments.details(), **how,
    )  # fmt: skip
    logger = RunLogger(context.run)
    logger.files(context.path / reports.TABLE, folder="")
    logger.files(context.path / reports.RESULT, folder="")
    return {"subjects": list(measured), "style": eval_set.style}


def evaluation_of(step: StepResult) -> reports.Evaluation:
    """What the evaluation's step left.

    Raises:
        DataError: its files are missing or damaged.
    """
    return reports.Evaluation.load(step.path)


# ---- The gate ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ruling:
    """What the gate's step found.

    Attributes:
        winner: the name of the candidate that was chosen.
        choice: why, one sentence per candidate; empty if there is only one.
        decision: of that candidate.
        page: the report, one self-contained HTML file.
        card: the folder of its model card, whose files belong into its bundle.
    """

    winner: str
    choice: tuple[str, ...]
    decision: Decision
    page: Path
    card: Path


def gate_step(plan: Plan, contest: Contest) -> Step:
    """Choose the best candidate and decide about it; the report and the winner's card show both."""
    recipe = plan.recipe
    rules = step_settings(recipe.promote, exclude={"model_name", "canary"})
    candidates = [candidate.step for candidate in plan.candidates.values()]
    return Step(
        "gate",
        partial(_gate, plan, contest),
        settings={**rules, "name": recipe.name, "description": recipe.description},
        needs=("preprocess", *candidates, "evaluate"),
        inputs={"incumbent": contest.incumbent},
    )


def _gate(plan: Plan, contest: Contest, context: StepContext) -> dict[str, Any]:
    from pipeline.chain.card import write_card
    from pipeline.chain.promotion import choose, decide

    evaluation = evaluation_of(context.results["evaluate"])
    comparisons = {name: evaluation.comparison(contest.incumbent, name) for name in plan.candidates}
    winner, choice = next(iter(plan.candidates)), tuple[str, ...]()
    if len(comparisons) > 1:
        winner, choice = choose(comparisons, evaluation.validity, plan.recipe.promote)
    decision = decide(
        comparisons[winner], evaluation.validity, plan.recipe.promote, candidates=len(comparisons)
    )
    write_card(
        context.path / CARD, plan.recipe, evaluation, winner, list(plan.shards.values()),
        pixels=pixels_of(context.results), seconds=context.seconds,
    )  # fmt: skip
    ruling = Ruling(winner, choice, decision, context.path / reports.PAGE, context.path / CARD)
    write_report(plan, context.results, evaluation, ruling, context.run)
    return {"winner": winner, "choice": list(choice), "decision": asdict(decision)}


def write_report(
    plan: Plan, results: Results, evaluation: reports.Evaluation, ruling: Ruling, run: RunHandle
) -> None:
    """Write a ruling's page, and the same as JSON beside it.

    Args:
        results: of preprocessing and the candidates' steps.
        run: of the gate's step.
    """
    from pipeline.chain.reporting import write_page

    trained = recorded_run(results[plan.candidates[ruling.winner].step].path)
    write_page(
        ruling.page, plan, evaluation, pixels_of(results),
        title=plan.recipe.name, subject=ruling.winner, decision=ruling.decision,
        card=(ruling.card / "README.md").read_text(encoding="utf-8"),
        curves=curves(run.tracking_uri, trained, "train_", "validation_"),
    )  # fmt: skip
    RunLogger(run).files(ruling.page, folder="")


def ruling_of(step: StepResult) -> Ruling:
    """What the gate's step left."""
    values = step.values
    return Ruling(
        values["winner"],
        tuple(values["choice"]),
        _decision(values["decision"]),
        step.path / reports.PAGE,
        step.path / CARD,
    )


def _decision(values: Mapping[str, Any]) -> Decision:
    """What `asdict` made of a decision, also after JSON."""
    verdicts = (
        RuleVerdict(**{**verdict, "gain": Interval(**verdict["gain"]) if verdict["gain"] else None})
        for verdict in values["verdicts"]
    )
    return Decision(values["promoted"], tuple(values["reasons"]), tuple(verdicts))
