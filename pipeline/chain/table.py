"""The table of a chain's steps, from captioned images to judged candidates.

    preprocess    shards -> pixels
    tokenizer     pixels -> a trained image tokenizer (not where one is taken as it is)
    tokens        pixels, tokenizer -> image tokens
    captions      pixels -> the caption encoder's states of every distinct caption
    generator     image tokens or pixels, captions, base -> a candidate (one step per candidate)
    aligner       pixels, captions -> a trained aligner (not where one is taken as it is)
    judge         pixels, captions -> the second judge, trained on the real images

pipeline/chain/judging.py has the two steps that follow, evaluation and gate.

Each step's work is one function of the plan and its context; `pipeline.tracking.steps` runs the
table. A step imports what it works with (the training stacks of PyTorch and Ray, metrics: seconds
each) when it works: most scheduled retrains find every step done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import bundle_digest, file_digest
from pipeline.chain.plan import Candidate, Plan, given_inputs
from pipeline.config import Config, PreprocessConfig
from pipeline.data.preprocess.report import check_bad_fraction
from pipeline.text.pretrained import content_digest
from pipeline.tracking.runs import RunLogger
from pipeline.tracking.steps import Results, Step, StepContext, step_settings

if TYPE_CHECKING:
    from pipeline.training.generator import GeneratorTask


JUDGE = "judge"
"""The step that trains the judge over ImageNet features."""


def training_steps(plan: Plan) -> dict[str, Step]:
    """Every step but the evaluation, by name and in order."""
    steps = [
        _preprocess_step(plan),
        *([_tokenizer_step(plan)] if plan.tokenizer.trains else []),
        _tokens_step(plan),
        _captions_step(plan),
        *(generator_step(plan, candidate) for candidate in plan.candidates.values()),
        *([_aligner_step(plan)] if plan.aligner is None else []),
        _judge_step(plan),
    ]
    return {step.name: step for step in steps}


# ---- Where results lie ---------------------------------------------------------------------------


def pixels_of(results: Results) -> Path:
    """The preprocessed images."""
    return results["preprocess"].path / "data" / "pixels"


def tokenizer_of(plan: Plan, results: Results) -> Path:
    """The tokenizer's directory, trained or given."""
    if plan.tokenizer.trains:
        return results["tokenizer"].bundle
    assert plan.tokenizer.source is not None
    return plan.tokenizer.source


def aligner_of(plan: Plan, results: Results) -> Path:
    """The aligner's directory, trained or given."""
    return results["aligner"].bundle if plan.aligner is None else plan.aligner


def judge_steps(plan: Plan) -> list[str]:
    """The steps that train the judges which the evaluation asks."""
    steps = {"imagenet": JUDGE} if plan.aligner else {"aligner": "aligner", "imagenet": JUDGE}
    return [step for judge, step in steps.items() if judge in plan.recipe.evaluate.judges]


def judges_of(plan: Plan, results: Results) -> dict[str, Path]:
    """The directories of the judges which the evaluation asks, by name, but for a hub's."""
    known = {
        "aligner": lambda: aligner_of(plan, results), "imagenet": lambda: results[JUDGE].bundle
    }  # fmt: skip
    return {name: known[name]() for name in plan.recipe.evaluate.judges if name in known}


def bundles_of(plan: Plan, results: Results) -> dict[str, Path]:
    """The candidates' bundles by name."""
    return {name: results[c.step].bundle for name, c in plan.candidates.items()}


# ---- Data ----------------------------------------------------------------------------------------


def _preprocess_step(plan: Plan) -> Step:
    """How many bad samples are tolerated is no part of the key: it only accepts the result."""
    recipe = plan.recipe
    limit = recipe.preprocess.max_bad_fraction
    default = PreprocessConfig.model_fields["max_bad_fraction"].default
    preprocessing = recipe.preprocess.model_copy(update={"max_bad_fraction": default})
    return Step(
        "preprocess",
        partial(_preprocess, plan),
        settings={
            "data": step_settings(recipe.data, exclude={"shards", "allow_missing_shards"}),
            "preprocess": step_settings(preprocessing),
        },
        inputs={
            **{f"shards-{i}": m.digest for i, m in enumerate(plan.shards.values())},
            **plan.lacking,
        },
        accept=lambda result: check_bad_fraction(
            result.values["reasons"], result.values["promised"], limit
        ),
        version=2,
    )


def _preprocess(plan: Plan, context: StepContext) -> dict[str, Any]:
    from pipeline.data.preprocess.job import preprocess

    report = preprocess(
        list(plan.shards), context.path / "data", data=plan.recipe.data,
        config=plan.recipe.preprocess, on_progress=context.on_progress,
    )  # fmt: skip
    values = asdict(report)
    (context.path / "ray_data_stats.txt").write_text(values.pop("stats"))
    RunLogger(context.run).files(context.path / "ray_data_stats.txt", folder="data")
    return values


def _tokens_step(plan: Plan) -> Step:
    return Step(
        "tokens",
        partial(_tokens, plan),
        settings=step_settings(plan.recipe.encode),
        needs=("preprocess", *(["tokenizer"] if plan.tokenizer.trains else [])),
        inputs={k: v for k, v in given_inputs(plan).items() if k == "tokenizer"},
    )


def _tokens(plan: Plan, context: StepContext) -> dict[str, Any]:
    from pipeline.data.preprocess.encode import encode_images

    count = encode_images(
        pixels_of(context.results), tokenizer_of(plan, context.results), context.path / "data",
        config=plan.recipe.encode, image_size=plan.recipe.preprocess.image_size,
        on_progress=context.on_progress,
    )  # fmt: skip
    return {"images": count}


def _captions_step(plan: Plan) -> Step:
    return Step(
        "captions",
        partial(_captions, plan),
        settings=step_settings(plan.recipe.caption_encoder),
        needs=("preprocess",),
        inputs={"encoder": plan.encoder.digest},
    )


def _captions(plan: Plan, context: StepContext) -> dict[str, Any]:
    from pipeline.data.preprocess.encode import encode_captions

    count = encode_captions(
        pixels_of(context.results), context.path / "data", config=plan.encoder.config,
        cache=plan.cache, on_progress=context.on_progress,
    )  # fmt: skip
    return {"captions": count}


# ---- Models --------------------------------------------------------------------------------------


def _tokenizer_step(plan: Plan) -> Step:
    source = plan.tokenizer.source
    features = Path(plan.tokenizer.config.perceptual_features)
    return Step(
        "tokenizer",
        partial(_tokenizer, plan),
        settings={
            "tokenizer": step_settings(plan.tokenizer.config),
            "image_size": plan.tokenizer.image_size,
        },
        needs=("preprocess",),
        inputs={
            **({"source": bundle_digest(source)} if source is not None else {}),
            **({"perceptual": file_digest(features)} if features.is_file() else {}),
        },
    )


def _tokenizer(plan: Plan, context: StepContext) -> dict[str, Any]:
    from pipeline.training.tokenizer import train_tokenizer

    tokenizer = plan.tokenizer
    return dict(
        train_tokenizer(
            context, pixels_of(context.results), tokenizer.config, tokenizer.image_size,
            cache=plan.cache, source=tokenizer.source,
        )
    )  # fmt: skip


def _aligner_step(plan: Plan) -> Step:
    source = plan.aligner_source
    return Step(
        "aligner",
        partial(_aligner, plan),
        settings={"aligner": step_settings(plan.recipe.aligner)},
        needs=("preprocess", "captions"),
        inputs={"source": bundle_digest(source)} if source is not None else {},
        version=2,
    )


def _aligner(plan: Plan, context: StepContext) -> dict[str, Any]:
    from pipeline.training.aligner import train_aligner

    train = partial(train_aligner, source=plan.aligner_source)
    return _train_judge(train, plan.recipe.aligner, plan, context)


def _judge_step(plan: Plan) -> Step:
    return Step(
        JUDGE,
        partial(_judge, plan),
        settings={"imagenet_judge": step_settings(plan.recipe.imagenet_judge)},
        needs=("preprocess", "captions"),
    )


def _judge(plan: Plan, context: StepContext) -> dict[str, Any]:
    from pipeline.evaluation.judges.imagenet_training import train_imagenet_judge

    return _train_judge(train_imagenet_judge, plan.recipe.imagenet_judge, plan, context)


def _train_judge(
    train: Callable[..., Mapping[str, Any]], config: Config, plan: Plan, context: StepContext
) -> dict[str, Any]:
    """What a judge is trained on: all pixels, and what the caption encoder made of the captions."""
    return dict(
        train(
            context, pixels_of(context.results), context.results["captions"].path / "data", config,
            image_size=plan.recipe.preprocess.image_size, encoder=plan.encoder.load(),
        )
    )  # fmt: skip


def generator_step(plan: Plan, candidate: Candidate) -> Step:
    """The step that trains a candidate and leaves its bundle."""
    needs, inputs = generator_inputs(plan, candidate)
    return Step(
        candidate.step,
        partial(_generator, plan, candidate),
        settings={"generator": step_settings(candidate.config)},
        needs=needs,
        inputs=inputs,
    )


def generator_inputs(plan: Plan, candidate: Candidate) -> tuple[tuple[str, ...], dict[str, str]]:
    """What a generator is trained on: the steps it needs, and digests of what no step makes."""
    reads = "tokens" if candidate.family.reads == "image_tokens" else "preprocess"
    trained = ["tokenizer"] if plan.tokenizer.trains else []
    needs = tuple(dict.fromkeys(["preprocess", reads, *trained, "captions"]))
    known = given_inputs(plan)
    if candidate.language_model:
        known["language_model"] = content_digest(candidate.language_model, cache=plan.cache)
    return needs, known


def _generator(plan: Plan, candidate: Candidate, context: StepContext) -> dict[str, Any]:
    from pipeline.training.generator import train_generator

    return dict(
        train_generator(
            context,
            generator_task(plan, candidate, context.results),
            encoder=plan.encoder.load(),
            caption_encoder=plan.encoder.config,
            split=plan.recipe.data.split,
        )
    )


def generator_task(plan: Plan, candidate: Candidate, results: Results) -> GeneratorTask:
    """What a worker needs to train a candidate. Of the styles that the shards promise it learns
    those that preprocessing accepted images of."""
    import pyarrow.parquet as pq

    from pipeline.text.caption_readers import KnownCaptions
    from pipeline.training.generator import SAMPLE_PROMPTS, GeneratorTask

    encoder = plan.encoder.load()
    pixels, tokenizer = pixels_of(results), tokenizer_of(plan, results)
    found = set(pq.read_table(pixels, columns=["style"])["style"].to_pylist())
    reads_tokens = candidate.family.reads == "image_tokens"
    return GeneratorTask(
        config=candidate.config,
        spec=plan.spec(candidate.config, found, candidate.language_model),
        sample_prompts=KnownCaptions.of(encoder, (*SAMPLE_PROMPTS, "")),
        tokenizer=tokenizer,
        images=results["tokens"].path / "data" if reads_tokens else pixels,
        captions=results["captions"].path / "data",
        base=plan.base,
        language_model=candidate.language_model,
    )  # fmt: skip
