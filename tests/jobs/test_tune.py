"""`tessera tune` for real: Ray Tune over Ray Train, interrupted once and run again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.config import load_recipe

TRAIN = {"batch_size": 32, "max_steps": 40, "warmup_steps": 2, "validate_every": 10,
         "validation_batches": 1}  # fmt: skip
RECIPE = {
    "name": "tuned",
    "data": {"shards": ["asset:emoji"], "limit": 80},
    "caption_encoder": {"max_tokens": 16},
    "tokenizer": {"source": "asset:base", "freeze": True},
    "generator": {"width": 64, "depth": 1, "heads": 2, "train": TRAIN},
    "tune": {
        "num_trials": 4, "grace_steps": 10, "reduction_factor": 2, "max_concurrent": 2,
        "space": {"generator.train.learning_rate": {"loguniform": [1e-5, 1e-2]}},
    },
}  # fmt: skip


@pytest.mark.slow
def test_a_search_ends_in_a_recipe_though_it_was_interrupted(
    tmp_path: Path, pretrained_cache: Path
) -> None:
    home, recipe, out = tmp_path / "home", tmp_path / "tuned.yaml", tmp_path / "best.yaml"
    home.mkdir()
    (home / "pretrained").symlink_to(pretrained_cache)
    recipe.write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "jobs.cli", "tune", str(recipe), "--home", str(home),
               "--out", str(out), "--json"]  # fmt: skip

    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not list(home.glob("steps/tune-*/trials/*/reports.jsonl")):
        assert first.poll() is None and time.monotonic() < deadline, "no trial reported"
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=120) == 130
    [search] = home.glob("steps/tune-*")
    assert not (search / "DONE.json").exists()
    before = {path: path.read_text() for path in search.glob("trials/*/reports.jsonl")}

    again = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    for path, text in before.items():
        assert path.read_text().startswith(text), "what was reported was not trained again"
    assert len(result["trials"]) == 4 and not any(row["failure"] for row in result["trials"])
    steps = [row["steps"] for row in result["trials"]]
    assert max(steps) == 40 and min(steps) < 40, "ASHA stopped none"
    best = result["trials"][0]
    assert best["validation_loss"] == min(row["validation_loss"] for row in result["trials"])

    made = load_recipe(out, environment={})
    key = "generator.train.learning_rate"
    assert made.generator.train.learning_rate == best["settings"][key]
    assert made.generator.train.max_steps == 40 and made.tune is None

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    [experiment] = [e.experiment_id for e in client.search_experiments() if e.name == "tessera"]
    runs = client.search_runs([experiment])
    [search_run] = [r for r in runs if r.info.run_name == "tune"]
    nested = [
        r for r in runs if r.data.tags.get("mlflow.parentRunId") == search_run.info.run_id
    ]  # fmt: skip
    assert sorted(r.info.run_name for r in nested) == [f"trial-00{i}" for i in range(4)]
    assert {r.info.status for r in nested} == {"FINISHED"}
    assert all(float(r.data.params[key]) > 0 for r in nested)
    assert search_run.data.tags["best_trial"] == best["name"]
