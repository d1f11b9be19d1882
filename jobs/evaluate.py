"""Evaluate: registered models and bundles on any captioned images, without a recipe.

tessera evaluate models:/tessera@champion --data my-shards
tessera compare asset:base .tessera/steps/generator-0123456789ab/bundle --data asset:emoji
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from pipeline.bundles.bundle import check_bundle, read_bundle
from pipeline.bundles.registry import resolve_model
from pipeline.chain.judging import Contest, evaluation_needs, evaluation_of, evaluation_step
from pipeline.chain.plan import resolve
from pipeline.chain.reporting import write_page
from pipeline.chain.table import pixels_of
from pipeline.chain.workflow import opened
from pipeline.config import Recipe, make_recipe
from pipeline.errors import RecipeError
from pipeline.evaluation.reports import PAGE, Evaluation
from pipeline.tracking.runs import RunLogger
from pipeline.tracking.steps import Reporter


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate_models` found.

    Attributes:
        page: the report, one self-contained HTML file; report.json lies beside it.
        subject: the name of the model that the report is about.
    """

    evaluation: Evaluation
    page: Path
    subject: str


def evaluate_models(
    models: Mapping[str, str],
    data: Sequence[str],
    home: Path,
    reporter: Reporter,
    *,
    overrides: Sequence[str] = (),
    debug: bool = False,
) -> Evaluated:
    """Measure models on the same images, beside the floors.

    Args:
        models: by the name that the report has for it, a bundle's directory, asset:NAME,
            models:/NAME@ALIAS or models:/NAME/VERSION. Image size, caption encoder and tokenizer
            of the evaluation are the first one's.
        data: shard sets.
        overrides: settings of the evaluation, for example "evaluate.num_images=100".

    Raises:
        TesseraError: something the user can mend; finished steps are kept.
    """
    paths = {name: resolve_model(model, home=home).path for name, model in models.items()}
    for path in paths.values():
        check_bundle(path)
    names = list(paths)
    recipe = recipe_for(paths[names[0]], data, overrides)
    plan = replace(resolve(recipe, home), candidates={})
    contest = Contest(paths, tuple((names[0], later) for later in names[1:]))
    step = evaluation_step(plan, contest)
    with opened(plan, reporter, *evaluation_needs(plan), debug=debug) as session:
        table = {**session.table, step.name: step}
        done = session.workspace.run(table, step.name)[step.name]
        evaluation, page = evaluation_of(done), done.path / PAGE
        if not page.is_file():
            card = paths[names[-1]] / "README.md"
            write_page(
                page, plan, evaluation, pixels_of(session.results),
                title=" against ".join(reversed(list(models.values()))), subject=names[-1],
                card=card.read_text(encoding="utf-8") if card.is_file() else "",
            )  # fmt: skip
            RunLogger(session.workspace.parent).files(page, folder="")
        return Evaluated(evaluation, page, names[-1])


def recipe_for(bundle: Path, data: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe by which a bundle is evaluated: what it was trained with, on other data.

    Raises:
        RecipeError: an override that is no setting, or one of a section that is not used.
    """
    for given in overrides:
        section = given.partition(".")[0]
        if section not in USED:
            raise RecipeError(
                f"{given!r} has no effect on a model that is trained already: set "
                f"{', '.join(f'{name}.*' for name in USED)}"
            )
    manifest = read_bundle(bundle)
    values = {
        "name": "evaluation",
        "base": str(bundle),
        "data": {"shards": list(data)},
        "preprocess": {"image_size": manifest.model_spec.image_size},
        "caption_encoder": manifest.caption_encoder.model_dump(mode="json"),
        "aligner": {"source": "asset:aligner"},
    }
    return make_recipe(values, overrides, name="evaluation")


USED = ("aligner", "data", "evaluate", "imagenet_judge", "preprocess")
"""The sections of a recipe that an evaluation reads."""


def gain_table(found: Evaluated) -> Table:
    """The subject's metrics over all images of the gated style, and what it gains."""
    metrics = found.evaluation.reports[found.subject].metrics
    over = found.evaluation.gains.get(found.subject, {})
    table = Table("metric", found.subject, *(f"gain over {name}" for name in over))
    for name, number in metrics.items():
        if "/" in name and not name.endswith(("/all", "/seen", "/unseen")):
            continue
        gains = (gains.get(name) for gains in over.values())
        table.add_row(name, number.short, *(gain.short if gain else "" for gain in gains))
    return table


def is_model(target: str) -> bool:
    """Whether a command's argument names a model, rather than a recipe."""
    path = "/" in target and not target.endswith((".yaml", ".yml"))
    return ":" in target or path or (Path(target) / "config.json").is_file()
