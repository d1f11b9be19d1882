"""Evaluating generators: any `contracts.ImageGenerator` in, an `EvalReport` out.

    evaluator = Evaluator(eval_set, aligner=aligner, features=ImageNetFeatures(), encoder=encoder,
                          config=recipe.evaluate)
    floors = evaluator.evaluate_real(), evaluator.evaluate_tokenizer(tokenizer)
    report = evaluator.evaluate_generator(generator, "candidate", grids=directory)
    print(markdown_table([*floors, report]))

The floors are what no generator can beat: the real images themselves, and what image tokens leave
of them. A metric is to be believed only where it ranks real above reconstructed above generated.

Metrics by name. The promotion gate reads those of the first style; those of every other style have
the style before them, as in "noto/kid_seen".

    kid_seen, kid_unseen, kid     distance to the real images of the same captions, of concepts that
                                  training showed, that it did not, and of both; 0 is best
    retrieval_seen, retrieval_unseen, retrieval
                                  how often the aligner finds an image's own caption among M
    retrieval_seen_zh ...         the same, prompted in the other languages
    retrieval_seen_shuffled       the same against wrong captions: chance, or the aligner is fooled
    nearest_seen, nearest_unseen  distance to the nearest training image
    copies_unseen                 share of images nearer to one than 95 % of new real images are
    seconds_per_image, latency_s  seconds per image in batches, and of a single request
    guidance_1/retrieval_seen ... at the further guidance scales of the configuration
    over_untuned/kid_unseen ...   the gain over another subject, both on the same images, resampled
                                  together; above zero is better
    validation_loss               as training measured it
    psnr_*, ssim_*                of reconstructions
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import metrics
from pipeline.bundles.bundle import load_generator
from pipeline.config import EvaluateConfig
from pipeline.contracts import (
    EvalReport,
    GenerationRequest,
    ImageGenerator,
    ImageTokenizer,
    Interval,
)
from pipeline.evaluation.aligner import Aligner
from pipeline.evaluation.eval_set import EvalSet, ImageSet, num_other_images
from pipeline.evaluation.samples import generate_images, image_grid, reconstruct, requests_for
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.text.encoder_identity import check_encoder

LATENCY_REQUESTS = 3
COPY_PERCENTILE = 5


@dataclass
class _Measurements:
    """What a report is made of, collected image set by image set.

    Attributes:
        metrics: by name.
        hits: by retrieval metric, whether each image's caption was found: (N,).
        features: by the set's index, of the generated images: (N, D).
    """

    metrics: dict[str, Interval] = field(default_factory=dict)
    hits: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)


class Evaluator:
    """One evaluation set; what depends on its real images and captions alone is computed once.

    Args:
        eval_set: real images, captions, and the training images.
        aligner: tells which caption an image shows.
        features: uint8 (N, 3, H, W) -> (N, D) for KID; nothing that is evaluated may have trained
            on them.
        encoder: the caption encoder that the aligner was trained with.
        config: sizes, seeds, guidance scales.

    Raises:
        BundleError: the encoder is not the one that the aligner was trained with.
    """

    def __init__(
        self,
        eval_set: EvalSet,
        *,
        aligner: Aligner,
        features: Callable[[Tensor], Tensor],
        encoder: HFCaptionEncoder,
        config: EvaluateConfig,
    ) -> None:
        self.eval_set, self.config = eval_set, config
        self.aligner, self.features = aligner, features
        if aligner.encoder is not None:
            check_encoder(aligner.encoder, encoder)
        self.real_features = [features(image_set.images) for image_set in eval_set.sets]
        self.captions = [
            {
                language: aligner.embed_captions(*encoder.encode(texts))
                for language, texts in image_set.captions.items()
            }
            for image_set in eval_set.sets
        ]
        self._measured: dict[str, _Measurements] = {}

    # ---- Subjects --------------------------------------------------------------------------------

    def evaluate_bundles(
        self,
        paths: Mapping[str, Path],
        *,
        tokenizer: ImageTokenizer,
        candidates: Mapping[str, float],
        before: Collection[str],
        grids: Path,
        pretrained_cache: Path,
    ) -> list[EvalReport]:
        """The floors and every bundle, one in memory at a time.

        Args:
            paths: of the bundles, by the report's subject.
            tokenizer: for the floor of reconstructions, and a column of the grids.
            candidates: the subjects among them that were just trained, with validation losses.
            before: the subjects over which the candidates' gains are reported.
            grids: an existing directory for the PNGs.
            pretrained_cache: where the caption encoder is found.

        Raises:
            BundleError: a bundle cannot be used.
        """
        reports = [self.evaluate_real(), self.evaluate_tokenizer(tokenizer)]
        for name, path in paths.items():
            report = self.evaluate_generator(
                load_generator(path, pretrained_cache=pretrained_cache),
                name,
                validation_loss=candidates.get(name),
                tokenizer=tokenizer,
                grids=grids,
            )
            reports.append(report)
        over = sorted(before)
        return [self.with_gains(r, over) if r.subject in candidates else r for r in reports]

    def evaluate_generator(
        self,
        generator: ImageGenerator,
        subject: str,
        *,
        validation_loss: float | None = None,
        tokenizer: ImageTokenizer | None = None,
        grids: Path | None = None,
    ) -> EvalReport:
        """Generate an image for every caption once, and measure the images.

        Args:
            subject: the report's name for it.
            validation_loss: added to the metrics.
            tokenizer: adds its reconstructions to the grids.
            grids: an existing directory for the PNGs; None makes none.
        """
        measured, seconds, paths = _Measurements(), list[float](), dict[str, str]()
        for index, image_set in enumerate(self.eval_set.sets):
            drawn: dict[str, Tensor] = {}
            for language in self._languages(image_set):
                requests = self._requests(generator, image_set, language)
                if language != self.eval_set.languages[0]:
                    requests = requests[: num_other_images(self.config)]
                drawn[language], each = self._generate(generator, requests)
                seconds.extend(each)
                self._measure(measured, index, drawn[language], language)
            if grids is not None:
                title = f"{image_set.style}-{image_set.name}"
                paths[title] = str(grids / f"{subject}-{title}.png")
                image_grid(image_set, drawn, tokenizer).save(paths[title])
        self._measure_guidance(measured, generator)
        measured.metrics["seconds_per_image"] = self._mean(seconds)
        measured.metrics["latency_s"] = self._mean(self._latencies(generator))
        if validation_loss is not None:
            measured.metrics["validation_loss"] = Interval(*[validation_loss] * 3)
        return self._report(subject, measured, paths)

    def evaluate_real(self) -> EvalReport:
        """The real images: the best that retrieval can be, and KID between two real sets.

        That KID compares the unseen set with as many training images of its style.
        """
        measured = _Measurements()
        rng = np.random.default_rng(self.config.seed)
        for index, image_set in enumerate(self.eval_set.sets):
            for language in self._languages(image_set):
                self._measure_retrieval(measured, index, image_set.images, language)
            if image_set.name == "unseen":
                pool = self.eval_set.training[image_set.style]
                chosen = self.features(pool[rng.permutation(len(pool))[: len(image_set)]])
                measured.metrics[self._name(image_set, "kid")] = self._kid(chosen, [index])
                self._measure_nearest(measured, image_set, image_set.images)
        return self._report("real", measured)

    def evaluate_tokenizer(self, tokenizer: ImageTokenizer) -> EvalReport:
        """What image tokens leave of the real images: no generator of such tokens can be better."""
        measured = _Measurements()
        for index, image_set in enumerate(self.eval_set.sets):
            images = reconstruct(tokenizer, image_set.images, self.config.batch_size)
            self._measure(measured, index, images, self.eval_set.languages[0])
            for name, metric in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
                values = metric(images, image_set.images)
                measured.metrics[self._name(image_set, name)] = self._mean(values)
        return self._report("tokenizer", measured)

    def with_gains(self, report: EvalReport, over: Sequence[str]) -> EvalReport:
        """The report with the gains of its subject over others that were evaluated before.

        They are called "over_OTHER/METRIC": KID before minus KID after, retrieval after minus
        before.
        """
        gains = dict(report.metrics)
        for subject in over:
            before, after = self._measured[subject], self._measured[report.subject]
            for name, hits in after.hits.items():
                gains[f"over_{subject}/{name}"] = metrics.paired_gain(
                    before.hits[name], hits, **self._resampling
                )
            for name, indices in self._kid_sets().items():
                gains[f"over_{subject}/{name}"] = metrics.kid_gain(
                    torch.cat([self.real_features[i] for i in indices]),
                    torch.cat([before.features[i] for i in indices]),
                    torch.cat([after.features[i] for i in indices]),
                    **self._resampling,
                )
        return replace(report, metrics=gains)

    # ---- Generating ------------------------------------------------------------------------------

    def _languages(self, image_set: ImageSet) -> tuple[str, ...]:
        """All languages for the gated style, the first alone for the others."""
        languages = self.eval_set.languages
        return languages if image_set.style == self.eval_set.style else languages[:1]

    def _requests(
        self,
        generator: ImageGenerator,
        image_set: ImageSet,
        language: str,
        guidance_scale: float | None = None,
    ) -> list[GenerationRequest]:
        return requests_for(
            image_set,
            language,
            generator.styles,
            seed=self.config.seed,
            guidance_scale=guidance_scale,
        )

    def _generate(
        self, generator: ImageGenerator, requests: Sequence[GenerationRequest]
    ) -> tuple[Tensor, list[float]]:
        """Images in the size of the real ones (a champion may have another size than its
        challenger), and seconds of each."""
        size = self.eval_set.sets[0].images.shape[-1]
        return generate_images(generator, requests, self.config.batch_size, image_size=size)

    def _latencies(self, generator: ImageGenerator) -> list[float]:
        """Seconds of a few requests, one at a time."""
        requests = self._requests(generator, self.eval_set.sets[0], self.eval_set.languages[0])
        return generate_images(generator, requests[:LATENCY_REQUESTS], 1)[1]

    # ---- Measuring -------------------------------------------------------------------------------

    def _measure(self, measured: _Measurements, index: int, images: Tensor, language: str) -> None:
        """All that is measured of images generated for the captions of a set in a language."""
        self._measure_retrieval(measured, index, images, language)
        if language == self.eval_set.languages[0]:
            measured.features[index] = self.features(images)
            self._measure_nearest(measured, self.eval_set.sets[index], images)

    def _measure_retrieval(
        self, measured: _Measurements, index: int, images: Tensor, language: str
    ) -> None:
        """Retrieval; and, as a control, with every image's own caption replaced by its
        neighbour's."""
        image_set = self.eval_set.sets[index]
        embedded, captions = self.aligner.embed_images(images), self.captions[index][language]
        first = language == self.eval_set.languages[0]
        name = self._name(image_set, "retrieval", "" if first else f"_{language}")
        measured.hits[name] = metrics.retrieval_at_1(embedded, captions)
        measured.metrics[name] = self._mean(measured.hits[name])
        if first:
            wrong = torch.cat([captions[: len(images)].roll(1, 0), captions[len(images) :]])
            shuffled = self._mean(metrics.retrieval_at_1(embedded, wrong))
            measured.metrics[self._name(image_set, "retrieval", "_shuffled")] = shuffled

    def _measure_nearest(
        self, measured: _Measurements, image_set: ImageSet, images: Tensor
    ) -> None:
        """Distances to the training images, by which copies of them are told."""
        training = self.eval_set.training[image_set.style]
        distances = metrics.nearest_distance(images, training)
        measured.metrics[self._name(image_set, "nearest")] = self._mean(distances)
        if image_set.name == "unseen":
            new = metrics.nearest_distance(image_set.images, training)
            copies = distances < np.percentile(new, COPY_PERCENTILE)
            measured.metrics[self._name(image_set, "copies")] = self._mean(copies)

    def _measure_guidance(self, measured: _Measurements, generator: ImageGenerator) -> None:
        """The gated style's seen set again, at every further guidance scale."""
        image_set, language = self.eval_set.sets[0], self.eval_set.languages[0]
        for scale in self.config.guidance_scales:
            requests = self._requests(generator, image_set, language, guidance_scale=scale)
            images, _ = self._generate(generator, requests)
            at_scale = _Measurements()
            self._measure_retrieval(at_scale, 0, images, language)
            measured.metrics |= {
                f"guidance_{scale:g}/kid_seen": self._kid(self.features(images), [0]),
                f"guidance_{scale:g}/retrieval_seen": at_scale.metrics["retrieval_seen"],
            }

    def _kid(self, features: Tensor, indices: Sequence[int]) -> Interval:
        """Of images of these sets together."""
        real = torch.cat([self.real_features[i] for i in indices])
        return metrics.kid_interval(real, features, **self._resampling)

    def _mean(self, values: Sequence[float] | NDArray[Any]) -> Interval:
        return metrics.mean_interval(np.asarray(values, dtype=float), **self._resampling)

    @property
    def _resampling(self) -> dict[str, int]:
        return {"bootstrap": self.config.bootstrap, "seed": self.config.seed}

    # ---- Reporting -------------------------------------------------------------------------------

    def _prefix(self, style: str) -> str:
        return "" if style == self.eval_set.style else f"{style}/"

    def _name(self, image_set: ImageSet, metric: str, suffix: str = "") -> str:
        return f"{self._prefix(image_set.style)}{metric}_{image_set.name}{suffix}"

    def _kid_sets(self) -> dict[str, list[int]]:
        """The indices of the sets that each KID is of: every set alone, and each style's two."""
        sets: dict[str, list[int]] = {}
        for index, image_set in enumerate(self.eval_set.sets):
            sets[self._name(image_set, "kid")] = [index]
            sets.setdefault(f"{self._prefix(image_set.style)}kid", []).append(index)
        return sets

    def _report(
        self, subject: str, measured: _Measurements, grids: Mapping[str, str] | None = None
    ) -> EvalReport:
        """Add the metrics of seen and unseen together, and of all KIDs; remember the subject."""
        for style in dict.fromkeys(image_set.style for image_set in self.eval_set.sets):
            prefix = self._prefix(style)
            both = [measured.hits[f"{prefix}retrieval_{name}"] for name in ("seen", "unseen")]
            measured.hits[f"{prefix}retrieval"] = np.concatenate(both)
            measured.metrics[f"{prefix}retrieval"] = self._mean(measured.hits[f"{prefix}retrieval"])
        for name, indices in self._kid_sets().items() if measured.features else ():
            drawn = torch.cat([measured.features[i] for i in indices])
            measured.metrics[name] = self._kid(drawn, indices)
        self._measured[subject] = measured
        return EvalReport(subject, measured.metrics, self._details(), dict(grids or {}))

    def _details(self) -> dict[str, Any]:
        sets = {f"{s.style}/{s.name}": s for s in self.eval_set.sets}
        language = self.eval_set.languages[0]
        return {
            "eval_set": self.eval_set.digest,
            "style": self.eval_set.style,
            "images": {name: len(image_set) for name, image_set in sets.items()},
            "captions": {name: len(s.captions[language]) for name, s in sets.items()},
        }
