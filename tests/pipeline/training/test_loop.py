"""The training loop on Ray Train, with a model small enough to know the right answer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray import cloudpickle
from torch import Tensor, nn

from pipeline.config import AugmentConfig, TrainConfig
from pipeline.errors import DataError, RecipeError, ResourceError, TrainingError
from pipeline.objective import Objective, TrainableNetwork
from pipeline.progress import Progress
from pipeline.runtime import can_compile
from pipeline.training.checkpoint import TrainState, best_weights, load_checkpoint, save_checkpoint
from pipeline.training.loop import Training, _Worker, fit, scaling_for
from pipeline.training.policy import (
    EMA,
    KernelMuon,
    apply_policy,
    build_optimizers,
    learning_rate_factor,
)
from pipeline.training.tokenizer import PatchDiscriminator
from pipeline.training.window import Window

CONFIG = TrainConfig(
    batch_size=8, max_steps=12, warmup_steps=2, validate_every=4, validation_batches=2,
    learning_rate=0.05, weight_decay=0.0, num_workers=2, max_failures=1,
    augment=AugmentConfig(flip=0.0),
)  # fmt: skip


class Rows:
    """y = 2 x - 1."""

    weights = None

    def __init__(self, length: int = 64) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None) -> dict[str, Tensor]:
        x = torch.from_numpy(rows / 32 - 1).float()[:, None]
        return {"x": x, "y": 2 * x - 1}


class Affine(nn.Linear, TrainableNetwork):
    """A linear layer that the loop can train."""


class Line(Objective):
    """Least squares; with `poison` the loss becomes nan at that step."""

    phases = ("fit",)

    def __init__(self, poison: int | None = None) -> None:
        super().__init__()
        self.model = Affine(1, 1)
        self.poison, self.calls = poison, 0

    def compilable(self) -> list[nn.Module]:
        return [self.model]

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        loss = (self.model(batch["x"]).float() - batch["y"]).square().mean()
        self.calls += self.training
        compiled = torch.tensor(float(self.model._compiled_call_impl is not None))
        loss = loss * float("nan") if self.calls == self.poison else loss
        return {"loss": loss, "compiled": compiled}


def build(poison: int | None = None, validation: int = 64) -> Training:
    return Training(Line(poison), Rows(), Rows(validation))


@pytest.fixture(scope="module", autouse=True)
def shipped_by_value() -> None:
    """Workers do not have tests/ on their path."""
    import sys

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    result = fit(build, CONFIG, storage=tmp_path_factory.mktemp("undisturbed"), name="line")
    assert result.metrics["step"] == 12
    return best_weights(result.checkpoint)


def test_a_killed_worker_changes_nothing(undisturbed: dict[str, Tensor], tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_once(progress: Progress) -> None:
        if progress.step >= 4 and not killed:
            killed.append(progress.pid)
            os.kill(progress.pid, signal.SIGKILL)

    config = CONFIG.model_copy(update={"max_steps": 12})
    result = fit(partial(build), config, storage=tmp_path, name="line", on_progress=kill_once)
    assert killed
    for name, weight in best_weights(result.checkpoint).items():
        torch.testing.assert_close(weight, undisturbed[name])


@pytest.mark.slow
def test_what_repeats_is_compiled_where_asked_for(
    undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    assert CONFIG.compile == "auto" and not can_compile(torch.device("cpu"))
    config = CONFIG.model_copy(update={"compile": "always"})
    result = fit(build, config, storage=tmp_path, name="line")
    assert result.metrics["validation_compiled"] == 1
    for name, weight in best_weights(result.checkpoint).items():
        torch.testing.assert_close(weight, undisturbed[name])


def test_ctrl_c_interrupts_a_training_and_whatever_follows_it(
    undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as before it"
    pressed: list[int] = []

    def press(progress: Progress) -> None:
        if progress.step >= 4 and not pressed:
            pressed.append(progress.step)
            os.kill(os.getpid(), signal.SIGINT)

    config = CONFIG.model_copy(update={"max_steps": 100_000, "num_workers": 1})
    with pytest.raises(KeyboardInterrupt):
        fit(build, config, storage=tmp_path, name="line", on_progress=press)
    assert pressed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_worker_learns_what_two_do(undisturbed: dict[str, Tensor], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_workers": 1, "restore": "last"})
    result = fit(build, config, storage=tmp_path, name="line")
    assert result.metrics["step"] == 12
    for name, weight in best_weights(result.checkpoint).items():
        torch.testing.assert_close(weight, undisturbed[name], rtol=0.02, atol=0.02)


def test_a_loss_that_is_no_number_stops_and_names_the_step(
    ray_session: None, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"num_workers": 1, "max_failures": 0})
    with pytest.raises(TrainingError, match=r"step 6 .*lower train.learning_rate"):
        fit(partial(build, 7), config, storage=tmp_path, name="line")
    assert list(tmp_path.glob("line/checkpoint_*/model.safetensors")), "the last good one is kept"


def test_a_training_that_stops_early_draws_its_samples(ray_session: None, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"

    def stubborn() -> Training:  # a rate of nothing never gets better
        return Training(Line(), Rows(), Rows(), sample=lambda _: drawn.touch())

    config = CONFIG.model_copy(
        update={"num_workers": 1, "patience": 1, "learning_rate": 1e-30, "ema_decay": 0.0}
    )
    result = fit(stubborn, config, storage=tmp_path, name="line")
    assert result.metrics["step"] < config.max_steps and drawn.exists()


def test_too_few_validation_rows_are_refused() -> None:
    def rows(length: int) -> list[np.ndarray]:
        worker = SimpleNamespace(
            config=CONFIG, training=build(validation=length), objective=Line(), world_size=2, rank=1
        )
        return _Worker._validation_rows(worker)  # type: ignore[arg-type]

    assert [len(share) for share in rows(2)] == [1]
    with pytest.raises(DataError, match=r"1 validation pictures .* each of 2 workers 1 a batch"):
        rows(1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop", "muon"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_checkpoint_restores_everything(
    optimizer: str, layout: torch.memory_format, tmp_path: Path
) -> None:
    config = TrainConfig(optimizer=optimizer)

    def made() -> tuple[nn.Module, list[torch.optim.Optimizer], EMA]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 64), nn.LayerNorm(64), nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 8, 3),
            nn.Flatten(), nn.Linear(32, 2),
        ).to(memory_format=layout)  # fmt: skip
        return model, build_optimizers(model, config), EMA(model, 0.9)

    def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], ema: EMA) -> None:
        model(torch.linspace(0, 1, 192).view(3, 64)).square().sum().backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        ema.update(model)

    model, optimizers, ema = made()
    step(model, optimizers, ema)
    save_checkpoint(
        tmp_path, model=model, ema=ema, optimizers=optimizers, state=TrainState(step=5, best=0.5)
    )
    step(model, optimizers, ema)
    other, other_optimizers, other_ema = made()
    state = load_checkpoint(tmp_path, model=other, ema=other_ema, optimizers=other_optimizers)
    assert (state.step, state.best, state.finished) == (5, 0.5, False)
    step(other, other_optimizers, other_ema)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    for name, weight in ema.average.items():
        assert torch.equal(weight, other_ema.average[name]), name
    with pytest.raises(TrainingError, match="does not fit"):
        load_checkpoint(tmp_path, model=nn.Linear(3, 3), ema=None, optimizers=[])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_a_kernel_for_the_matrix_of_its_patches(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, bias=False).to(memory_format=layout)
    picture = torch.randn(4, 8, 5, 5)
    matrix = nn.Parameter(conv.weight.detach().clone().reshape(16, 72))
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    ours, theirs = KernelMuon([conv.weight], **options), torch.optim.Muon([matrix], **options)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        conv(picture).square().sum().backward()
        nn.functional.conv2d(picture, matrix.view(16, 8, 3, 3)).square().sum().backward()
        ours.step()
        theirs.step()
    torch.testing.assert_close(conv.weight.reshape(16, 72), matrix, rtol=0.02, atol=1e-3)


def test_muon_takes_wide_kernels_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 64))
    muon, adamw = build_optimizers(model, TrainConfig(optimizer="muon"))
    assert isinstance(muon, KernelMuon)
    assert [id(w) for w in muon.weights] == [id(model[1].weight), id(model[2].weight)]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 4
    (alone,) = build_optimizers(nn.Linear(8, 8), TrainConfig(optimizer="muon"))
    assert isinstance(alone, torch.optim.AdamW), "beside the trained model: a small discriminator"
    with pytest.raises(RecipeError, match="nothing for muon"):
        apply_policy(Affine(8, 8), TrainConfig(optimizer="muon"))


def test_a_kernel_that_is_normalised_spectrally_is_still_one() -> None:
    model = PatchDiscriminator(48)
    muon, adamw = build_optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.1))
    assert isinstance(muon, KernelMuon)
    assert [tuple(w.shape) for w in muon.weights] == [(96, 48, 4, 4), (192, 96, 4, 4)]
    decayed, plain = adamw.param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 4] and decayed["weight_decay"] == 0.1
    assert all(p.ndim == 1 for p in plain["params"])
    before = muon.weights[0].detach().clone()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    muon.step()
    assert not torch.equal(muon.weights[0], before)


def test_a_pause_is_no_time_of_training() -> None:
    window = Window()
    window.add(0, {"loss": torch.tensor(1.0)}, {"predict": torch.ones(2)})
    with window.paused():
        time.sleep(0.5)
    rate, _ = window.close(batch_size=100)
    assert rate > 400, "it would be 200 at most"


def test_the_average_follows_and_swapping_twice_changes_nothing() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.5)
    nn.init.ones_(model.weight)
    for _ in range(12):
        ema.update(model)
    ema.swap(model)
    assert 0.99 < model.weight.item() <= 1
    ema.swap(model)
    assert model.weight.item() == 1


def test_learning_rate_warms_up_and_comes_down() -> None:
    config = TrainConfig(warmup_steps=10, final_learning_rate=0.1)
    factors = [learning_rate_factor(config, step=s, progress=s / 100) for s in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) > 0.95
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_workers_follow_the_devices() -> None:
    on_cpu = scaling_for(2, {"CPU": 8})
    assert (on_cpu.num_workers, on_cpu.use_gpu) == (2, False)
    on_gpu = scaling_for(4, {"CPU": 8, "GPU": 2})
    assert (on_gpu.num_workers, on_gpu.use_gpu) == (2, True)
    assert scaling_for(4, {"CPU": 8, "GPU": 3}).num_workers == 2, "the batch divides as before"
    with pytest.raises(ResourceError, match=r"num_workers=9 needs 4.5 .* has 4"):
        scaling_for(9, {"CPU": 4})


class TestWindow:
    def test_names_the_first_step_whose_gradient_is_not_finite(self) -> None:
        window = Window()
        for step in range(7):
            signs = {
                "judge": torch.tensor([float("nan") if step > 3 else 1.0, step / 2]),
                "draw": torch.tensor([float("inf") if step == 3 else 1.0, step / 4]),
            }
            window.add(step, {"loss": torch.tensor(0.0)}, signs)
            if step == 1:
                window.check()
        with pytest.raises(TrainingError, match=r"'draw' is inf at step 3 \(loss 0.75\)"):
            window.check()

    def test_steps_are_told_about_once_a_second(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        window, told = Window(), []
        for pace in (0.06, 0.06, 0.15, 0.15):
            while not window.full:
                loss = torch.tensor(float(len(window.rows)))
                window.add(0, {"loss": loss}, {"fit": torch.stack([loss, loss])})
                now += pace
            told.append((window.every, *window.close(8)))
        steps, speeds, means = zip(*told, strict=True)
        assert steps == (10, 20, 20, 10)
        assert speeds == pytest.approx((133.3, 133.3, 53.3, 53.3), rel=1e-2)
        assert [mean["loss"] for mean in means] == [4.5, 9.5, 9.5, 4.5]
