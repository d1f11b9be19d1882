"""How often the promotion gate promotes a model that is no better, and one that is.

    python tests/benchmarks/gate.py simulate --trials 400
    python tests/benchmarks/gate.py models --home HOME

`simulate` draws tables of measurements from a population whose truth is known: every caption has a
difficulty, which two models share, so that their measurements of one caption are correlated.

`models` takes the shipped base and data. Equal models are the base with other seeds (of every
caption, two of its draws) and trainings of one recipe with other seeds (every pair, both ways
round). Better models are the base over itself with worse settings, and trainings over the base.
Drawn images and measurements are kept in HOME: interrupted, the same command goes on. Trials share
images, so that a share of promotions varies more than its interval says.

Both print one JSON line per case and number of images, with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from gate_simulation import simulate
from numpy.typing import NDArray
from torch import Tensor

from jobs.console import ConsoleReporter
from pipeline.artifacts import ASSETS
from pipeline.bundles.bundle import load_generator
from pipeline.chain.plan import Plan, resolve
from pipeline.chain.promotion import decide
from pipeline.chain.table import JUDGE, judges_of, pixels_of, tokenizer_of
from pipeline.chain.workflow import run_steps
from pipeline.config import PromoteConfig, load_recipe
from pipeline.contracts import Decision
from pipeline.evaluation.eval_set import EvalSet, ImageSet, num_other_images
from pipeline.evaluation.features import FeaturesSpec
from pipeline.evaluation.judges.spec import judge_specs
from pipeline.evaluation.measured import Measured
from pipeline.evaluation.measuring import (
    SET_ROWS,
    Instruments,
    measure_here,
    with_set_measures,
)
from pipeline.evaluation.samples import requests_for
from pipeline.evaluation.scores import Comparison
from pipeline.evaluation.subjects import (
    BlurredImages,
    Images,
    RealImages,
    ReconstructedImages,
    Subject,
    Wanted,
)
from pipeline.evaluation.validity import Validity, validity_of


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z, share = 1.96, successes / trials
    middle = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return (middle - reach) / (1 + z * z / trials), (middle + reach) / (1 + z * z / trials)


def summary(decisions: Iterable[Decision]) -> dict[str, Any]:
    """Promotions with their interval, and how often each rule said no (yes, of `improve`)."""
    listed = list(decisions)
    promoted = sum(decision.promoted for decision in listed)
    votes: Counter[str] = Counter()
    for decision in listed:
        for verdict in decision.verdicts:
            if verdict.outcome == ("yes" if verdict.rule == "improve" else "no"):
                metric = (
                    verdict.metric.partition("/")[0] if verdict.rule == "slice" else verdict.metric
                )
                votes[f"{verdict.rule} {verdict.outcome}: {metric}"] += 1
    low, high = wilson(promoted, len(listed))
    return {
        "trials": len(listed), "promoted": promoted, "share": round(promoted / len(listed), 3),
        "low": round(low, 3), "high": round(high, 3), "votes": dict(votes.most_common()),
    }  # fmt: skip


# ---- Real models ---------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "name": "gate",
    "base": "asset:base",
    "data": {"shards": ["asset:emoji"]},
    "aligner": {"source": "asset:aligner"},
    "encode": {"num_views": 1},
    "generator": {
        "data": {"style_weights": {"twemoji": 3}},
        "label_smoothing": 0.0,
        "train": {
            "optimizer": "muon", "learning_rate": 2e-4, "muon_learning_rate": 0.004,
            "batch_size": 64, "max_steps": 150, "warmup_steps": 20, "validate_every": 150,
            "validation_batches": 1, "restore": "last", "ema_decay": 0.99, "num_workers": 1,
        },
    },
    "evaluate": {"num_images": 180, "num_other_images": 24, "styles": ["twemoji", "noto"]},
}  # fmt: skip
"""The demo's, but for a shorter training of the generator alone."""

WORSE: dict[str, dict[str, Any]] = {
    "guidance 1.5": {"guidance_scale": 1.5},
    "guidance 1": {"guidance_scale": 1.0},
    "2 steps": {"num_steps": 2},
    "temperature 2": {"temperature": 2.0},
}
"""Settings by which the base draws worse: 3, 12 and 1 are its own."""
SEEDS_APART = 100_000


@dataclass(frozen=True)
class Drawn(Subject):
    """A subject of evaluation: images that `draw` left in a file."""

    name: str
    file: Path
    offset: int = 0
    generates: bool = False

    def open(self) -> Images:
        """See subjects.Subject."""
        kept = dict(np.load(self.file))

        def images(image_set: ImageSet, wanted: Wanted) -> Tensor:
            found = kept[f"{image_set.style}/{image_set.name}/{wanted.language}"]
            return torch.from_numpy(found[wanted.rows.start : wanted.rows.stop])

        return images


class Home:
    """What is drawn and measured once, and kept.

    Args:
        path: the home directory.
        style: of the images that the gate reads.
    """

    def __init__(self, path: Path, style: str) -> None:
        self.path, self.style = path, style
        styles = [style, *(s for s in RECIPE["evaluate"]["styles"] if s != style)]
        self.plan = self._plan(f"evaluate.styles=[{', '.join(styles)}]")
        self.results = run_steps(self.plan, ConsoleReporter(), "preprocess", "captions", JUDGE)
        self.pixels = pixels_of(self.results)
        recipe = self.plan.recipe
        self.config = recipe.evaluate.model_copy(update={"compositions": False})
        self.eval_set = EvalSet.from_parquet(self.pixels, self.config, image_size=64)
        self.folder = path / "gate" / style
        self.folder.mkdir(parents=True, exist_ok=True)

    def _plan(self, *overrides: str) -> Plan:
        recipe_file = self.path / "gate.yaml"
        recipe_file.write_text(json.dumps(RECIPE))
        return resolve(load_recipe(recipe_file, overrides, environment={}), self.path)

    def trained(self, seed: int) -> Path:
        """The bundle of the recipe's training with this seed."""
        plan = self._plan(f"generator.train.seed={seed}")
        return run_steps(plan, ConsoleReporter(), "generator")["generator"].bundle

    def draw(self, name: str, bundle: Callable[[], Path], seed: int = 0, **changes: Any) -> Drawn:
        """Every image of the evaluation set, drawn once.

        Args:
            bundle: makes it, if the images are not there yet.
            seed: of the requests.
            changes: to the requests.
        """
        file = self.folder / f"{name}.npz"
        if not file.exists():
            generator = load_generator(bundle(), pretrained_cache=self.plan.cache)
            first, *_ = self.eval_set.languages
            drawn: dict[str, Any] = {}
            for image_set in self.eval_set.sets:
                gated = image_set.style == self.style
                for language in self.eval_set.languages if gated else (first,):
                    count = len(image_set)
                    if language != first:
                        count = min(count, num_other_images(self.config))
                    requests = requests_for(
                        image_set, language, generator.styles, seed=SEEDS_APART * seed
                    )[:count]
                    batches = [
                        generator.generate([replace(r, **changes) for r in requests[i : i + 48]])
                        for i in range(0, count, 48)
                    ]
                    key = f"{image_set.style}/{image_set.name}/{language}"
                    drawn[key] = torch.cat(batches).cpu().numpy()
            np.savez(file, **drawn)
        return Drawn(name, file)

    def measured(self, subjects: Sequence[Subject]) -> dict[str, Measured]:
        """The measurements of the floors and of these subjects; each is measured once."""
        floors: list[Subject] = [
            RealImages(),
            ReconstructedImages(tokenizer_of(self.plan, self.results)),
            BlurredImages(),
            RealImages("shuffled", offset=1),
        ]
        wanted = [*floors, *subjects]
        missing = [s for s in wanted if not (self.folder / f"{s.name}.parquet").exists()]
        if missing:
            recipe = self.plan.recipe
            judges = judge_specs(
                self.config.judges,
                trained=judges_of(self.plan, self.results),
                caption_encoder=self.plan.encoder.config,
                cache=self.plan.cache,
            )  # fmt: skip
            instruments = Instruments.prepare(
                self.eval_set,
                judges,
                features=FeaturesSpec(self.config.features, recipe.imagenet_judge.resolution),
                encoder=self.plan.encoder.load(),
                config=self.config,
            )
            for subject in missing:
                found = measure_here([RealImages(), subject], instruments)
                found[subject.name].save(self.folder)
                print(f"measured {subject.name}", file=sys.stderr, flush=True)
        return {s.name: Measured.load(self.folder, s.name) for s in wanted}


Case = Sequence[tuple[Sequence[Measured], Sequence[Measured]]]
"""Pairs of models, each as one or more draws of the same captions."""


def trials(
    case: Case, real: Measured, validity: Mapping[str, Validity], config: PromoteConfig,
    *, num_images: int, count: int,
) -> Iterator[Decision]:  # fmt: skip
    """The gate's decisions, each on captions chosen anew and, of every caption, on one of a model's
    draws; two equal models are never shown by the same draw.

    Args:
        case: gone through in turn.
        num_images: per set and language.
        count: of decisions.
    """
    for trial in range(count):
        rng = np.random.default_rng(trial)
        before, after = case[trial % len(case)]
        rows = np.sort(np.concatenate(list(_some_of_every_set(real, num_images, rng))))
        both = [*before, *after] if before is not after else list(before)
        first = rng.integers(len(before), size=len(rows))
        if before is after:
            second = (first + rng.integers(1, len(both), size=len(rows))) % len(both)
        else:
            second = len(before) + rng.integers(len(after), size=len(rows))
        table = pa.concat_tables([measured.rows for measured in both])
        table = table.drop_columns([name for name in SET_ROWS if name in table.column_names])
        there = replace(real, rows=real.rows.take(rows))
        champion, candidate = (
            with_set_measures(
                replace(both[0], subject=name, rows=table.take(chosen * len(real.rows) + rows)),
                there,
            )
            for name, chosen in (("champion", first), ("candidate", second))
        )
        comparison = Comparison(champion, candidate, there, bootstrap=1_000, seed=0)
        yield decide(comparison, validity, config)


def _some_of_every_set(
    measured: Measured, num_images: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Rows of so many images of every set and language."""
    columns = [np.array(measured.rows[name].to_pylist()) for name in ("set", "language")]
    for name, language in dict.fromkeys(zip(*columns, strict=True)):
        found = np.flatnonzero((columns[0] == name) & (columns[1] == language))
        yield rng.permutation(found)[:num_images]


def shipped_base() -> Path:
    return ASSETS / "base"


def models(args: argparse.Namespace, config: PromoteConfig) -> None:
    """Trials with the base, then with trainings."""
    home = Home(args.home, "noto")
    settings: dict[str, dict[str, Any]] = {"base": {}, **WORSE}
    drawn = {
        name: [
            home.draw(f"{name.replace(' ', '-')}-{i}", shipped_base, i, **changes)
            for i in range(args.draws if name == "base" else args.draws // 2)
        ]
        for name, changes in settings.items()
    }
    found = home.measured([subject for arm in drawn.values() for subject in arm])
    arms = {name: [found[subject.name] for subject in arm] for name, arm in drawn.items()}
    cases: dict[str, Case] = {"equal: the base, other seeds": [(arms["base"], arms["base"])]}
    for name in WORSE:
        cases[f"better: the base over {name}"] = [(arms[name], arms["base"])]
    report(home, found, cases, config, args)

    home = Home(args.home, "twemoji")
    untuned = home.draw("untuned", shipped_base)
    tuned = [home.draw(f"tuned-{i}", partial(home.trained, i)) for i in range(args.trainings)]
    found = home.measured([untuned, *tuned])
    trained = [[found[subject.name]] for subject in tuned]
    cases = {
        "equal: two trainings of one recipe": list(permutations(trained, 2)),
        "better: a training over the base": [([found["untuned"]], after) for after in trained],
    }
    report(home, found, cases, config, args)


def report(
    home: Home,
    found: Mapping[str, Measured],
    cases: Mapping[str, Case],
    config: PromoteConfig,
    args: argparse.Namespace,
) -> None:
    """One line of JSON per case and size, and one on the judges."""
    validity = validity_of(list(home.config.judges), found, bootstrap=1_000, seed=0)
    print(json.dumps({name: [v.valid, v.reason] for name, v in validity.items()}), flush=True)
    for name, case in cases.items():
        for size in args.images:
            count = args.trials if len(case) == 1 else len(case)
            decisions = trials(case, found["real"], validity, config, num_images=size, count=count)
            line = {"case": name, "style": home.style, "images": size, **summary(decisions)}
            print(json.dumps(line), flush=True)


def simulated(args: argparse.Namespace, config: PromoteConfig) -> None:
    """Trials with tables whose truth is known."""
    for size in args.images:
        for shift in (0.0, 0.2, 0.4, 0.6):
            found = simulate(config, trials=args.trials, num_images=size, shift=shift)
            line = {"case": "simulated", "shift": shift, "images": size, **summary(found)}
            print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("simulate", "models"))
    parser.add_argument("--home", type=Path, default=Path(".tessera"))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--draws", type=int, default=6, help="of the base, with other seeds")
    parser.add_argument("--trainings", type=int, default=8)
    parser.add_argument("--images", type=int, nargs="*", default=[48, 96, 180], help="per set")
    args = parser.parse_args()
    args.home = args.home.absolute()
    {"simulate": simulated, "models": models}[args.command](args, PromoteConfig())


if __name__ == "__main__":
    main()
