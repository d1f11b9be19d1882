"""Several candidates for real: all three families trained, judged together, the best promoted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jobs.steps import run_step
from pipeline.bundles.bundle import load_bundle
from pipeline.chain.plan import resolve
from pipeline.chain.workflow import retrain
from pipeline.config import load_recipe
from pipeline.progress import Progress

TRAIN = {"batch_size": 32, "max_steps": 20, "warmup_steps": 2, "validate_every": 10,
         "validation_batches": 1, "learning_rate": 1e-3}  # fmt: skip
RECIPE = {
    "name": "families",
    "data": {"shards": ["asset:emoji"], "limit": 120},
    "tokenizer": {"source": "asset:base", "freeze": True},
    "aligner": {"source": "asset:aligner"},
    "generator": {"width": 64, "depth": 1, "heads": 2, "num_steps": 4, "train": TRAIN},
    "candidates": {
        "masked": {"family": "masked"},
        "causal": {"family": "causal"},
        "gan": {"family": "gan", "gan": {"channels": 8}, "train": {"max_steps": 10}},
    },
    "evaluate": {"num_images": 8, "styles": ["twemoji"], "bootstrap": 100},
    "promote": {"model_name": "families", "choose_by": "kid/all", "unjudged": True},
}


def accept(bundle: Path) -> None:
    """Takes every bundle for one that can be served: tests/serve shows the check itself."""


class Finished:
    """A reporter that only counts what was worked on."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def started(self, step: str) -> None:
        pass

    def progress(self, step: str, progress: Progress) -> None:
        pass

    def finished(self, step: str, seconds: float, *, skipped: bool) -> None:
        if not skipped:
            self.done.append(step)


@pytest.mark.slow
def test_the_best_of_three_families_becomes_champion(
    tmp_path: Path, pretrained_cache: Path, ray_session: None
) -> None:
    home, path = tmp_path / "home", tmp_path / "families.yaml"
    home.mkdir()
    (home / "pretrained").symlink_to(pretrained_cache)
    path.write_text(yaml.safe_dump(RECIPE))
    recipe, reporter = load_recipe(path, environment={}), Finished()

    trained = run_step("train", recipe, home, reporter)
    assert {"generator-masked", "generator-causal", "generator-gan", "evaluate"} < {*reporter.done}
    winner = trained["candidate"]
    assert trained["path"] == trained["candidates"][winner]
    assert len(trained["choice"]) == 3 and trained["choice"][0].startswith(f"{winner} is the best")

    again = Finished()
    outcome = retrain(resolve(recipe, home), again, check_servable=accept)
    assert not again.done, "what `train` did is skipped"
    assert str(outcome.bundle) == trained["path"]
    assert load_bundle(outcome.bundle).manifest.generator.family == winner
    assert outcome.decision.promoted and list(outcome.choice) == trained["choice"]
    floors = ("real", "tokenizer", "blurred", "shuffled")
    kids = {name: report.metrics["kid/all"].value for name, report in outcome.reports.items()
            if name not in floors}  # fmt: skip
    assert len(kids) == 3 and kids["candidate"] == min(kids.values())
    card = (outcome.bundle / "README.md").read_text(encoding="utf-8")
    assert winner in card and outcome.page is not None
    assert winner in outcome.page.read_text(encoding="utf-8")

    for done in (["evaluate", "gate"], []):  # once anew, because gains are over the champion
        promoted = Finished()
        decision = retrain(resolve(recipe, home), promoted, check_servable=accept).decision
        assert promoted.done == done and "it is already the champion" in decision.reasons[0]

    changed = load_recipe(path, ["candidates.gan.train.max_steps=12"], environment={})
    last = Finished()
    retried = retrain(resolve(changed, home), last, check_servable=accept)
    assert sorted(last.done) == ["evaluate", "gate", "generator-gan"], "the others stay trained"
    assert json.dumps(retried.decision.reasons)
    assert set(retried.reports) >= {"candidate", "real", "tokenizer"}
