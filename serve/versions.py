"""Which version of a model a replica serves: loading one, and following an alias that moves.

A model that is named by an alias is looked up every few seconds. A newer version is loaded and
generates one image beside the old one, at a lower priority, before it takes over between two
batches. One that fails is refused and tried again later: the old one goes on, and
`ModelInfo.notice` says so.

    followed = FollowedModel(*load_newest(version, find), find, every_s=5, on_change=take_over)
    followed.watch()
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from pipeline.contracts import ImageGenerator, StepChoosingGenerator
from serve.messages import PROBE_REQUEST, ModelInfo

logger = logging.getLogger("ray.serve")

RETRY_S = 300.0  # until a refused version is tried again: what failed may have been the machine
LOADING_NICENESS = 10
"""More than other threads'; a version that loads then gets a tenth of a CPU under load."""

# /readyz shows notices without a key, and exceptions may name paths, hosts and passwords
_LOG = "the replicas' log says why"
_REGISTRY_SILENT = f"the registry does not answer; {_LOG}"


@dataclass(frozen=True)
class ModelVersion:
    """What a model's name stands for at a moment; `load` is called once in every replica."""

    name: str
    version: str
    load: Callable[[], ImageGenerator]


FindVersion = Callable[[], ModelVersion]
"""Looks an alias up; raises if the registry does not answer or the bundle cannot be had."""


def load_newest(
    version: ModelVersion, find: FindVersion | None
) -> tuple[ImageGenerator, ModelInfo]:
    """Load what the alias stands for now; if that cannot be had, `version`, which it stood for when
    the application was built."""
    if find is not None:
        try:
            return _load(find())
        except Exception:
            logger.exception("the newest version cannot be had; %s instead", version.version)
    return _load(version)


def _load(version: ModelVersion) -> tuple[ImageGenerator, ModelInfo]:
    """A model that has generated an image, and what clients may know of it."""
    model = version.load()
    model.generate([PROBE_REQUEST])
    return model, ModelInfo(
        name=version.name,
        version=version.version,
        image_size=model.image_size,
        styles=tuple(model.styles),
        loaded=int(time.time()),
        tasks=model.tasks,
        num_steps=model.num_steps if isinstance(model, StepChoosingGenerator) else None,
    )


class FollowedModel:
    """The version that a replica serves.

    Args:
        model, info: what is served at first, from `load_newest`.
        find: looks for a newer version; None where the name can stand for nothing else.
        every_s: seconds between two looks.
        on_change: called in the event loop with a model that takes over.

    Attributes:
        info: of the version that is served.
    """

    def __init__(
        self,
        model: ImageGenerator,
        info: ModelInfo,
        find: FindVersion | None,
        *,
        every_s: float,
        on_change: Callable[[ImageGenerator], None],
    ) -> None:
        self.info = info
        self._infos = WeakKeyDictionary({model: info})
        self._find, self._every_s, self._on_change = find, every_s, on_change
        self._refused, self._retry_at = "", 0.0
        self._watching: asyncio.Task[None] | None = None

    def info_of(self, model: ImageGenerator) -> ModelInfo:
        """Of a model that is served, or was when it began the batch at hand."""
        return dataclasses.replace(self._infos[model], notice=self.info.notice)

    def watch(self) -> None:
        """Look from now on, in the running event loop."""
        if self._find is not None:
            self._watching = asyncio.get_running_loop().create_task(self._watch(self._find))

    async def _watch(self, find: FindVersion) -> None:
        while True:
            await self._look(find)
            await asyncio.sleep(self._every_s)

    async def _look(self, find: FindVersion) -> None:
        """Serve what the alias stands for now, or say in the notice why not."""
        try:
            found = await asyncio.to_thread(find)
        except Exception:
            if self.info.notice != _REGISTRY_SILENT:  # logged once, not at every look
                logger.exception("the registry does not answer")
            self._note(_REGISTRY_SILENT)
            return
        if found.version == self.info.version:
            self._refused = ""
            self._note("")
            return
        if found.version != self._refused or time.monotonic() > self._retry_at:
            await self._change_over(found)
        if found.version == self._refused:
            self._note(f"version {found.version} is refused; {_LOG}; make it anew, or move back")

    async def _change_over(self, found: ModelVersion) -> None:
        try:
            model, info = await _load_beside(found)
        except Exception:
            logger.exception("version %s is refused", found.version)
            self._refused, self._retry_at = found.version, time.monotonic() + RETRY_S
            return
        self._infos[model] = info
        self.info, self._refused = info, ""
        self._on_change(model)
        logger.info("version %s is served from now on", found.version)

    def _note(self, notice: str) -> None:
        if notice != self.info.notice:
            self.info = dataclasses.replace(self.info, notice=notice)


async def _load_beside(version: ModelVersion) -> tuple[ImageGenerator, ModelInfo]:
    """`_load` beside the model that generates, in a thread that ends: see engine.model_thread."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="load", initializer=_lower_priority)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, _load, version)
    finally:
        thread.shutdown(wait=False)


def _lower_priority() -> None:
    """Let all other threads have the CPU first; on Linux niceness is a thread's own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + LOADING_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))
