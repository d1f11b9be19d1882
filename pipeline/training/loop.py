"""The training loop, the only one: distributed data parallel (DDP) on Ray Train, for any objective.

    result = fit(build, config, storage=home / "steps" / key, name="generator")

`build()` runs on every worker and returns a `Training`: an objective (pipeline/objective.py), which
is a network with its losses, and its data. The loop knows nothing else of what it trains.

The random numbers of a step are seeded by (seed, step, rank), and its rows by (seed, step). So a
training that was killed and is started again with the same storage and name continues from its last
checkpoint as if it had not stopped: to the bit on CPUs, but for roundings on GPUs, which may choose
other kernels. With a time limit the schedule follows the clock, and so no two trainings are alike.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainConfig
from pipeline.errors import DataError, ResourceError, TrainingError, user_error
from pipeline.images.augment import Augment
from pipeline.objective import Objective
from pipeline.progress import OnProgress, Progress, watch
from pipeline.runtime import (
    autocast,
    available_cpus,
    can_compile,
    cluster_resources,
    compile_modules,
    environment,
    peak_memory_gb,
)  # fmt: skip
from pipeline.tracking.runs import RunHandle, RunLogger
from pipeline.training import feed
from pipeline.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from pipeline.training.policy import (
    EMA,
    apply_policy,
    build_optimizers,
    learning_rate_factor,
    set_learning_rate,
)
from pipeline.training.window import CHECK_EVERY, Window

CPUS_PER_WORKER = 0.5  # of Ray's logical CPUs, so that trainings fit beside other work
VALIDATION_SEED = 20_260  # the same random numbers at every validation


@dataclass
class Training:
    """What a worker trains.

    Attributes:
        objective: the network and its losses.
        train: rows to learn from.
        validation: rows whose loss decides about stopping and the best checkpoint.
        sample: makes a PIL image of what the objective has learnt, for people; rank 0 calls it.
    """

    objective: Objective
    train: feed.Dataset
    validation: feed.Dataset
    sample: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class TrainResult:
    """The chosen checkpoint of a training and the metrics reported with it."""

    checkpoint: Path
    metrics: dict[str, float]


def fit(
    build: Callable[[], Training],
    config: TrainConfig,
    *,
    storage: Path,
    name: str,
    run: RunHandle | None = None,
    on_progress: OnProgress | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainResult:
    """Train to the end. Ray must be running.

    Args:
        build: what each worker trains; it is pickled.
        storage: the directory for checkpoints, on a disk that every node sees.
        name: of the training within the storage.
        run: where rank 0 logs metrics and samples.
        on_progress: called on the driver with the latest progress.
        callbacks: Ray Train's, called on its controller.

    Returns:
        The checkpoint of the lowest validation loss, or the last one, as config.restore says.

    Raises:
        TrainingError: a loss is not finite, or workers died more often than config.max_failures.
        ResourceError: the cluster is too small.
        KeyboardInterrupt: Ctrl-C; the workers are stopped.
    """
    scaling = scaling_for(config.num_workers, cluster_resources())
    with watch(on_progress) as board:
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"build": build, "config": config, "run": run, "board": board},
            scaling_config=scaling,
            run_config=RunConfig(
                name=name,
                storage_path=str(storage.absolute()),
                failure_config=FailureConfig(max_failures=config.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=2,
                    checkpoint_score_attribute="validation_loss",
                    checkpoint_score_order="min",
                ),
                callbacks=list[Any](
                    callbacks
                ),  # typed as the Tune callbacks of Train's first version
            ),
        )
        try:
            with _ctrl_c_interrupts():
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise user_error(error) or _summed_up(error) from error
    chosen, metrics = result.checkpoint, result.metrics
    if config.restore == "best":
        best = result.get_best_checkpoint("validation_loss", "min")
        kept = result.best_checkpoints or ()
        assert best is not None, "a training reports before it ends"
        chosen, metrics = next((c, m) for c, m in kept if c.path == best.path)
    assert chosen is not None and metrics is not None, "a training reports before it ends"
    return TrainResult(Path(chosen.path), {k: v for k, v in metrics.items() if _is_number(v)})


@contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt during and after a training.

    Ray Train handles it by exiting with status 0, and does not restore the handler afterwards.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        raise KeyboardInterrupt from end
    finally:
        if threading.current_thread() is threading.main_thread():  # where alone handlers are set
            signal.signal(signal.SIGINT, handler)


def scaling_for(num_workers: int, resources: Mapping[str, float]) -> ScalingConfig:
    """The number of workers and what each takes: one GPU where the cluster has any, else
    CPUS_PER_WORKER.

    With fewer GPUs than workers, fewer workers train: as many as divide `num_workers`, so that the
    global batch stays the same. Losses that are means over images then stay the same, too; those
    that compare a worker's images with each other (the aligner's, the GAN's) compare more of them.

    Raises:
        ResourceError: the cluster is too small for the workers.
    """
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0)
    if gpus:
        num_workers = max(n for n in range(1, gpus + 1) if num_workers % n == 0)
        per_worker = {"CPU": CPUS_PER_WORKER, "GPU": 1}
    else:
        per_worker = {"CPU": CPUS_PER_WORKER}
    if num_workers * CPUS_PER_WORKER > cpus:
        raise ResourceError(
            f"train.num_workers={num_workers} needs {num_workers * CPUS_PER_WORKER:g} of Ray's "
            f"CPUs and the cluster has {cpus:g}: lower it, or add nodes"
        )
    return ScalingConfig(
        num_workers=num_workers, use_gpu=bool(gpus), resources_per_worker=per_worker
    )


def _summed_up(error: Exception) -> TrainingError:
    """What the workers said, in one line."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    lines = [str(failure).strip().splitlines()[-1:] for failure in failures.values()]
    text = "; ".join(line for last in lines for line in last) or str(error)
    if "out of memory" in text.lower():
        return TrainingError(
            f"a worker ran out of memory: {text}. Lower train.batch_size, or raise "
            "train.accumulate: a batch is computed in so many pieces"
        )
    return TrainingError(
        f"training failed for good: {text}. The last checkpoint is kept; run the same command "
        "again to go on from it"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _worker(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    worker = _Worker(**settings)
    try:
        worker.train()
    finally:
        worker.feeder.shutdown(cancel_futures=True)
        worker.logger.close()


class _Worker:
    """One rank's share of the training."""

    def __init__(
        self, build: Callable[[], Training], config: TrainConfig, run: RunHandle | None, board: Any
    ) -> None:
        context = ray.train.get_context()
        self.config, self.board = config, board
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, available_cpus() // context.get_local_world_size()))
        torch.backends.cudnn.benchmark = True  # pays where shapes stay the same
        torch.manual_seed(config.seed)  # every rank starts from the same weights
        self.training = build()
        self.objective = self.training.objective.to(self.device)
        self.trainable, self.total = apply_policy(self.objective.model, config)
        self.compiled = self._compile()
        phases = self.objective.phases
        self.wrapped = ray.train.torch.prepare_model(
            self.objective,
            parallel_strategy_kwargs={
                # Buffers are constants, or computed from the weights alike on all ranks.
                "broadcast_buffers": False,
                "find_unused_parameters": len(phases) > 1,
            },
        )
        self.networks = {phase: self.objective.trained_network(phase) for phase in phases}
        self.helpers = nn.ModuleList(
            {id(m): m for m in self.networks.values() if m is not self.objective.model}.values()
        )
        self.phase_optimizers = {
            phase: build_optimizers(
                network, config, ratio=self.objective.learning_rate_ratio(phase)
            )
            for phase, network in self.networks.items()
        }
        self.optimizers = [o for each in self.phase_optimizers.values() for o in each]
        self.ema = EMA(self.objective.model, config.ema_decay) if config.ema_decay else None
        self.augment = Augment(config.augment).to(self.device)
        self.validation_rows = self._validation_rows()
        self.state = TrainState()
        self.tokens_per_image = 0  # stays 0 for families that generate pixels
        self.logger = RunLogger(run if self.rank == 0 else None)
        self.feeder = ThreadPoolExecutor(1, "feeder")
        self.fed: dict[int, Future[dict[str, Tensor]]] = {}  # batches being prepared, by step
        self._restore()
        self.started = time.monotonic() - self.state.elapsed_s

    def _compile(self) -> bool:
        """Compile what the objective offers if the config asks for it; returns whether any was."""
        wanted = self.config.compile
        if wanted == "never" or (wanted == "auto" and not can_compile(self.device)):
            return False
        modules = self.objective.compilable()
        compile_modules(modules)
        return bool(modules)

    def _validation_rows(self) -> list[np.ndarray]:
        """This rank's validation rows, batch by batch.

        Raises:
            DataError: there are too few for every rank to have enough in every batch.
        """
        config, length = self.config, len(self.training.validation)
        fewest = self.objective.min_validation_rows
        found = feed.fewest_validation_rows(
            length, batch_size=config.batch_size, num_batches=config.validation_batches,
            world_size=self.world_size,
        )  # fmt: skip
        if found < fewest:
            raise DataError(
                f"{length} validation pictures in batches of up to {config.batch_size} do not give "
                f"each of {self.world_size} workers {fewest} a batch: give more data, raise "
                "data.validation_fraction or train.batch_size, or lower train.num_workers"
            )
        return feed.validation_rows(
            length, batch_size=config.batch_size, num_batches=config.validation_batches,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as directory:
            self.state = load_checkpoint(
                Path(directory),
                model=self.objective.model,
                helpers=self.helpers,
                ema=self.ema,
                optimizers=self.optimizers,
            )

    def train(self) -> None:
        config, state = self.config, self.state
        self.logger.params({"trainable_parameters": self.trainable, "parameters": self.total})
        self.logger.params(environment(self.device) | {"compiled": self.compiled})
        window, progress = Window(), self._progress()
        while not state.finished:
            set_learning_rate(
                self.optimizers, learning_rate_factor(config, step=state.step, progress=progress)
            )
            window.add(state.step, *self._step(state.step))
            state.step += 1
            progress = self._progress()
            last = progress >= 1
            validates = last or state.step % config.validate_every == 0
            if validates or state.step % CHECK_EVERY == 0:
                window.check()
            if last or window.full:
                self._log(window, progress)
            if validates:
                with window.paused():
                    self._validate_and_report(progress)

    def _progress(self) -> float:
        """The share of max_steps or of time_limit_s that is used, whichever is larger.

        Rank 0's clock counts, so that all ranks agree.
        """
        share = self.state.step / self.config.max_steps
        if self.config.time_limit_s is None:
            return share
        elapsed = time.monotonic() - self.started
        if self.world_size > 1:
            first = torch.tensor(elapsed, device=self.device)
            dist.broadcast(first, src=0)
            elapsed = float(first)
        return max(share, elapsed / self.config.time_limit_s)

    def _batch(self, step: int) -> dict[str, Tensor]:
        """This rank's batch of a step; the next step's is prepared by a thread meanwhile."""
        for wanted in (step, step + 1):
            if wanted not in self.fed and wanted < self.config.max_steps:
                self.fed[wanted] = self.feeder.submit(self._feed, wanted)
        return self.fed.pop(step).result()

    def _feed(self, step: int) -> dict[str, Tensor]:
        batch = feed.training_batch(
            self.training.train,
            step,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._pinned(batch)

    def _step(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One optimiser step in every phase.

        Returns:
            Metrics by name; and for each phase the gradient's norm and the loss, (2,).
        """
        config = self.config
        torch.manual_seed(hash((config.seed, step, self.rank)) % 2**63)
        fed = self._batch(step)
        seeds = fed.pop("seeds")  # stay on the CPU: reading them from a GPU would wait for it
        batch = self._to_device(fed)
        flippable = batch.pop("flippable", None)
        if "image_tokens" in batch:
            self.tokens_per_image = batch["image_tokens"].shape[1]
        if "images" in batch:
            batch["images"] = self.augment(batch["images"], seeds=seeds, flippable=flippable)
        self.wrapped.train()
        metrics: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for phase in self.objective.phases:
            losses = self._backward(batch, phase)
            norm = nn.utils.clip_grad_norm_(self.networks[phase].parameters(), config.clip_norm)
            for optimizer in self.phase_optimizers[phase]:
                optimizer.step()
            self.objective.zero_grad(set_to_none=True)
            gradients[phase] = torch.stack([norm, losses["loss"]])
            metrics |= losses | {"grad_norm": norm}
        if self.ema is not None:
            self.ema.update(self.objective.model)
        return metrics, gradients

    def _backward(self, batch: dict[str, Tensor], phase: str) -> dict[str, Tensor]:
        """Add up the gradients of one phase over config.accumulate pieces of the batch.

        Returns:
            The mean losses over the pieces.
        """
        pieces = self.config.accumulate
        sums: dict[str, Tensor] = {}
        for i in range(pieces):
            piece = {name: tensor[i::pieces] for name, tensor in batch.items()}
            last = i == pieces - 1
            with nullcontext() if last else self._unsynchronised():
                with autocast(self.device):
                    losses = self.wrapped(piece, phase)
                (losses["loss"] / pieces).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / pieces
        return sums

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Keep DDP from averaging gradients over the ranks before the last piece of the batch."""
        if isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def _pinned(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch to pinned memory, from which a GPU copies asynchronously."""
        if self.device.type != "cuda":
            return batch
        return {name: tensor.pin_memory() for name, tensor in batch.items()}

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def _log(self, window: Window, progress: float) -> None:
        images_per_s, metrics = window.close(self.config.batch_size)
        metrics = {f"train_{k}": v for k, v in metrics.items()} | {
            "images_per_s": images_per_s,
            "tokens_per_s": images_per_s * self.tokens_per_image,
            "learning_rate": self.optimizers[-1].param_groups[0]["lr"],
            "memory_gb": peak_memory_gb(self.device),
        }
        self.logger.metrics(metrics, step=self.state.step)
        self._post(progress, metrics)

    def _post(self, share: float, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            self.board.post.remote(
                Progress(share=share, step=self.state.step, metrics=metrics, pid=os.getpid())
            )

    def _validate_and_report(self, progress: float) -> None:
        """Validate the averaged weights, decide whether to stop, and save a checkpoint."""
        config, state = self.config, self.state
        if self.ema is not None:
            self.ema.swap(self.objective.model)
        metrics = self._validate()
        better = metrics["validation_loss"] < state.best
        state.best = min(state.best, metrics["validation_loss"])
        state.bad_validations = 0 if better else state.bad_validations + 1
        exhausted = bool(config.patience) and state.bad_validations >= config.patience
        state.finished = progress >= 1 or exhausted
        if (
            self.rank == 0
            and self.training.sample is not None
            and (state.finished or (config.sample_every and state.step % config.sample_every == 0))
        ):
            self.logger.image("samples", self.training.sample(self.objective), step=state.step)
        if self.ema is not None:
            self.ema.swap(self.objective.model)
        self.logger.metrics(metrics, step=state.step)
        self._post(1.0 if state.finished else progress, metrics)
        state.elapsed_s = time.monotonic() - self.started
        self._report(metrics | {"step": state.step, "elapsed_s": state.elapsed_s})

    def _report(self, metrics: dict[str, float]) -> None:
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            save_checkpoint(
                Path(directory),
                model=self.objective.model,
                helpers=self.helpers,
                ema=self.ema,
                optimizers=self.optimizers,
                state=self.state,
            )
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean losses over all ranks' validation rows, with the same random numbers each time."""
        dataset = self.training.validation
        self.objective.eval()
        sums: dict[str, float] = {}
        count = 0
        for i, rows in enumerate(self.validation_rows):
            torch.manual_seed(VALIDATION_SEED + i)
            batch = self._to_device(self._pinned(dataset.batch(rows, None)))
            with autocast(self.device):
                losses = self.objective.validate(batch)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(rows)
            count += len(rows)
        names = sorted(sums)
        total = torch.tensor([*(sums[n] for n in names), float(count)], device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        means = (total[:-1] / total[-1]).tolist()
        metrics = {f"validation_{n}": v for n, v in zip(names, means, strict=True)}
        if not math.isfinite(metrics["validation_loss"]):
            raise TrainingError(
                f"the validation loss is {metrics['validation_loss']} at step {self.state.step}; "
                "lower train.learning_rate. The last good checkpoint is kept"
            )
        return metrics
