"""The chain from captioned pictures to a champion, step by step; every step is done once.

    chain = Chain(recipe, home, reporter)
    with chain.open(), ray_runtime():
        outcome = chain.retrain()

Steps, with what each depends on: preprocess (shards), tokenizer (pixels; or a given one),
captions and tokens (pixels, encoder, tokenizer), aligner (pixels, captions; or a trained one),
generator (tokens, captions, base), evaluate (all of these, and the champion), promote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline import evaluate, generation, reports
from pipeline.accounting import check_fraction
from pipeline.aligner import Aligner
from pipeline.aligning import train_aligner
from pipeline.artifacts import bundle_digest, file_digest, resolve_path
from pipeline.autoencoding import train_tokenizer
from pipeline.bundle import read_bundle, text_tokenizer_of
from pipeline.card import write_card
from pipeline.config import GeneratorConfig, PreprocessConfig, Recipe
from pipeline.contracts import Decision, EvalReport
from pipeline.encode import encode_captions, encode_images
from pipeline.evalset import EvalSet
from pipeline.features import ImageNetFeatures
from pipeline.model_registry import ModelRegistry, ResolvedModel, resolve_model
from pipeline.models import load_family
from pipeline.models._captions import KnownCaptions
from pipeline.preflight import check_generator_network, check_networks, check_recipe
from pipeline.preprocess import preprocess
from pipeline.pretrained import content_digest, find_language_model
from pipeline.promotion import choose, decide
from pipeline.runtime import check_disk, choose_device
from pipeline.shards import locate, read_manifest, verify
from pipeline.steps import Reporter, StepContext, StepResult, Workspace, exclusive
from pipeline.text import HFCaptionEncoder, check_available, load_caption_encoder
from pipeline.tokenizers._saved import load_tokenizer, tokenizer_shape_of_source, tokenizer_source
from pipeline.tracking import RunHandle, RunLogger, Tracker

NEEDED_MB = 2_000


@dataclass(frozen=True)
class Outcome:
    """What a retrain came to.

    Attributes:
        bundle: the candidate.
        reports: by subject: candidate, real, tokenizer, and untuned and champion where they exist;
            of several candidates the others by their names.
        decision: of the gate.
        choice: why this candidate, one sentence for each of several; empty for a single one.
        version: the candidate's in the model registry.
        seconds: by step; 0 for steps that were done before.
        run: the parent MLflow run.
        pixels: the preprocessed pictures, to compare with.
    """

    bundle: Path
    reports: dict[str, EvalReport]
    decision: Decision
    version: str
    seconds: dict[str, float]
    run: RunHandle
    pixels: Path
    choice: tuple[str, ...] = ()


class Chain:
    """One recipe's steps in one home directory.

    Making one checks what the recipe names, before Ray or any work is started; the steps run inside
    `open` and with Ray up.

    Raises:
        TesseraError: shards, base, caption encoder, tracking server or disk space are lacking.
    """

    def __init__(self, recipe: Recipe, home: Path, reporter: Reporter) -> None:
        home = home.absolute()  # workers may run in another directory
        self.recipe, self.home, self.reporter = recipe, home, reporter
        self.cache = home / "pretrained"
        self.base = resolve_model(recipe.base, home=home).path if recipe.base else None
        self.tokenizer_config = section = recipe.tokenizer
        self.tokenizer_source = tokenizer_source(self.base, section, recipe.preprocess.image_size)
        self.given_tokenizer: Path | None = self.tokenizer_source
        if section.is_trained(on_base=self.base is not None):
            self.tokenizer_config = tokenizer_shape_of_source(section, self.tokenizer_source)
            self.given_tokenizer = None
        self.manifests = {uri: read_manifest(uri) for uri in self.shard_sets}
        check_available(recipe.caption_encoder, cache=self.cache)
        check_recipe(
            recipe,
            self.manifests,
            self._encoder,
            tokenizer=self.tokenizer_config if self.given_tokenizer is None else None,
            base=self.base,
            cache=self.cache,
        )
        self._drawn_with = check_networks(
            recipe,
            tokenizer=self.tokenizer_config,
            given_tokenizer=self.given_tokenizer,
            encoder=self._encoder,
        )
        self.candidates = {
            name: self.checked(config, f"candidates.{name}" if recipe.candidates else "generator")
            for name, config in recipe.generators.items()
        }
        check_disk(home, NEEDED_MB)
        self.tracker = Tracker(home, recipe.tracking.sinks)
        self.model_registry = ModelRegistry(home, self.tracker.client)
        self._workspace: Workspace | None = None

    def checked(self, config: GeneratorConfig, section: str = "generator") -> GeneratorConfig:
        """A generator's section with what it takes from the base.

        Raises:
            TesseraError: it cannot be trained.
        """
        shaped = generation.shape_of_base(config, self.base)
        generation.check_generator(shaped, section)
        check_generator_network(
            shaped, self.manifests, tokenizer=self._drawn_with, base=self.base,
            encoder=self._encoder, language_model=self._language_model(shaped),
        )  # fmt: skip
        return shaped

    @property
    def _encoder(self) -> HFCaptionEncoder:
        return load_caption_encoder(
            self.recipe.caption_encoder, cache=self.cache, device=str(choose_device())
        )

    @contextmanager
    def open(self) -> Iterator[RunHandle]:
        """Hold the home directory and a parent run; the steps below need both."""
        with exclusive(self.home), self.tracker.run(self.recipe.name) as parent:
            with RunLogger(parent) as logger:
                logger.params({"recipe": self.recipe.name, "base": self.recipe.base})
            self._workspace = Workspace(self.home, self.tracker, parent, self.reporter)
            for uri, manifest in self.manifests.items():
                name = uri.rstrip("/").rpartition("/")[2]
                self.tracker.log_dataset(parent, name=name, digest=manifest.digest, uri=uri)
            licenses = {name for m in self.manifests.values() for name in m.licenses}
            RunLogger(parent).tags({"licenses": ", ".join(sorted(licenses))})
            yield parent

    @property
    def workspace(self) -> Workspace:
        assert self._workspace is not None, "steps run inside Chain.open()"
        return self._workspace

    def retrain(self) -> Outcome:
        """Every step, in order, to the decision; inside `open`."""
        parent = self.workspace.parent
        winner, choice = self.choice
        bundle, found = self.generators[winner].path / "bundle", dict(self.judged)
        if winner != "candidate":
            found["candidate"] = replace(found.pop(winner), subject=f"candidate ({winner})")
            RunLogger(parent).tags({"candidate": winner})
        decision, version = self._promote(bundle, found, choice)
        with RunLogger(parent) as logger:
            logger.metrics(reports.metric_values(found["candidate"]))
        return Outcome(
            bundle, found, decision, version,
            dict(self.workspace.seconds), parent, self.pixels, choice,
        )  # fmt: skip

    # ---- Data ------------------------------------------------------------------------------------

    @property
    def shard_sets(self) -> list[str]:
        return [locate(uri, self.home) for uri in self.recipe.data.shards]

    @cached_property
    def preprocessed(self) -> StepResult:
        """Shards -> pixels. How many bad ones are tolerated is no part of the step's key."""
        recipe = self.recipe
        limit = recipe.preprocess.max_bad_fraction
        default = PreprocessConfig.model_fields["max_bad_fraction"].default
        settings = recipe.preprocess.model_copy(update={"max_bad_fraction": default})

        def work(context: StepContext) -> dict[str, Any]:
            report = preprocess(
                self.shard_sets, context.path / "data", data=recipe.data, config=recipe.preprocess,
                on_progress=context.on_progress,
            )  # fmt: skip
            values = asdict(report)
            (context.path / "ray_data_stats.txt").write_text(values.pop("stats"))
            RunLogger(context.run).files(context.path / "ray_data_stats.txt", folder="data")
            return values

        data = recipe.data.model_dump(mode="json", exclude={"shards"})
        result = self.workspace.run(
            "preprocess",
            work,
            settings={"data": data, "preprocess": settings.model_dump(mode="json")},
            inputs={f"shards-{i}": m.digest for i, m in enumerate(self.manifests.values())}
            | self._lacking(),
        )
        check_fraction(result.values["reasons"], result.values["promised"], limit)
        return result

    def _lacking(self) -> dict[str, str]:
        """The shards that may be missing and are, by set: once they are back, work is done anew."""
        if not self.recipe.data.allow_missing_shards:
            return {}
        found = {}
        for i, uri in enumerate(self.manifests):
            if files := [p.file for p in verify(uri) if p.kind != "surplus"]:
                found[f"shards-{i}-without"] = " ".join(files)
        return found

    @property
    def pixels(self) -> Path:
        return self.preprocessed.path / "data" / "pixels"

    @cached_property
    def captions(self) -> StepResult:
        """The frozen encoder's states of every distinct caption."""
        config = self.recipe.caption_encoder
        return self.workspace.run(
            "captions",
            lambda context: {
                "captions": encode_captions(
                    self.pixels, context.path / "data", config=config, cache=self.cache,
                    on_progress=context.on_progress,
                )
            },
            settings=config.model_dump(mode="json"),
            inputs={
                "pixels": self.preprocessed.digest,
                "encoder": content_digest(find_language_model(config.model, cache=self.cache)),
            },
        )  # fmt: skip

    @cached_property
    def tokens(self) -> StepResult:
        """The tokenizer's image tokens of every picture."""
        recipe = self.recipe
        return self.workspace.run(
            "tokens",
            lambda context: {
                "pictures": encode_images(
                    self.pixels, self.tokenizer, context.path / "data", config=recipe.encode,
                    image_size=recipe.preprocess.image_size, on_progress=context.on_progress,
                )
            },
            settings=recipe.encode.model_dump(mode="json"),
            inputs={"pixels": self.preprocessed.digest, "tokenizer": bundle_digest(self.tokenizer)},
        )  # fmt: skip

    # ---- Models ----------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Path:
        """The given tokenizer's directory, or that of one trained on the pictures alone."""
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        config, source = self.tokenizer_config, self.tokenizer_source
        size = self.recipe.preprocess.image_size
        features = Path(config.perceptual_features)

        trained = self.workspace.run(
            "tokenizer",
            lambda context: train_tokenizer(
                context, self.pixels, config, size, cache=self.cache, source=source
            ),
            settings={"tokenizer": config.model_dump(mode="json"), "image_size": size},
            inputs={
                "pixels": self.preprocessed.digest,
                "source": bundle_digest(source) if source else "",
                "perceptual": file_digest(features) if features.is_file() else "",
            },
        )
        return trained.path / "bundle"

    @cached_property
    def aligner(self) -> Path:
        """A trained aligner's directory, or one trained on all pictures and captions."""
        config = self.recipe.aligner
        if config.source is not None:
            return resolve_path(config.source).absolute()
        trained = self.workspace.run(
            "aligner",
            lambda context: train_aligner(
                context, self.pixels, self.captions.path / "data", config,
                image_size=self.recipe.preprocess.image_size, encoder=self._encoder,
            ),
            settings={"aligner": config.model_dump(mode="json")},
            inputs={"pixels": self.preprocessed.digest, "captions": self.captions.digest},
        )  # fmt: skip
        return trained.path / "bundle"

    @cached_property
    def generators(self) -> dict[str, StepResult]:
        """Every candidate by name: a bundle trained on pictures and captions."""
        return {name: self._generator(name) for name in self.candidates}

    def _generator(self, name: str) -> StepResult:
        config = self.candidates[name]
        return self.workspace.run(
            f"generator-{name}" if self.recipe.candidates else "generator",
            lambda context: generation.train_generator(
                context,
                self.generator_task(config, self._encoder),
                encoder=self._encoder,
                caption_encoder=self.recipe.caption_encoder,
                split=self.recipe.data.split,
            ),
            settings={"generator": config.model_dump(mode="json")},
            inputs=self.generator_inputs(config),
        )

    def generator_inputs(self, config: GeneratorConfig) -> dict[str, str]:
        """Digests of all that a generator is trained on; makes what is not made yet."""
        reads = load_family(config.family).reads
        images = self.tokens if reads == "image_tokens" else self.preprocessed
        language_model = self._language_model(config)
        return {
            reads: images.digest,
            "captions": self.captions.digest,
            "tokenizer": bundle_digest(self.tokenizer),
            "base": bundle_digest(self.base) if self.base else "",
            "language_model": content_digest(language_model) if language_model else "",
        }

    def generator_task(
        self, config: GeneratorConfig, encoder: HFCaptionEncoder
    ) -> generation.GeneratorTask:
        """What a worker needs to train a generator of that section."""
        found = set(pq.read_table(self.pixels, columns=["style"])["style"].to_pylist())
        language_model = self._language_model(config)
        spec = generation.make_spec(
            load_tokenizer(self.tokenizer), encoder.width, config.data.kept(found), self.base,
            config, language_model,
        )  # fmt: skip
        on_tokens = load_family(config.family).reads == "image_tokens"
        return generation.GeneratorTask(
            config=config,
            spec=spec,
            sample_prompts=KnownCaptions.of(encoder, (*generation.SAMPLE_PROMPTS, "")),
            tokenizer=self.tokenizer,
            images=self.tokens.path / "data" if on_tokens else self.pixels,
            captions=self.captions.path / "data",
            base=self.base,
            language_model=language_model,
        )

    def _language_model(self, config: GeneratorConfig) -> str | None:
        """Where the pretrained model, or the base's tokenizer of it, lies, if there is any."""
        if self.base is not None:
            return text_tokenizer_of(self.base)
        name = load_family(config.family).language_model(config)
        return find_language_model(name, cache=self.cache) if name else None

    # ---- Choosing --------------------------------------------------------------------------------

    @cached_property
    def champion(self) -> ResolvedModel | None:
        return self.model_registry.champion(self.recipe.promote.model_name)

    @cached_property
    def evaluation(self) -> StepResult:
        """Candidates, champion and untuned base on the same pictures, the floors beside them."""
        subjects = {name: step.path / "bundle" for name, step in self.generators.items()}
        known = {bundle_digest(path) for path in subjects.values()}
        if self.base is not None:
            subjects["untuned"] = self.base
        champion = self.champion
        if champion is not None and bundle_digest(champion.path) not in known:
            subjects["champion"] = champion.path
        return self.workspace.run(
            "evaluate",
            partial(self._evaluate, subjects=subjects),
            settings=self.recipe.evaluate.model_dump(mode="json") | {"format": reports.FORMAT},
            inputs={
                "pixels": self.preprocessed.digest,
                "aligner": bundle_digest(self.aligner),
                **{name: bundle_digest(path) for name, path in subjects.items()},
                **self._crowned(),
            },
        )

    @cached_property
    def judged(self) -> dict[str, EvalReport]:
        """What evaluation says, by subject."""
        values = self.evaluation.values["reports"]
        return {name: reports.from_dict(report) for name, report in values.items()}

    @property
    def champion_name(self) -> str | None:
        """The subject that is the champion, which may be a candidate; None without a champion."""
        if self.champion is None:
            return None
        digest = bundle_digest(self.champion.path)
        same = [n for n, s in self.generators.items() if bundle_digest(s.path / "bundle") == digest]
        return same[0] if same else "champion"

    def _crowned(self) -> dict[str, str]:
        """Which of several candidates is the champion, if one is: gains are told over that one."""
        name = self.champion_name
        return {"champion_is": name} if self.recipe.candidates and name in self.generators else {}

    @property
    def champion_report(self) -> EvalReport | None:
        name = self.champion_name
        return None if name is None else self.judged[name]

    @cached_property
    def choice(self) -> tuple[str, tuple[str, ...]]:
        """The candidate that goes to the gate, and why it of several."""
        if not self.recipe.candidates:
            return "candidate", ()
        candidates = {name: self.judged[name] for name in self.generators}
        return choose(candidates, self.champion_report, self.recipe.promote)

    def _evaluate(self, context: StepContext, *, subjects: Mapping[str, Path]) -> dict[str, Any]:
        recipe = self.recipe
        eval_set = EvalSet.from_parquet(
            self.pixels, recipe.evaluate, image_size=recipe.preprocess.image_size
        )
        judge = evaluate.Evaluator(
            eval_set,
            aligner=Aligner.load(self.aligner, device=choose_device()),
            features=ImageNetFeatures(device=choose_device()),
            encoder=self._encoder,
            config=recipe.evaluate,
        )
        (context.path / "grids").mkdir(exist_ok=True)
        found = judge.bundles(
            subjects,
            tokenizer=load_tokenizer(self.tokenizer),
            candidates={n: s.values["validation_loss"] for n, s in self.generators.items()},
            before={"untuned", self.champion_name} & subjects.keys(),
            grids=context.path / "grids",
            pretrained_cache=self.cache,
        )
        (context.path / "report.md").write_text(reports.markdown_table(found))
        logger = RunLogger(context.run)
        logger.files(context.path / "grids", folder="grids")
        logger.files(context.path / "report.md", folder="")
        return {"reports": {report.subject: reports.to_dict(report) for report in found}}

    def _promote(
        self, bundle: Path, found: Mapping[str, EvalReport], choice: tuple[str, ...]
    ) -> tuple[Decision, str]:
        """Decide, register the candidate, and make it champion if it won; idempotent."""
        name, parent = self.recipe.promote.model_name, self.workspace.parent
        champion = self.champion
        if champion is not None and bundle_digest(champion.path) == bundle_digest(bundle):
            reason = f"it is already the champion, version {champion.version}"
            return Decision(True, (reason,)), champion.version
        decision = decide(found["candidate"], self.champion_report, self.recipe.promote)
        decision = replace(decision, reasons=(*decision.reasons, *self._other_splits()))
        write_card(
            bundle, self.recipe, found, list(self.manifests.values()),
            pixels=self.pixels, seconds=self.workspace.cost,
        )  # fmt: skip
        version = self.model_registry.register(bundle, model_name=name, handle=parent)
        record = {"promoted": decision.promoted, "reasons": decision.reasons, "version": version}
        if choice:
            record["choice"] = choice
        self.tracker.log_decision(parent, record)
        if decision.promoted:
            self.model_registry.set_champion(name, version)
        return decision, version

    def _other_splits(self) -> Iterator[str]:
        """A sentence for the base and the champion each that knows what is held out here."""
        here = self.recipe.data.split
        paths = {"base": self.base, "champion": self.champion and self.champion.path}
        for name, path in paths.items():
            there = None if path is None else read_bundle(path).split
            if there not in (None, here):
                yield (
                    f"note: the {name} was trained with another split ({there}) and may have seen "
                    f"what is unseen in this one ({here})"
                )
