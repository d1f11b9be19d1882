"""How good is a generator? Any `ImageGenerator` in, numbers with intervals and grids out.

    judge = Evaluator(eval_set, aligner=aligner, features=ImageNetFeatures(), encoder=encoder,
                  config=recipe.evaluate)
    floors = judge.real(), judge.tokenizer(tokenizer)        # what no generator can beat
    report = judge.generator(generator, "candidate", grids=directory)
    print(markdown_table([*floors, report]))

Metrics, by name ("/" parts the style from the metric for all styles but the first, gated one):

    kid_seen, kid_unseen, kid (both together)
                                    distance to the real pictures of the same captions; 0 is best
    retrieval_seen, retrieval_unseen, retrieval (both together)
                                    how often the aligner finds a picture's own caption among M
    retrieval_seen_zh ...           the same, asked in the other languages
    retrieval_seen_shuffled         against wrong captions: chance, or the aligner is fooled
    nearest_seen, nearest_unseen    distance to the nearest training picture
    copies_unseen                   share nearer to one than 95 % of new real pictures are
    seconds_per_image, latency_s  in batches, and alone
    guidance_1/retrieval_seen ...   at the further guidance scales of the configuration
    over_untuned/kid_unseen ...     the gain over another report's subject, the same pictures of
                                    both resampled together: above zero is better
    validation_loss                 as training measured it
    psnr_*, ssim_*                  of reconstructions
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
from pipeline.aligner import Aligner
from pipeline.bundle import load_generator
from pipeline.config import EvaluateConfig
from pipeline.contracts import (
    EvalReport,
    GenerationRequest,
    ImageGenerator,
    ImageTokenizer,
    Interval,
)
from pipeline.drawing import draw, image_grid, reconstruct, requests_for
from pipeline.evalset import EvalSet, ImageSet, num_other_images
from pipeline.text import HFCaptionEncoder, check_encoder

LATENCY_REQUESTS = 3
COPY_PERCENTILE = 5


def evaluate(
    generator: ImageGenerator,
    eval_set: EvalSet,
    *,
    aligner: Aligner,
    features: Callable[[Tensor], Tensor],
    encoder: HFCaptionEncoder,
    config: EvaluateConfig,
    subject: str,
    grids: Path | None = None,
) -> EvalReport:
    """Judge one generator. To judge several on the same pictures, keep one `Evaluator`."""
    judge = Evaluator(eval_set, aligner=aligner, features=features, encoder=encoder, config=config)
    return judge.generator(generator, subject, grids=grids)


@dataclass
class _Findings:
    """What a report is built from, collected set by set."""

    metrics: dict[str, Interval] = field(default_factory=dict)
    hits: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)


class Evaluator:
    """One evaluation set with everything about its real pictures and captions computed once.

    Args:
        eval_set: pictures, captions and training pictures.
        aligner: tells which caption a picture shows.
        features: uint8 (N, 3, H, W) -> (N, D) for KID, not those anything here trained on.
        encoder: the caption encoder the aligner was trained with.
        config: sizes, seeds, guidance scales.

    Raises:
        BundleError: the encoder is not the one the aligner was trained with.
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
        self.real_features = [features(pictures.images) for pictures in eval_set.sets]
        self.captions = [
            {
                language: aligner.embed_captions(*encoder.encode(texts))
                for language, texts in pictures.captions.items()
            }
            for pictures in eval_set.sets
        ]
        self._judged: dict[str, _Findings] = {}

    # ---- Subjects --------------------------------------------------------------------------------

    def bundles(
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
            paths: by the report's subject.
            tokenizer: the floor, and part of the grids.
            candidates: the subjects among them that were just trained, with validation losses.
            before: the subjects over which the candidates' gains are told.
            grids: an existing directory for the PNGs.
            pretrained_cache: of the caption encoder.

        Raises:
            BundleError: a bundle cannot be used.
        """
        found = [self.real(), self.tokenizer(tokenizer)]
        for name, path in paths.items():
            report = self.generator(
                load_generator(path, pretrained_cache=pretrained_cache),
                name,
                validation_loss=candidates.get(name),
                tokenizer=tokenizer,
                grids=grids,
            )
            found.append(report)
        return [self.with_gains(r, sorted(before)) if r.subject in candidates else r for r in found]

    def generator(
        self,
        generator: ImageGenerator,
        subject: str,
        *,
        validation_loss: float | None = None,
        tokenizer: ImageTokenizer | None = None,
        grids: Path | None = None,
    ) -> EvalReport:
        """Draw every caption once and judge the drawings.

        Args:
            subject: the report's name for it.
            validation_loss: added to the metrics.
            tokenizer: adds its reconstructions to the grids.
            grids: an existing directory for the PNGs; None draws none.
        """
        found, speed, paths = _Findings(), [], {}
        for index, pictures in enumerate(self.eval_set.sets):
            drawn = {}
            for language in self._languages(pictures):
                requests = requests_for(pictures, language, generator.styles, seed=self.config.seed)
                if language != self.eval_set.languages[0]:
                    requests = requests[: num_other_images(self.config)]
                drawn[language], seconds = self._draw(generator, requests)
                speed.extend(seconds)
                self._judge(found, index, drawn[language], language)
            if grids is not None:
                title = f"{pictures.style}-{pictures.name}"
                paths[title] = str(grids / f"{subject}-{title}.png")
                image_grid(pictures, drawn, tokenizer).save(paths[title])
        self._guidance(found, generator)
        found.metrics["seconds_per_image"] = self._mean(speed)
        found.metrics["latency_s"] = self._mean(self._alone(generator))
        if validation_loss is not None:
            found.metrics["validation_loss"] = Interval(*[validation_loss] * 3)
        return self._report(subject, found, paths)

    def real(self) -> EvalReport:
        """The real pictures themselves: the best that retrieval can be, and KID between real ones.

        KID compares the unseen set with as many training pictures of the style.
        """
        found = _Findings()
        rng = np.random.default_rng(self.config.seed)
        for index, pictures in enumerate(self.eval_set.sets):
            for language in self._languages(pictures):
                self._retrieve(found, index, pictures.images, language)
            if pictures.name == "unseen":
                pool = self.eval_set.training[pictures.style]
                chosen = pool[rng.permutation(len(pool))[: len(pictures)]]
                found.metrics[self._name(pictures, "kid")] = self._kid(
                    self.features(chosen), [index]
                )
                self._nearest(found, pictures, pictures.images)
        return self._report("real", found)

    def tokenizer(self, tokenizer: ImageTokenizer) -> EvalReport:
        """What image tokens leave of the real pictures: no generator on them can be better."""
        found = _Findings()
        for index, pictures in enumerate(self.eval_set.sets):
            images = reconstruct(tokenizer, pictures.images, self.config.batch_size)
            self._judge(found, index, images, self.eval_set.languages[0])
            for name, measure in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
                found.metrics[self._name(pictures, name)] = self._mean(
                    measure(images, pictures.images)
                )
        return self._report("tokenizer", found)

    def with_gains(self, report: EvalReport, over: Sequence[str]) -> EvalReport:
        """The report with how much better its generator is than others judged before.

        As "over_OTHER/METRIC": KID before minus KID after, retrieval after minus before.
        """
        gains = dict(report.metrics)
        for subject in over:
            before, after = self._judged[subject], self._judged[report.subject]
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

    def _kid_sets(self) -> dict[str, list[int]]:
        """The sets that each KID is of: every one, and a style's seen and unseen together."""
        sets: dict[str, list[int]] = {}
        for index, pictures in enumerate(self.eval_set.sets):
            sets[self._name(pictures, "kid")] = [index]
            sets.setdefault(f"{self._prefix(pictures.style)}kid", []).append(index)
        return sets

    # ---- Judging ---------------------------------------------------------------------------------

    def _languages(self, pictures: ImageSet) -> tuple[str, ...]:
        """All languages for the gated style, the first alone for the others."""
        languages = self.eval_set.languages
        return languages if pictures.style == self.eval_set.style else languages[:1]

    def _alone(self, generator: ImageGenerator) -> list[float]:
        """Seconds of a few requests, one at a time."""
        pictures, language = self.eval_set.sets[0], self.eval_set.languages[0]
        requests = requests_for(pictures, language, generator.styles, seed=self.config.seed)
        return draw(generator, requests[:LATENCY_REQUESTS], 1)[1]

    def _draw(
        self, generator: ImageGenerator, requests: Sequence[GenerationRequest]
    ) -> tuple[Tensor, list[float]]:
        """As large as the real pictures: a champion may be of another size than its challenger."""
        size = self.eval_set.sets[0].images.shape[-1]
        return draw(generator, requests, self.config.batch_size, image_size=size)

    def _guidance(self, found: _Findings, generator: ImageGenerator) -> None:
        """The gated style's seen set again at every further guidance scale."""
        config, language = self.config, self.eval_set.languages[0]
        for scale in config.guidance_scales:
            requests = requests_for(
                self.eval_set.sets[0], language, generator.styles, seed=config.seed, scale=scale
            )
            drawn, _ = self._draw(generator, requests)
            at_scale = _Findings()
            self._retrieve(at_scale, 0, drawn, language)
            found.metrics |= {
                f"guidance_{scale:g}/kid_seen": self._kid(self.features(drawn), [0]),
                f"guidance_{scale:g}/retrieval_seen": at_scale.metrics["retrieval_seen"],
            }

    def _judge(self, found: _Findings, index: int, images: Tensor, language: str) -> None:
        pictures = self.eval_set.sets[index]
        self._retrieve(found, index, images, language)
        if language == self.eval_set.languages[0]:
            found.features[index] = self.features(images)
            self._nearest(found, pictures, images)

    def _retrieve(self, found: _Findings, index: int, images: Tensor, language: str) -> None:
        """Retrieval, and as a control against captions moved on by one picture."""
        pictures = self.eval_set.sets[index]
        embedded, captions = self.aligner.embed_images(images), self.captions[index][language]
        first = language == self.eval_set.languages[0]
        suffix = "" if first else f"_{language}"
        name = self._name(pictures, "retrieval", suffix)
        found.hits[name] = metrics.retrieval_at_1(embedded, captions)
        found.metrics[name] = self._mean(found.hits[name])
        if first:
            wrong = torch.cat([captions[: len(images)].roll(1, 0), captions[len(images) :]])
            shuffled = self._mean(metrics.retrieval_at_1(embedded, wrong))
            found.metrics[self._name(pictures, "retrieval", "_shuffled")] = shuffled

    def _kid(self, features: Tensor, indices: Sequence[int]) -> Interval:
        """Of pictures of these sets, one after another."""
        real = torch.cat([self.real_features[i] for i in indices])
        return metrics.kid_interval(real, features, **self._resampling)

    def _nearest(self, found: _Findings, pictures: ImageSet, images: Tensor) -> None:
        training = self.eval_set.training[pictures.style]
        distances = metrics.nearest_distance(images, training)
        found.metrics[self._name(pictures, "nearest")] = self._mean(distances)
        if pictures.name == "unseen":
            new = metrics.nearest_distance(pictures.images, training)
            copies = distances < np.percentile(new, COPY_PERCENTILE)
            found.metrics[self._name(pictures, "copies")] = self._mean(copies)

    def _mean(self, values: Sequence[float] | NDArray[Any]) -> Interval:
        return metrics.mean_interval(np.asarray(values, dtype=float), **self._resampling)

    @property
    def _resampling(self) -> dict[str, int]:
        return {"bootstrap": self.config.bootstrap, "seed": self.config.seed}

    def _prefix(self, style: str) -> str:
        return "" if style == self.eval_set.style else f"{style}/"

    def _name(self, pictures: ImageSet, metric: str, suffix: str = "") -> str:
        return f"{self._prefix(pictures.style)}{metric}_{pictures.name}{suffix}"

    # ---- Reporting -------------------------------------------------------------------------------

    def _report(
        self, subject: str, found: _Findings, grids: Mapping[str, str] | None = None
    ) -> EvalReport:
        for style in dict.fromkeys(pictures.style for pictures in self.eval_set.sets):
            prefix = self._prefix(style)
            both = [found.hits[f"{prefix}retrieval_{name}"] for name in ("seen", "unseen")]
            found.hits[f"{prefix}retrieval"] = np.concatenate(both)
            found.metrics[f"{prefix}retrieval"] = self._mean(found.hits[f"{prefix}retrieval"])
        for name, indices in self._kid_sets().items() if found.features else ():
            drawn = torch.cat([found.features[i] for i in indices])
            found.metrics[name] = self._kid(drawn, indices)
        self._judged[subject] = found
        details = {
            "eval_set": self.eval_set.digest,
            "style": self.eval_set.style,
            "pictures": {f"{s.style}/{s.name}": len(s) for s in self.eval_set.sets},
            "captions": {
                f"{s.style}/{s.name}": len(s.captions[self.eval_set.languages[0]])
                for s in self.eval_set.sets
            },
        }
        return EvalReport(subject, found.metrics, details, dict(grids or {}))
