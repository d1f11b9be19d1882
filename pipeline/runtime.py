"""The machine or cluster underneath: Ray, devices, their dtype, memory and disk.

Importing this imports neither Ray nor PyTorch, which take a process seconds: a command that finds
its work done needs neither, and a data task does without PyTorch.

    set_environment()  # before PyTorch is imported
    with ray_runtime():
        ...            # one local Ray, or the cluster that RAY_ADDRESS names
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipeline import __version__
from pipeline.errors import ResourceError

if TYPE_CHECKING:
    import torch
    from torch import nn

LOCAL_LOGICAL_CPUS = 8
"""Fewest logical CPUs of a local Ray, however few the machine has: data tasks, two training workers
and a replica must fit beside each other on two cores without waiting for each other forever."""

STDERR = 2
HARMLESS = "core_worker.*has constructor arguments in the object store"
"""An error, so called, that Ray logs of every actor of Ray Data's: they take what they do from the
object store, whose owner is this process, and it lives as long as they do."""

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM ended, as shells and schedulers know it."""
terminated = threading.Event()
"""SIGTERM has come. A call of Ray's that it interrupts raises KeyboardInterrupt all the same."""

EXPECTED = "worker processes have been started on node"
"""A warning that Ray prints of a local Ray as this one is meant to be: with more logical CPUs than
the machine has (LOCAL_LOGICAL_CPUS)."""

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # a worker that reports twice waits until the controller has asked for the first report, and a
    # training that has ended until it asks again: every 2 s by default
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # workers start when there is work for them
    "RAY_raylet_start_wait_time_s": "240",  # a loaded machine is slow, not broken
    # Ray runs its workers at nice 15, behind everything else on the machine; they are the work here
    "RAY_worker_niceness": "0",
    # tensors of the same sizes come and go every step: the allocator keeps their memory instead of
    # returning it to the system
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    # GNU OpenMP's threads wait for each other spinning. By default they do so for so long that, of
    # two processes with a thread per core, one nearly stands still; with a thirtieth of that a
    # process that is alone loses little
    "GOMP_SPINCOUNT": "10000",
}


def set_environment() -> None:
    """Set the defaults of a run's environment variables; those the user has set stay.

    Call it before PyTorch is imported, whose OpenMP reads them once. A local Ray hands them on to
    its workers.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start_ray(*, object_store_mb: int = 600, debug: bool = False) -> bool:
    """Join the cluster of RAY_ADDRESS, or start a local Ray; do nothing if one is up.

    Returns:
        True if this call started a local Ray, so that the caller knows to shut it down.

    Raises:
        ResourceError: Ray did not start or could not be reached.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    level = logging.INFO if debug else logging.ERROR
    for library in ("ray.train", "ray.tune"):
        logging.getLogger(library).setLevel(level)
    options: dict[str, object] = {"log_to_driver": debug, "logging_level": level}
    if not address:
        options |= {
            "address": "local",
            "num_cpus": max(LOCAL_LOGICAL_CPUS, available_cpus()),
            "include_dashboard": False,
            "object_store_memory": object_store_mb * 1024 * 1024,
        }
    try:
        ray.init(**options)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise ResourceError(
            f"could not reach {where}: {error}. Unset RAY_ADDRESS to run on this machine alone, or "
            "see `tessera doctor`"
        ) from error
    exit_on_sigterm()  # Ray's own handler aborts the process
    return not address


def quiet_ray_data() -> None:
    """Keep Ray Data's log off the terminal; its session's directory has all of it.

    It announces every data set, and logs what ends one before it raises the same.
    """
    importlib.import_module("ray.data")  # which sets its logger up
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


@contextlib.contextmanager
def quiet_actors() -> Iterator[None]:
    """Keep off the terminal what Ray logs of every actor of Ray Data's (see HARMLESS).

    Ray's C++ writes it past Python, so it is taken out of the file descriptor: by a process of its
    own, which passes on all other lines, this process' last words in a crash too.
    """
    if shutil.which("grep") is None:
        yield
        return
    terminal = os.dup(STDERR)
    grep = subprocess.Popen(  # in a session of its own, since Ctrl-C is not meant for it
        ["grep", "--line-buffered", "-v", HARMLESS],
        stdin=subprocess.PIPE, stdout=terminal, start_new_session=True,
    )  # fmt: skip
    assert grep.stdin is not None
    os.dup2(grep.stdin.fileno(), STDERR)
    try:
        with (
            os.fdopen(os.dup(terminal), "w", buffering=1) as own,
            contextlib.redirect_stderr(own),  # a progress bar has no whole lines
        ):
            yield
    finally:
        os.dup2(terminal, STDERR)
        os.close(terminal)
        grep.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child of ours writes to it still
            grep.wait(timeout=5)


class RayPrints(io.TextIOBase):
    """What Ray prints in this process, written to `target` but for the warning EXPECTED."""

    def __init__(self, target: TextIO) -> None:
        self._target, self._dropped = target, False

    def write(self, text: str) -> int:
        ends_dropped = self._dropped and text == "\n"  # print writes the end of a line by itself
        self._dropped = EXPECTED in text
        if not (self._dropped or ends_dropped):
            self._target.write(text)
        return len(text)

    def flush(self) -> None:
        self._target.flush()


def exit_on_sigterm() -> None:
    """Make SIGTERM a SystemExit with the status TERMINATED, so that what is open is closed and runs
    end as KILLED; `terminated` is set.

    Ray takes the signal over when it starts, so `start_ray` calls this again. Of other threads than
    the main one Python accepts no handlers, and nothing is done.
    """

    def leave(*_: object) -> None:
        terminated.set()
        sys.exit(TERMINATED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def ray_runtime(*, debug: bool = False) -> Iterator[None]:
    """Ray for the duration of a job; a local one that this call started is shut down after.

    What Ray prints goes to standard error: standard output is for the job's result alone.
    """
    import ray

    prints = sys.stderr if debug else RayPrints(sys.stderr)
    with contextlib.redirect_stdout(prints):
        started = start_ray(debug=debug)
        if not debug:
            quiet_ray_data()
        try:
            yield
        finally:
            if started:
                ray.shutdown()


def choose_device(device: str = "auto") -> torch.device:
    """The device of that name; "auto" stands for the GPU where there is one, else the CPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes in it natively, else None (stay in float32)."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else None


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """Mixed precision where the device profits from it."""
    import torch

    dtype = autocast_dtype(device)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def cast_weights(model: nn.Module, device: torch.device) -> None:
    """Store the weights of a network that is not trained any more in `autocast_dtype`, which
    `autocast` would otherwise cast them to at every use."""
    from torch import nn

    dtype, layers = autocast_dtype(device), (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    for module in model.modules():
        if isinstance(module, layers) and dtype is not None:
            module.weight.data = module.weight.data.to(dtype)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: on a GPU, with Triton and with a C compiler, which builds
    the launchers of the kernels."""
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    return device.type == "cuda" and compiler and find_spec("triton") is not None


def compile_modules(modules: Iterable[nn.Module]) -> None:
    """torch.compile every module in place; names and weights stay. Blocks of equal shape share one
    compilation, which takes seconds where a whole network takes minutes."""
    for module in modules:
        module.compile()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: of the GPU if `device` is one."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def return_memory(beyond_mb: int = 400) -> None:
    """Give freed memory back to the system if this process holds more than `beyond_mb` MB.

    Ray's processes keep what they free (see ENVIRONMENT), which suits a training: it allocates
    the same sizes at every step. An image decoder may need a hundred times its usual memory once,
    for one large image.
    """
    statistics = Path("/proc/self/statm")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is None or not statistics.is_file():
        return
    resident = int(statistics.read_text().split()[1]) * resource.getpagesize()
    if resident > beyond_mb * 2**20:
        trim(0)


def environment(device: torch.device) -> dict[str, str]:
    """What a result depends on besides its recipe and data: code, libraries, machine."""
    import torch

    found = {"code_version": __version__, "python": platform.python_version()}
    if commit := code_commit():
        found["code_commit"] = commit
    for package in ("torch", "ray", "transformers"):
        found[package] = metadata.version(package)
    on_gpu = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    return found | {"cpus": str(available_cpus()), "threads": str(torch.get_num_threads())}


def code_commit() -> str:
    """The commit of the checkout that this code lies in, with "-dirty" after it if files differ
    from it; "" for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(
            command, cwd=Path(__file__).parent,
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return git.stdout.strip()


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cluster_resources() -> dict[str, float]:
    """What Ray counts in the whole cluster, by kind: "CPU", "GPU", "memory" and so on."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()
    return resources


def task_slots() -> int:
    """How many CPU-bound Ray tasks the hardware runs at once: one per CPU of the cluster.

    Ray counts at least LOCAL_LOGICAL_CPUS on a machine of its own, whatever the machine has; as
    many tasks would only start more processes.
    """
    import ray

    cpus = int(cluster_resources().get("CPU", 1))
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        cpus = min(cpus, available_cpus())
    return max(1, cpus)


def free_disk_mb(path: Path) -> int:
    """Free space, in MB, where `path` lies or will lie."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free // 2**20


def check_disk(path: Path, needed_mb: int) -> None:
    """Make sure that there is room before work starts.

    Raises:
        ResourceError: fewer than `needed_mb` MB are free where `path` lies.
    """
    free_mb = free_disk_mb(path)
    if free_mb < needed_mb:
        raise ResourceError(
            f"{path} has {free_mb} MB free and this needs {needed_mb} MB: "
            "free some space or choose another directory with --home"
        )
