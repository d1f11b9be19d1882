"""Measuring subjects: images in, tables of measurements out, in parallel on Ray.

    instruments = Instruments.prepare(eval_set, judge_specs(...), features=FeaturesSpec(),
                                      encoder=encoder, config=recipe.evaluate)
    measured = measure([RealImages(), BundleImages("candidate", bundle, cache)], instruments,
                       num_workers=2)
    measured["candidate"].save(directory)

The work is cut into batches that depend on the configuration alone; each is measured by one worker
with one thread, and the results are put together in their own order. The same bundle, data and seed
therefore give the same numbers on any number of workers.

Shapes: N images of a batch or set, M captions of a set, S pixels per side, D features, E embedding.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from pipeline import metrics
from pipeline.config import EvaluateConfig
from pipeline.errors import user_error
from pipeline.evaluation.compositions import LANGUAGES, compositions, score_composition
from pipeline.evaluation.eval_set import EvalSet, ImageSet, num_other_images
from pipeline.evaluation.features import FeaturesSpec
from pipeline.evaluation.judges.independence import check_independent
from pipeline.evaluation.judges.judge import Judge
from pipeline.evaluation.judges.spec import JudgeSpec
from pipeline.evaluation.judges.trained import ImageNetJudge
from pipeline.evaluation.measured import COLUMNS, COMPOSITIONS, SHUFFLED, Measured
from pipeline.evaluation.subjects import Images, Subject, Wanted
from pipeline.images.pixels import encode_png
from pipeline.progress import OnProgress, Progress
from pipeline.runtime import available_cpus, choose_device
from pipeline.text.caption_encoder import HFCaptionEncoder

LATENCY_REQUESTS = 5
COPY_PERCENTILE = 5
SET_ROWS = {
    "precision": metrics.precision, "density": metrics.density, "recall": metrics.recall,
    "coverage": metrics.coverage, "diversity": metrics.diversity,
}  # fmt: skip
FEWEST_NEIGHBOURS = 5  # that density and coverage look at
CAPTIONS_PER_TOPIC, MOST_TOPICS = 25, 8
TOPIC_CHARACTERS = 40


@dataclass(frozen=True)
class Batch:
    """One piece of work: some rows of one set, in one language, by one subject."""

    subject: int
    set: int
    wanted: Wanted


@dataclass(frozen=True)
class Instruments:
    """What subjects are measured with; computed once, then sent to every worker.

    Attributes:
        judges: specifications, opened by each worker.
        features: of the features that distances between sets are measured with.
        digests: of judges and features, by name.
        captions: by judge, set and language: l2-normalised embeddings (M, E).
        topics: by set, of the gated style's images; empty strings where there are none.
        copy_distance: by style; a nearer training image makes an image a copy.
        compositions: prompts that are in no training set, as a set without real images.
        notes: what a reader of the numbers should know.
    """

    eval_set: EvalSet
    config: EvaluateConfig
    judges: Sequence[JudgeSpec]
    features: FeaturesSpec
    digests: Mapping[str, str]
    captions: Mapping[str, Sequence[Mapping[str, Tensor]]]
    topics: Sequence[Sequence[str]]
    copy_distance: Mapping[str, float]
    compositions: ImageSet | None
    notes: tuple[str, ...] = ()

    @property
    def sets(self) -> tuple[ImageSet, ...]:
        """The evaluation's sets, and last the compositions if they are asked for."""
        found = self.eval_set.sets
        return (*found, self.compositions) if self.compositions is not None else found

    @classmethod
    def prepare(
        cls,
        eval_set: EvalSet,
        judges: Sequence[JudgeSpec],
        *,
        features: FeaturesSpec,
        encoder: HFCaptionEncoder,
        config: EvaluateConfig,
        models: Sequence[Path] = (),
    ) -> Instruments:
        """Embed all captions, group them by topic, and find how far new images are from old ones.

        Args:
            encoder: groups captions of similar meaning.
            models: directories of bundles and tokenizers that will be measured.

        Raises:
            BundleError: a judge cannot be loaded.
            RecipeError: a model was trained on what a judge, or the features, see through.
        """
        seeing = features.load()
        captions, digests = {}, {"features": seeing.identity.digest}
        notes = [check_independent(seeing, model) for model in models]
        for spec in judges:
            judge = spec.load()
            notes += [check_independent(judge, model) for model in models]
            digests[spec.name] = judge.digest
            captions[spec.name] = [
                {language: judge.embed_captions(texts) for language, texts in s.captions.items()}
                for s in eval_set.sets
            ]
        return cls(
            eval_set, config, judges, features, digests, captions,
            topics=_topics(eval_set, encoder, config.seed),
            copy_distance={
                s.style: _copy_distance(s.images, eval_set.training[s.style])
                for s in eval_set.sets
                if s.name == "unseen"
            },
            compositions=_composition_set(eval_set) if config.compositions else None,
            notes=tuple(dict.fromkeys(filter(None, notes))),
        )  # fmt: skip

    def details(self) -> dict[str, Any]:
        """What the evaluation is of, as JSON values."""
        eval_set = self.eval_set
        return {
            "eval_set": eval_set.digest,
            "style": eval_set.style,
            "languages": list(eval_set.languages),
            "images": {f"{s.style}/{s.name}": len(s) for s in eval_set.sets},
            "captions": {
                f"{s.style}/{s.name}": len(s.captions[eval_set.languages[0]]) for s in eval_set.sets
            },
            "judges": dict(self.digests),
            "notes": list(self.notes),
            "seed": self.config.seed,
        }

    def batches(self, subjects: Sequence[Subject]) -> list[Batch]:
        """All work, subject by subject; further guidance scales on the gated style's first set."""
        found = []
        for number, subject in enumerate(subjects):
            for index, image_set in enumerate(self.eval_set.sets):
                for language in self.languages(index):
                    count = len(image_set)
                    if language != self.eval_set.languages[0]:
                        count = min(count, num_other_images(self.config))
                    found += self._cut(number, index, language, None, count)
            if subject.generates:
                for scale in self.config.guidance_scales:
                    count, first = len(self.eval_set.sets[0]), self.eval_set.languages[0]
                    found += self._cut(number, 0, first, scale, count)
                if self.compositions is not None:
                    index = len(self.eval_set.sets)
                    for language in self.compositions.captions:
                        found += self._cut(number, index, language, None, len(self.compositions))
        return found

    def _cut(
        self, subject: int, index: int, language: str, guidance: float | None, count: int
    ) -> list[Batch]:
        size = self.config.batch_size
        return [
            Batch(
                subject,
                index,
                Wanted(language, range(i, min(i + size, count)), guidance, self.config.seed),
            )
            for i in range(0, count, size)
        ]

    def languages(self, index: int) -> tuple[str, ...]:
        """All languages for the gated style, the first alone for the others."""
        languages = self.eval_set.languages
        gated = self.eval_set.sets[index].style == self.eval_set.style
        return languages if gated else languages[:1]


def measure(
    subjects: Sequence[Subject],
    instruments: Instruments,
    *,
    num_workers: int,
    on_progress: OnProgress | None = None,
) -> dict[str, Measured]:
    """Measure every subject with Ray actors; Ray must be up.

    Args:
        num_workers: actors; on GPUs each has its own, on CPUs one core.

    Returns:
        By the subjects' names.

    Raises:
        TesseraError: a bundle or a judge cannot be used.
    """
    import ray
    from ray.exceptions import RayTaskError
    from ray.util import ActorPool

    batches = instruments.batches(subjects)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    num_workers = max(1, min(num_workers, len(batches), gpus or num_workers))
    actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Worker)
    shared = ray.put(instruments)
    actors: list[Any] = [actor.remote(shared, list(subjects)) for _ in range(num_workers)]
    try:
        found = []
        pool = ActorPool(actors)
        for result in pool.map(lambda worker, batch: worker.measure.remote(batch), batches):
            found.append(result)
            if on_progress is not None:
                on_progress(Progress(share=0.95 * len(found) / len(batches), step=len(found)))
        first: Any = actors[0]
        scalars: list[Mapping[str, float]] = [
            ray.get(first.costs.remote(i)) if s.generates else {} for i, s in enumerate(subjects)
        ]
    except RayTaskError as error:
        if told := user_error(error):
            raise told from error
        raise
    finally:
        for handle in actors:
            ray.kill(handle)
    return _assemble(subjects, instruments, batches, found, scalars)


def measure_here(subjects: Sequence[Subject], instruments: Instruments) -> dict[str, Measured]:
    """`measure` in this process, without Ray."""
    worker = Worker(instruments, subjects, threads=torch.get_num_threads())
    batches = instruments.batches(subjects)
    found = [worker.measure(batch) for batch in batches]
    scalars = [worker.costs(i) if s.generates else {} for i, s in enumerate(subjects)]
    return _assemble(subjects, instruments, batches, found, scalars)


@dataclass(frozen=True)
class Rows:
    """The measurements of a batch, and the seconds that its images took."""

    table: pa.Table
    seconds: float


class Worker:
    """Measures batches; holds one opened subject at a time.

    Args:
        threads: of PyTorch on a CPU; one keeps results the same on every machine.
    """

    def __init__(
        self, instruments: Instruments, subjects: Sequence[Subject], threads: int = 1
    ) -> None:
        self.instruments, self.subjects, self.threads = instruments, subjects, threads
        torch.set_num_threads(threads)
        device = str(choose_device())
        self.judges: dict[str, Judge] = {s.name: s.load(device) for s in instruments.judges}
        self.features = next(
            (judge.features for judge in self.judges.values() if self._shares(judge)), None
        ) or instruments.features.load(device)
        self._opened: tuple[int, Images] | None = None

    def measure(self, batch: Batch) -> Rows:
        """Make a batch's images and measure them."""
        subject = self.subjects[batch.subject]
        image_set = self.instruments.sets[batch.set]
        began = time.perf_counter()
        images = self._images(batch.subject)(image_set, batch.wanted)
        seconds = time.perf_counter() - began
        if image_set is self.instruments.compositions:
            return Rows(_composition_table(image_set, batch.wanted, images), seconds)
        return Rows(self._table(subject, batch, images), seconds)

    def costs(self, subject: int) -> dict[str, float]:
        """Seconds of a single request (the median of a few, on all cores), and megabytes."""
        image_set = self.instruments.eval_set.sets[0]
        images, language = self._images(subject), self.instruments.eval_set.languages[0]
        torch.set_num_threads(max(self.threads, available_cpus()))
        seconds = []
        for i in range(min(LATENCY_REQUESTS, len(image_set))):
            began = time.perf_counter()
            wanted = Wanted(language, range(i, i + 1), None, self.instruments.config.seed)
            images(image_set, wanted)
            seconds.append(time.perf_counter() - began)
        torch.set_num_threads(self.threads)
        return {"latency_s": float(np.median(seconds)), "size_mb": self.subjects[subject].size_mb()}

    def _images(self, subject: int) -> Images:
        if self._opened is None or self._opened[0] != subject:
            self._opened = None  # the old one is freed before the new one is loaded
            self._opened = subject, self.subjects[subject].open()
        return self._opened[1]

    def _table(self, subject: Subject, batch: Batch, images: Tensor) -> pa.Table:
        instruments, wanted = self.instruments, batch.wanted
        image_set, rows = instruments.eval_set.sets[batch.set], wanted.rows
        chosen = slice(rows.start, rows.stop)
        main = wanted.language == instruments.eval_set.languages[0] and wanted.guidance is None
        measures: dict[str, NDArray[Any]] = {}
        shared = any(map(self._shares, self.judges.values()))
        features = self.features(images) if main or shared else None
        for name, judge in self.judges.items():
            if features is not None and self._shares(judge):
                embedded = judge.embed_features(features)
            else:
                embedded = judge.embed_images(images)
            captions = instruments.captions[name][batch.set][wanted.language]
            captions = _own_first(captions, rows, subject.offset, len(image_set))
            measures[f"{name}_r1"] = metrics.recall_at_k(embedded, captions, 1)
            measures[f"{name}_r5"] = metrics.recall_at_k(embedded, captions, 5)
            measures[f"{name}_alignment"] = metrics.alignment(embedded, captions)
        nearest_key: list[str | None] = [None] * len(images)
        if main and not subject.offset:
            real = image_set.images[chosen]
            measures["sharpness"] = metrics.sharpness(images, real)
            if subject.name != "real" or image_set.name == "unseen":
                near, indices = metrics.nearest_neighbours(
                    images, instruments.eval_set.training[image_set.style]
                )
                keys = instruments.eval_set.training_keys[image_set.style]
                nearest_key = [keys[i] for i in indices]
                measures["nearest"] = near
                if image_set.name == "unseen":
                    measures["copies"] = near < instruments.copy_distance[image_set.style]
            if subject.name in ("tokenizer", "blurred"):
                measures["psnr"] = metrics.psnr(images, real)
                measures["ssim"] = metrics.ssim(images, real)
            for judge in self.judges.values():
                if isinstance(judge, ImageNetJudge) and len(judge.styles) > 1:
                    styles = [image_set.style] * len(images)
                    if features is not None and self._shares(judge):
                        match = judge.match_styles(features, styles)
                    else:
                        match = judge.style_match(images, styles)
                    measures["style_match"] = match.numpy()
        columns = {
            **_described(image_set, wanted, images),
            "topic": instruments.topics[batch.set][chosen],
            "nearest_key": nearest_key,
        }
        if features is not None and main and not subject.offset:
            columns["features"] = list(features.numpy())
        return _make_table(columns, measures, len(images))

    def _shares(self, judge: Judge) -> TypeGuard[ImageNetJudge]:
        """Whether a judge sees through the features that distances are measured with, so that one
        pass is enough."""
        spec = self.instruments.features
        return isinstance(judge, ImageNetJudge) and (spec.name, spec.resolution) == (
            "imagenet", judge.config.resolution,
        )  # fmt: skip


def _described(image_set: ImageSet, wanted: Wanted, images: Tensor) -> dict[str, Any]:
    """The columns that say what each image is."""
    chosen, count = slice(wanted.rows.start, wanted.rows.stop), len(images)
    texts = image_set.captions[wanted.language][chosen]
    return {
        "set": [f"{image_set.style}/{image_set.name}"] * count,
        "style": [image_set.style] * count,
        "split": [image_set.name] * count,
        "language": [wanted.language] * count,
        "guidance": [wanted.guidance] * count,
        "key": image_set.keys[chosen],
        "caption": texts,
        "words": [count_words(text) for text in texts],
        "image": [encode_png(image, {}) for image in images],
    }


def _make_table(
    columns: Mapping[str, Any], measures: Mapping[str, NDArray[Any]], count: int
) -> pa.Table:
    """COLUMNS, empty where nothing is given, and the measures."""
    empty = [None] * count
    table = pa.table({n: pa.array(columns.get(n, empty), kind) for n, kind in COLUMNS.items()})
    for name, values in measures.items():
        table = table.append_column(name, pa.array(np.asarray(values, float), pa.float64()))
    return table


def _composition_set(eval_set: EvalSet) -> ImageSet | None:
    """The compositions as a set of the gated style, in those of its languages that they have."""
    languages = [name for name in eval_set.languages if name in LANGUAGES]
    if not languages:
        return None
    entries = compositions()
    return ImageSet(
        COMPOSITIONS, eval_set.style, tuple(entry.id for entry in entries),
        torch.zeros(len(entries), *eval_set.sets[0].images.shape[1:], dtype=torch.uint8),
        {name: tuple(entry.prompt(name) for entry in entries) for name in languages},
    )  # fmt: skip


def _composition_table(image_set: ImageSet, wanted: Wanted, images: Tensor) -> pa.Table:
    """What the compositions' scorers say, by kind; of no style, so that they are in no slice of
    other images."""
    entries = compositions()[wanted.rows.start : wanted.rows.stop]
    scores = [score_composition(*pair) for pair in zip(entries, images, strict=True)]
    columns = {
        **_described(image_set, wanted, images),
        "style": [None] * len(images),
        "topic": [entry.kind for entry in entries],
    }
    table = _make_table(columns, {}, len(images))
    return table.append_column("composition", pa.array(np.array(scores), from_pandas=True))


def _own_first(captions: Tensor, rows: range, offset: int, count: int) -> Tensor:
    """A set's captions (M, E), those that the images of `rows` are judged against first.

    Args:
        offset: image i is judged against caption i + offset.
        count: images of the set; the captions after them are of none.
    """
    own = (torch.arange(rows.start, rows.stop) + offset) % count
    others = torch.ones(len(captions), dtype=torch.bool)
    others[own] = False
    return torch.cat([captions[own], captions[others]])


# ---- Putting results together --------------------------------------------------------------------


def _assemble(
    subjects: Sequence[Subject],
    instruments: Instruments,
    batches: Sequence[Batch],
    found: Sequence[Rows],
    scalars: Sequence[Mapping[str, float]],
) -> dict[str, Measured]:
    eval_set, everything = instruments.eval_set, dict[str, Measured]()
    for number, subject in enumerate(subjects):
        mine = [rows for rows, b in zip(found, batches, strict=True) if b.subject == number]
        table = pa.concat_tables([rows.table for rows in mine], promote_options="default")
        costs = dict(scalars[number])
        if subject.generates:
            costs["images_per_s"] = table.num_rows / sum(rows.seconds for rows in mine)
        measured = Measured(subject.name, table, costs, eval_set.style, eval_set.languages[0])
        everything[subject.name] = _with_guidance_gain(measured)
    real = everything.get("real")
    if real is None:
        return everything
    return {
        name: measured if name == SHUFFLED else with_set_measures(measured, real)
        for name, measured in everything.items()
    }


def with_set_measures(measured: Measured, real: Measured) -> Measured:
    """With the measures of an image within its set: of each style's images with features."""
    columns = {name: np.full(measured.rows.num_rows, np.nan) for name in SET_ROWS}
    for name in [name for name in measured.slices if name.startswith("style:")]:
        theirs = torch.from_numpy(real.features_of(name))
        ours = torch.from_numpy(measured.features_of(name))
        if len(theirs) <= FEWEST_NEIGHBOURS:
            continue
        has = measured.rows["features"].combine_chunks().is_valid()
        mask = measured.mask(name) & has.to_numpy(zero_copy_only=False)
        for measure, function in SET_ROWS.items():
            columns[measure][mask] = function(theirs, ours)
    rows = measured.rows
    for name, column in columns.items():
        if not np.isnan(column).all():
            rows = rows.append_column(name, pa.array(column, from_pandas=True))
    return replace(measured, rows=rows)


def _with_guidance_gain(measured: Measured) -> Measured:
    """With what guidance adds to the second judge's similarity of every image that was also made
    without guidance."""
    column = next((m for m in measured.measures if m == "imagenet_alignment"), None)
    if column is None or "guidance:1" not in measured.slices:
        return measured
    without = measured.mask("guidance:1")
    keys = measured.rows["key"].to_pylist()
    values = measured.rows[column].to_numpy()
    unguided = {keys[i]: values[i] for i in np.flatnonzero(without)}
    gains = np.full(len(keys), np.nan)
    for i in np.flatnonzero(measured.mask("seen")):
        gains[i] = values[i] - unguided.get(keys[i], np.nan)
    rows = measured.rows.append_column("guidance_gain", pa.array(gains, from_pandas=True))
    return replace(measured, rows=rows)


# ---- Preparing -----------------------------------------------------------------------------------


def _copy_distance(new: Tensor, training: Tensor) -> float:
    """The distance to the nearest training image that 95 % of new real images are beyond."""
    distances, _ = metrics.nearest_neighbours(new, training)
    return float(np.percentile(distances, COPY_PERCENTILE))


def _topics(eval_set: EvalSet, encoder: HFCaptionEncoder, seed: int) -> list[list[str]]:
    """Groups of captions of similar meaning, by k-means over the language model's states; each is
    named by the caption nearest to its centre. Of the gated style alone, and none of few images."""
    language = eval_set.languages[0]
    gated = [i for i, s in enumerate(eval_set.sets) if s.style == eval_set.style]
    texts = [text for i in gated for text in _own_captions(eval_set, i, language)]
    count = min(MOST_TOPICS, len(texts) // CAPTIONS_PER_TOPIC)
    names = [""] * len(texts)
    if count > 1:
        states = encoder.embed(texts).double().numpy()
        kmeans = KMeans(count, n_init=4, random_state=seed).fit(states)
        central = kmeans.transform(states).argmin(0)
        titles = [_title(texts[i]) for i in central]
        names = [titles[label] for label in kmeans.labels_]
    found, start = [], 0
    for i, image_set in enumerate(eval_set.sets):
        if i in gated:
            found.append(names[start : start + len(image_set)])
            start += len(image_set)
        else:
            found.append([""] * len(image_set))
    return found


def _own_captions(eval_set: EvalSet, index: int, language: str) -> Sequence[str]:
    image_set = eval_set.sets[index]
    return image_set.captions[language][: len(image_set)]


def _title(caption: str) -> str:
    """A caption as the name of a topic: short, and without what a metric's name cannot hold."""
    plain = re.sub(r"[^\w. -]+", " ", caption)
    return " ".join(plain.split())[:TOPIC_CHARACTERS].strip()


def count_words(text: str) -> int:
    """Words of a caption; of a language that is written without blanks, its characters."""
    return len(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W\u3040-\u30ff\u4e00-\u9fff]+", text))
