"""Mistakes that a recipe and its data already show: told at once, not after hours of work.

Networks are built on PyTorch's meta device, where they have shapes and no weights.

    plan = resolve(recipe, home)
    check(plan)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.bundles.bundle import check_bundle, read_bundle
from pipeline.chain.idle import idle_settings
from pipeline.chain.plan import Candidate, Plan
from pipeline.chain.table import judge_steps
from pipeline.config import DataConfig, ImageFilter, Recipe
from pipeline.config.promote import judge_of
from pipeline.config.train import TrainConfig
from pipeline.data.preprocess.store import read_table
from pipeline.data.shards.manifest import check_one_file_system, find_absent, open_shards
from pipeline.data.shards.splits import split_of
from pipeline.errors import DataError, PretrainedNotFoundError, RecipeError
from pipeline.evaluation.aligner import Aligner, aligner_shape_of_source
from pipeline.evaluation.eval_set import SPLITS, check_enough, warn_of_languages
from pipeline.objective import GeneratorNetwork, TrainableNetwork
from pipeline.text.encoder_identity import check_identity
from pipeline.tokenizers._saved import TokenizerManifest, check_files, read_manifest
from pipeline.training.feed import fewest_validation_rows
from pipeline.training.policy import apply_policy
from pipeline.training.vgg import find_vgg

logger = logging.getLogger(__name__)
TEST_FRACTIONS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45)
"""Shares of the images held out to judge by that small sets are tried with."""
FEW_IMAGES, SPLIT_SEEDS = 200, 32
"""With fewer images than these, as many seeds are tried."""


def check(plan: Plan, waiting: Collection[str] = ("preprocess",)) -> None:
    """Everything that can be known to fail, before any work; settings without effect are logged.

    Args:
        waiting: the steps that are to be done; shards are looked for if preprocessing is.

    Raises:
        RecipeError: a style that no image has, a rule about what is not evaluated, or sizes, a
            policy or an optimiser that do not fit.
        DataError: shard sets on several file systems, or shards that are missing or truncated.
        BundleError: the base, or a given aligner, read captions through another encoder; files of
            a given model are missing or damaged.
        MissingExtraError: the perceptual loss, or LoRA, without its packages.
        PretrainedNotFoundError: the perceptual loss' features cannot be had.
    """
    for idle in idle_settings(plan.recipe):
        logger.warning(str(idle))
    check_data(plan)
    check_rules(plan)
    if "preprocess" in waiting:
        check_shards(plan)
    check_models(plan)
    for candidate in plan.candidates.values():
        check_candidate(candidate)
    check_encoders(plan)
    tokenizer = plan.tokenizer
    if tokenizer.trains:
        if tokenizer.config.perceptual_weight:
            find_vgg(tokenizer.config.perceptual_features, cache=plan.cache)
        network = tokenizer.shape()
        assert isinstance(network, TrainableNetwork), "a tokenizer that is trained"
        apply_policy(network, tokenizer.config.train)
    if plan.aligner is None:
        apply_policy(aligner_shape(plan), plan.recipe.aligner.train)


def check_data(plan: Plan) -> None:
    """The styles that the recipe names exist, one file system holds all shard sets, and no data set
    is there twice.

    Raises:
        RecipeError: a style that no image has, or the same data set under two names.
        DataError: shard sets on several file systems.
    """
    for key, styles in _named_styles(plan.recipe):
        if unknown := [style for style in styles if style not in plan.styles]:
            raise RecipeError(
                f"{key} names {', '.join(unknown)}, which no picture has; the styles are "
                f"{', '.join(plan.styles)}"
            )
    systems = [open_shards(uri, manifest)[0] for uri, manifest in plan.shards.items()]
    check_one_file_system(systems, plan.shards)
    digests = [manifest.digest for manifest in plan.shards.values()]
    if len(plan.shards) < len(plan.recipe.data.shards) or len(set(digests)) < len(digests):
        raise RecipeError(
            f"data.shards={list(plan.recipe.data.shards)}: two of them are the same data set; "
            "name it once"
        )


def check_rules(plan: Plan) -> None:
    """The gate's rules are about what the evaluation measures.

    A warning is logged if the evaluation has too few images for any candidate to be promoted.

    Raises:
        RecipeError: a rule about a judge, a style, a language or compositions that are not
            evaluated.
    """
    promote, evaluate = plan.recipe.promote, plan.recipe.evaluate
    if promote.unjudged or not plan.candidates:
        return
    judges = [name.partition(":")[0] for name in evaluate.judges]
    there = {"style": evaluate.styles or plan.styles, "language": evaluate.languages}
    choice = [("choose_by", promote.choose_by)] if len(plan.candidates) > 1 else []
    for rule, metric in (*promote.metrics, *choice):
        if metric.startswith("composition/") and not evaluate.compositions:
            raise RecipeError(
                f"promote.{rule}: {metric} is not measured with evaluate.compositions=false: set "
                "it to true, or give other rules"
            )
        judge = judge_of(metric)
        if judge is not None and judge not in judges:
            raise RecipeError(
                f"promote.{rule}: {metric} asks the judge {judge!r}, and evaluate.judges lists "
                f"{', '.join(judges)}: add it there, or give other rules"
            )
        dimension, _, value = metric.partition("/")[2].partition(":")
        if dimension in there and value not in there[dimension]:
            raise RecipeError(
                f"promote.{rule}: {metric} is of no {dimension} that is evaluated; these are "
                f"{', '.join(there[dimension])} (evaluate.{dimension}s)"
            )
    if 2 * evaluate.num_images < promote.min_images:
        logger.warning(
            f"nothing can be promoted: evaluate.num_images={evaluate.num_images} of two sets are "
            f"fewer than promote.min_images={promote.min_images}"
        )


def check_shards(plan: Plan) -> None:
    """All shards are there, in their sizes; what they hold is checked as they are preprocessed.

    Raises:
        DataError: one is missing or of another size, and the recipe does not allow for it.
    """
    if plan.recipe.data.allow_missing_shards:
        return
    for uri, manifest in plan.shards.items():
        if problems := find_absent(uri, manifest):
            raise DataError(
                f"{uri}: {'; '.join(map(str, problems))}. Write the shards again, or set "
                "data.allow_missing_shards=true to go on without them"
            )


def check_evaluation(plan: Plan, pixels: Path) -> None:
    """The preprocessed images are enough to train on and to judge by, in every split.

    A warning is logged if they are too few for any candidate to be promoted.

    Args:
        pixels: the output of preprocessing.

    Raises:
        DataError: they are not; the message says which split of them would do, if one does.
    """
    table = read_table(pixels, columns=["group", "captions"], captioned=True)
    try:
        languages = _check_splits(plan, table)
    except DataError as error:
        raise DataError(f"{error}. {_split_remedy(plan, table)}") from error
    warn_of_languages(plan.recipe.evaluate.languages, languages)
    if plan.candidates and not plan.recipe.promote.unjudged:
        _warn_of_few(plan, table)


def _warn_of_few(plan: Plan, table: pa.Table) -> None:
    """Warn if the images to judge by are fewer than the gate needs; `check_rules` has warned if the
    recipe asks for too few."""
    promote, evaluate = plan.recipe.promote, plan.recipe.evaluate
    style = (evaluate.styles or plan.styles)[0]
    splits = Counter(table.filter(pc.equal(table["style"], style))["split"].to_pylist())
    judged = sum(min(evaluate.num_images, splits[split]) for split in SPLITS.values())
    if judged < promote.min_images <= 2 * evaluate.num_images:
        logger.warning(
            f"nothing can be promoted: {judged} pictures of style {style!r} can be judged by, "
            f"fewer than promote.min_images={promote.min_images}: give more, or lower it"
        )


def _check_splits(plan: Plan, table: pa.Table) -> tuple[str, ...]:
    """The languages that will be evaluated.

    Raises:
        DataError: a set of the evaluation, or a training's validation, has too few images.
    """
    languages = check_enough(table, plan.recipe.evaluate)
    sections = {c.section: (c.config.train, c.config.data) for c in plan.candidates.values()}
    if "aligner" in judge_steps(plan):
        sections["aligner"] = (plan.recipe.aligner.train, ImageFilter())
    held_out = table.filter(pc.equal(table["split"], "validation"))
    for section, (train, only) in sections.items():
        styles = pa.array(only.kept(plan.styles))
        length = held_out.filter(pc.is_in(held_out["style"], styles)).num_rows
        fewest = fewest_validation_rows(
            length, batch_size=train.batch_size, num_batches=train.validation_batches,
            world_size=train.num_workers,
        )  # fmt: skip
        if not fewest:
            raise DataError(
                f"only {length} pictures are in the validation split of {section}, at least "
                f"{train.num_workers} are needed, one per worker ({section}.train.num_workers)"
            )
    return languages


def _split_remedy(plan: Plan, table: pa.Table) -> str:
    """The split with the fewest held-out images that would do; else what the data lacks."""
    groups = table["group"].to_pylist()
    place = table.schema.get_field_index("split")
    for data in _larger_splits(plan.recipe.data, len(groups)):
        fractions = data.validation_fraction, data.test_fraction
        splits = [split_of(group, data.split_seed, *fractions) for group in groups]
        try:
            _check_splits(plan, table.set_column(place, "split", pa.array(splits)))
        except DataError:
            continue
        changed = ("validation_fraction", "test_fraction", "split_seed")
        settings = (f"data.{n}={getattr(data, n):g}" for n in changed
                    if getattr(data, n) != getattr(plan.recipe.data, n))  # fmt: skip
        return (
            f"With {' '.join(settings)} there are enough: {splits.count('test')} of {len(groups)} "
            "pictures are unseen then"
        )
    texts = Counter(row[0]["text"] for row in table["captions"].to_pylist())
    said = ", ".join(text[:20] for text, _ in texts.most_common(3))
    return (
        f"No other split helps: there are {len(groups)} pictures, and {len(texts)} captions that "
        f"differ ({said}, ...). Give more, or train without judging: `tessera train`"
    )


def _larger_splits(data: DataConfig, count: int) -> Iterator[DataConfig]:
    """Settings that hold out more of `count` images. Of a few images, chance decides how many: so
    other seeds are tried then."""
    seeds = dict.fromkeys((data.split_seed, *range(SPLIT_SEEDS if count < FEW_IMAGES else 0)))
    for seed in seeds:
        for test in TEST_FRACTIONS:
            yield data.model_copy(
                update={
                    "validation_fraction": max(data.validation_fraction, min(0.1, test / 2)),
                    "test_fraction": max(data.test_fraction, test),
                    "split_seed": seed,
                }
            )


def check_models(plan: Plan) -> None:
    """The files of the models that no step makes can be read.

    Raises:
        BundleError: a file of the base or of a given tokenizer is missing or damaged.
        PretrainedNotFoundError: weights of a pretrained language model are cut off.
    """
    if plan.base is not None:
        check_bundle(plan.base)
    if plan.tokenizer.source is not None:
        there = plan.tokenizer.source
        check_files(there, read_manifest(there, TokenizerManifest).files)
    pretrained = {plan.encoder.source, *(c.language_model for c in plan.candidates.values())}
    for name in sorted(filter(None, pretrained)):
        for file in sorted(Path(name).rglob("*.safetensors")):  # a hub's id is no folder
            try:
                with safe_open(file, framework="pt"):  # compares the header with the file's size
                    pass
            except (SafetensorError, OSError) as error:
                raise PretrainedNotFoundError(
                    f"{file} cannot be read: {error}. Remove it and get it again"
                ) from error


def check_candidate(candidate: Candidate) -> None:
    """A generator can be built, and trained by its policy and optimiser.

    Raises:
        RecipeError: sizes, a policy or an optimiser that do not fit.
        MissingExtraError: LoRA without its package.
    """
    apply_policy(generator_shape(candidate), candidate.config.train)


def check_encoders(plan: Plan) -> None:
    """The base and a given aligner read captions through the recipe's encoder.

    Raises:
        BundleError: they read them through another one.
    """
    if plan.base is not None:
        base = read_bundle(plan.base)
        check_identity(base.encoder, plan.encoder.identity(), base.caption_encoder)
    if (given := plan.aligner or plan.aligner_source) is not None:
        aligner = Aligner.load(given)
        assert aligner.encoder is not None, "a saved one has it"
        check_identity(aligner.encoder, plan.encoder.identity())


def generator_shape(candidate: Candidate) -> GeneratorNetwork:
    """The candidate's network on the meta device."""
    with torch.device("meta"):
        return candidate.family.build(candidate.config, candidate.spec)


def aligner_shape(plan: Plan) -> Aligner:
    """The aligner's network, if a step trains it, on the meta device.

    Raises:
        RecipeError: the recipe sets a shape that is not that of the aligner that it tunes.
    """
    source = None if plan.aligner_source is None else Aligner.load(plan.aligner_source)
    config = aligner_shape_of_source(plan.recipe.aligner, source)
    with torch.device("meta"):
        return Aligner(
            config,
            image_size=plan.recipe.preprocess.image_size,
            caption_width=plan.encoder.width,
        )


def disk_mb(plan: Plan) -> Mapping[str, float]:
    """What each step's results take at most, in MB (10**6 bytes), by step.

    Of captions and tokens what the shards promise; of trainings two checkpoints and one in the
    making, each with weights, their average and the optimiser's state, and the bundle.
    """
    recipe, size = plan.recipe, plan.recipe.preprocess.image_size
    images = sum(manifest.samples for manifest in plan.shards.values())
    captions = sum(sum(manifest.languages.values()) for manifest in plan.shards.values())
    tokens = plan.tokenizer.shape().grid_size ** 2
    found = {
        "preprocess": images * 3 * size**2,
        "tokens": images * recipe.encode.num_views * tokens * 2,
        "captions": captions * recipe.caption_encoder.max_tokens * plan.encoder.width * 2,
    }
    if plan.tokenizer.trains:
        found["tokenizer"] = _training_bytes(plan.tokenizer.shape(), plan.tokenizer.config.train)
    if plan.aligner is None:
        found["aligner"] = _training_bytes(aligner_shape(plan), recipe.aligner.train)
    for candidate in plan.candidates.values():
        found[candidate.step] = _training_bytes(generator_shape(candidate), candidate.config.train)
    return {name: count / 1e6 for name, count in found.items()}


def _training_bytes(network: object, config: TrainConfig) -> int:
    assert isinstance(network, nn.Module)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    state = {"adamw": 8, "muon": 8, "rmsprop": 8, "sgd": 4}[config.optimizer]
    checkpoint = parameters * (4 + (4 if config.ema_decay else 0) + state)
    return 3 * checkpoint + 2 * parameters


def _named_styles(recipe: Recipe) -> Iterator[tuple[str, Sequence[str]]]:
    filters: dict[str, ImageFilter] = {"tokenizer.data": recipe.tokenizer.data}
    for name, config in recipe.generators.items():
        place = f"candidates.{name}" if recipe.candidates else "generator"
        filters[f"{place}.data"] = config.data
    for key, only in filters.items():
        yield f"{key}.styles", only.styles
        yield f"{key}.exclude_styles", only.exclude_styles
        yield f"{key}.style_weights", tuple(only.style_weights)
    yield "evaluate.styles", recipe.evaluate.styles
