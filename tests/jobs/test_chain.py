"""The whole chain for real: shards to a champion that the openai client gets a picture from."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from PIL import Image
from served import TESSERA, tessera_serve

from pipeline.artifacts import ASSETS
from pipeline.bundles.bundle import load_bundle
from pipeline.bundles.registry import ModelRegistry
from pipeline.chain.plan import resolve
from pipeline.chain.table import pixels_of
from pipeline.chain.workflow import Outcome, opened, other_splits, retrain, run_steps
from pipeline.config import load_recipe
from pipeline.errors import BundleError
from pipeline.progress import Progress
from pipeline.tokenizers._saved import load_tokenizer
from pipeline.tracking.steps import exclusive

CHAMPION = "models:/tessera-smoke@champion"
TRAINING = ["preprocess", "tokenizer", "tokens", "captions", "generator"]
STEPS = [*TRAINING, "aligner", "judge", "evaluate", "gate"]
SETTINGS = ["promote.unjudged=true"]  # a model of 20 steps draws noise, which the gate refuses


class Listener:
    """A reporter that keeps which steps were finished."""

    def __init__(self) -> None:
        self.finished_steps: list[str] = []

    def started(self, step: str) -> None:
        pass

    def progress(self, step: str, progress: Progress) -> None:
        pass

    def finished(self, step: str, seconds: float, *, skipped: bool) -> None:
        self.finished_steps.append(step)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pretrained_cache: Path) -> Path:
    """A home whose language model is converted already."""
    path = tmp_path_factory.mktemp("chain")
    (path / "pretrained").symlink_to(pretrained_cache)
    return path


@pytest.fixture(scope="module")
def outcome(home: Path, ray_session: None) -> Outcome:
    """The smoke recipe."""
    listener = Listener()
    plan = resolve(load_recipe("smoke", SETTINGS, environment={}), home)
    result = retrain(plan, listener, check_servable=lambda bundle: None)
    assert sorted(listener.finished_steps) == sorted(STEPS)
    return result


def tessera(*arguments: str, home: Path, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TESSERA, *arguments, "--home", str(home)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def test_a_recipe_ends_in_a_champion(outcome: Outcome) -> None:
    assert outcome.decision.promoted and outcome.version == "1"
    assert "without being judged" in outcome.decision.reasons[0]
    assert set(outcome.reports) == {"real", "tokenizer", "blurred", "shuffled", "candidate"}
    assert outcome.reports["candidate"].metrics["validation_loss"].value > 0


def test_the_bundle_is_self_contained_and_has_a_card(outcome: Outcome) -> None:
    files = {str(p.relative_to(outcome.bundle)) for p in outcome.bundle.rglob("*") if p.is_file()}
    assert files == {
        "README.md", "CREDITS.csv", "samples.png", "config.json", "model.safetensors",
        "tokenizer/config.json", "tokenizer/model.safetensors",
    }  # fmt: skip
    card = (outcome.bundle / "README.md").read_text(encoding="utf-8")
    assert "CC-BY-4.0" in card and "recipe `smoke`" in card and "imagenet_r1/all" in card
    assert "| emoji-datasource-twitter@16.0.0 | CC-BY-4.0 | Twemoji" in card, "authors are credited"


def test_the_report_shows_the_training_and_the_card(outcome: Outcome) -> None:
    assert outcome.page is not None
    page = outcome.page.read_text(encoding="utf-8")
    training = page.partition('<section id="training"')[2].partition("</section>")[0]
    assert (
        "<h4>loss</h4>" in training and "train_loss" in training and "validation_loss" in training
    )
    card = page.partition('<section id="card"')[2].partition("</section>")[0]
    assert "Made " in card and "CC-BY-4.0" in card and "generator " in card, "seconds by step"


def test_mlflow_holds_the_parent_and_a_run_a_step(outcome: Outcome, home: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    parent = client.get_run(outcome.run.run_id)
    assert parent.info.status == "FINISHED" and parent.inputs.dataset_inputs
    nested = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{outcome.run.run_id}'"
    )
    assert sorted(run.info.run_name for run in nested) == sorted(STEPS)
    generator = next(run for run in nested if run.info.run_name == "generator")
    history = client.get_metric_history(generator.info.run_id, "validation_loss")
    assert {point.step for point in history if point.step} == {10, 20}
    assert generator.data.params["settings.generator.train.max_steps"] == "20"
    assert {"code_version", "torch", "device", "parameters"} <= generator.data.params.keys()
    assert {"train_grad_norm", "learning_rate", "memory_gb"} <= generator.data.metrics.keys()
    rates = [generator.data.metrics[name] for name in ("images_per_s", "tokens_per_s")]
    assert rates[1] == pytest.approx(64 * rates[0])
    assert [f.path for f in client.list_artifacts(generator.info.run_id, "samples")]
    alias = client.get_model_version_by_alias("tessera-smoke", "champion")
    assert str(alias.version) == outcome.version


def test_done_again_everything_is_skipped(outcome: Outcome, home: Path) -> None:
    again = tessera("retrain", "smoke", *SETTINGS, "--json", home=home)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["promoted"] and result["version"] == "1"
    assert "already the champion" in result["reasons"][0], "there is nothing to judge"
    assert sorted(result["seconds"]) == sorted(TRAINING) and not any(result["seconds"].values())


def test_noise_is_not_promoted(outcome: Outcome, home: Path) -> None:
    plan = resolve(load_recipe("smoke", environment={}), home)
    judging = Listener()
    judging.killed = 1
    with opened(plan, judging) as session:
        decision = session.judge().ruling.decision
    assert not decision.promoted and decision.verdicts
    page = outcome.page
    assert page is not None and "<html" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_evaluation_without_a_recipe(outcome: Outcome, home: Path) -> None:
    found = tessera(
        "evaluate", CHAMPION, "--data", "asset:emoji", "data.limit=120", "evaluate.num_images=8",
        "evaluate.compositions=false", "aligner.source=null", "aligner.widths=[16,32,32]",
        "aligner.train.max_steps=5", "aligner.train.batch_size=32", "--json",
        home=home, timeout=400,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["metrics"]["candidate"]["imagenet_r1/all"]["value"] >= 0
    assert report["candidate"] == "candidate" and report["decision"] is None


def test_another_limit_of_bad_samples_redoes_nothing(outcome: Outcome, home: Path) -> None:
    recipe = load_recipe("smoke", ["preprocess.max_bad_fraction=0.9"], environment={})
    with opened(resolve(recipe, home), Listener()) as session:
        results = session.run("preprocess")
        assert pixels_of(results) == outcome.pixels
        assert not session.workspace.seconds["preprocess"]


def test_a_shard_that_is_back_is_another_input(home: Path, tmp_path: Path) -> None:
    shards, away = tmp_path / "set", tmp_path / "away"
    shutil.copytree(ASSETS / "emoji", shards)
    settings = [f"data.shards=[{shards}]", "data.allow_missing_shards=true"]
    recipe = load_recipe("smoke", settings, environment={})
    lost = sorted(shards.glob("*.tar.gz"))[-1]
    lost.rename(away)
    assert resolve(recipe, home).lacking == {"shards-0-without": lost.name}
    away.rename(lost)
    assert resolve(recipe, home).lacking == {}


def test_another_encoder_than_the_bases_is_refused_at_once(home: Path) -> None:
    settings = ["base=asset:base", "caption_encoder.prefix='passage: '"]
    plan = resolve(load_recipe("emoji-demo", settings, environment={}), home)
    with pytest.raises(BundleError, match="reads captions differently"):
        retrain(plan, Listener(), check_servable=lambda bundle: None)


@pytest.mark.slow
def test_a_bases_decoder_is_tuned_and_its_tokens_stay(outcome: Outcome, home: Path) -> None:
    settings = [f"base={outcome.bundle}", "tokenizer.train.policy=head"]
    plan = resolve(load_recipe("smoke", settings, environment={}), home)
    trained = run_steps(plan, Listener(), "tokenizer")["tokenizer"].bundle
    tuned, base = load_tokenizer(trained), load_bundle(outcome.bundle).tokenizer
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    tokens = base.encode(images)
    assert torch.equal(tuned.encode(images), tokens)
    assert not torch.equal(tuned.decode(tokens), base.decode(tokens))


def test_another_split_than_the_champions_is_noted(outcome: Outcome, home: Path) -> None:
    assert not any("another split" in reason for reason in outcome.decision.reasons)
    plan = resolve(load_recipe("smoke", ["data.split_seed=3"], environment={}), home)
    champion = ModelRegistry(home).champion("tessera-smoke")
    (note,) = other_splits(plan, champion)
    assert "the champion was trained with another split (seed 0," in note


def test_one_chain_at_a_time(outcome: Outcome, home: Path) -> None:
    with exclusive(home):
        second = tessera("retrain", "smoke", home=home)
    assert second.returncode == 1
    assert "another run" in second.stderr and "--home" in second.stderr


def test_pictures_without_a_server(outcome: Outcome, home: Path) -> None:
    out = home / "apple.png"
    drawn = tessera(
        "generate", "一个红苹果", "--out", str(out), "--n", "2", "--seed", "3", "--json",
        "--model", CHAMPION, home=home,
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    row, first, _second = map(Path, json.loads(drawn.stdout))
    picture = Image.open(first)
    assert picture.size == (64, 64) and picture.text["prompt"] == "一个红苹果"  # type: ignore[attr-defined]
    assert row == out and Image.open(row).width > 128


@pytest.fixture(scope="module")
def server(outcome: Outcome, home: Path) -> Iterator[str]:
    """`tessera serve` as a user starts it: a process and a Ray of its own."""
    arguments = CHAMPION, "--home", str(home)
    with tessera_serve(*arguments, ready_timeout_s=120, stderr=subprocess.PIPE) as (url, process):
        yield url
        process.send_signal(signal.SIGINT)
        # 130 if the first answer was faster than the command's own look at /readyz
        assert process.wait(timeout=120) in (0, 130)


def test_the_openai_client_draws_with_the_served_champion(server: str) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)

    def draw(**settings: Any) -> list[bytes]:
        response = client.images.generate(
            model="champion", prompt="一个红苹果", n=2, size="64x64", response_format="b64_json",
            extra_body=settings,
        )  # fmt: skip
        return [base64.b64decode(item.b64_json or "") for item in response.data or []]

    first, second = draw(seed=1, guidance_scale=3.0)
    assert Image.open(io.BytesIO(first)).size == (64, 64)
    assert first != second and draw(seed=1, guidance_scale=3.0) == [first, second]
