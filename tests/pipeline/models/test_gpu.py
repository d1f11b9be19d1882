"""What only a machine with a GPU can show: `pytest -m gpu`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from ray import cloudpickle
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from pipeline import registry
from pipeline.bundles.bundle import load_generator
from pipeline.config import GeneratorConfig, TrainConfig
from pipeline.contracts import GenerationRequest, ModelSpec
from pipeline.models import load_family
from pipeline.models.decoding.cuda_graph import GraphDecoder
from pipeline.models.decoding.llama import LlamaWeights, SlotDecoder
from pipeline.models.gan import GanConfig
from pipeline.training.loop import Training, TrainResult, fit

pytestmark = pytest.mark.gpu
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have this file

FAMILIES = registry.names("models")
SPEC = ModelSpec(
    image_size=32, codebook_size=60, num_tokens=16, levels=(5, 4, 3), caption_width=24,
    styles=("a", "b"),
)  # fmt: skip
CONFIG = GeneratorConfig(
    width=64, depth=2, heads=4, caption_depth=1, dropout=0.1, label_smoothing=0,
    num_styles=4, gan=GanConfig(channels=8),
)  # fmt: skip
REQUESTS = [GenerationRequest("红苹果", seed=7, style="noto"), GenerationRequest("a dog", seed=8)]


class Rows:
    """Pictures of one colour, which their tokens and captions tell."""

    weights = None

    def __len__(self) -> int:
        return 256

    def batch(self, rows: np.ndarray, draws: np.ndarray | None) -> dict[str, Tensor]:
        said = torch.from_numpy(rows % 8)
        return {
            "images": (said * 30)[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8),
            "image_tokens": said[:, None].expand(-1, 16) * 7,
            "caption_states": said[:, None, None].expand(-1, 6, 24).half() / 8,
            "caption_ids": said[:, None].expand(-1, 6) + 10,
            "caption_mask": torch.ones(len(rows), 6, dtype=torch.bool),
            "style": torch.zeros(len(rows), dtype=torch.long),
            "group": said,
        }


def training(family: str) -> Training:
    made = load_family(family)
    spec = replace(SPEC, language_model=made.language_model_config(CONFIG, None))
    return Training(made.objective(made.build(CONFIG, spec), CONFIG), Rows(), Rows())


def trained(family: str, path: Path, compiling: str) -> TrainResult:
    config = TrainConfig(
        batch_size=32, max_steps=60, warmup_steps=5, validate_every=30, validation_batches=2,
        learning_rate=2e-3, num_workers=2, max_failures=0, ema_decay=0.9, compile=compiling,
    )  # fmt: skip
    return fit(partial(training, family), config, storage=path, name="training")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_compiled_or_not(
    family: str, ray_session: None, tmp_path: Path
) -> None:
    losses = {
        compiling: trained(family, tmp_path / compiling, compiling).metrics["validation_loss"]
        for compiling in ("auto", "never")
    }
    if family != "gan":
        assert losses["auto"] < 1.5, "equally likely tokens have 4.1"
        assert losses["auto"] == pytest.approx(losses["never"], abs=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws(
    family: str, tiny_bundles: Mapping[str, Path], pretrained_cache: Path
) -> None:
    drawn = {
        device: load_generator(
            tiny_bundles[family], pretrained_cache=pretrained_cache, device=device
        ).generate(REQUESTS)
        for device in ("cuda", "auto")
    }
    assert drawn["cuda"].shape == (2, 3, 64, 64) and drawn["cuda"].device.type == "cpu"
    assert torch.equal(drawn["cuda"], drawn["auto"]), "auto is the GPU, which repeats itself"
    assert not torch.equal(drawn["cuda"][0], drawn["cuda"][1])


def test_a_graph_computes_what_its_kernels_do() -> None:
    torch.manual_seed(0)
    lm = LlamaModel(
        LlamaConfig(
            vocab_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    ).cuda()  # fmt: skip
    head = torch.nn.Linear(64, 50, bias=False).cuda()
    weights, idle = LlamaWeights(lm, head, torch.float32), []
    with torch.inference_mode():
        for _ in range(2):  # the second time in the batches, and with the graphs, of the first
            graph, plain = GraphDecoder(weights, 12, idle), SlotDecoder(weights, 12)
            rows = 0
            # three rows; one leaves; one takes its free row; three need a larger batch; all leave
            for joining, staying in ((3, 2), (1, 3), (3, 6), (0, 0)):
                if joining:
                    inputs = torch.randn(joining, 4, 64, device="cuda")
                    mask = torch.ones(joining, 4, dtype=torch.bool, device="cuda")
                    torch.testing.assert_close(
                        graph.prefill(inputs, mask), plain.prefill(inputs, mask)
                    )
                    rows += joining
                for _ in range(2):
                    inputs = torch.randn(rows, 64, device="cuda")
                    torch.testing.assert_close(graph.step(inputs), plain.step(inputs))
                for decoder in (graph, plain):
                    decoder.keep(torch.arange(staying, device="cuda"))
                rows = staying
            assert len(idle) == 2


def test_the_whole_chain_runs_on_it(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "jobs.cli", "retrain", "smoke", "promote.unjudged=true"),
        *("--home", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_model_version_by_alias("tessera-smoke", "champion")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    devices = {run.data.params["device"] for run in runs if "device" in run.data.params}
    assert devices == {torch.cuda.get_device_name()}
