"""What a job shows on standard error while it works: a bar while a step runs, a line at its end.

Where standard error is no terminal (a log file, a scheduler), there are lines alone: one when a
step starts, one every `plain_every_s` seconds, one at its end. Tables of results are made here too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

if TYPE_CHECKING:  # they need Ray and PyArrow, and `tessera --help` does without
    from pipeline.data.shards.manifest import Manifest
    from pipeline.progress import Progress

# Metrics shown beside the bar, in this order.
SHOWN = ("validation_loss", "train_loss", "train_psnr", "validation_psnr", "images_per_s")


PIPE_WIDTH = 500


def output() -> Console:
    """Standard output for tables: as wide as the terminal; a pipe or a file gets them uncut."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


class ConsoleReporter:
    """Shows a chain's steps; an implementation of pipeline.tracking.steps.Reporter.

    As a context manager it removes the bar however a step ends.
    """

    def __init__(self, console: Console | None = None, *, plain_every_s: float = 20.0) -> None:
        self.console = console or Console(stderr=True)
        self.plain_every_s = plain_every_s
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._told = 0.0
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def started(self, step: str) -> None:
        self._step, self._told = step, time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"{step}: started")
            return
        self._bars = Bars(
            SpinnerColumn(), TextColumn("{task.description:<12}"), BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
            TextColumn("{task.fields[news]}"), console=self.console, transient=True,
        )  # fmt: skip
        self._bars.start()
        self._task = self._bars.add_task(step, total=1.0, news="")

    def progress(self, step: str, progress: Progress) -> None:
        news = describe(progress)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=min(1.0, progress.share), news=news)
        elif time.monotonic() - self._told > self.plain_every_s:
            self._told = time.monotonic()
            self.console.print(f"{step}: {progress.share:4.0%} {news}")

    def finished(self, step: str, seconds: float, *, skipped: bool) -> None:
        self.close()
        state = "done before, skipped" if skipped else f"done in {seconds:.0f} s"
        self.console.print(f"[green]✓[/green] {step}: {state}")

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def describe(progress: Progress) -> str:
    """The optimiser step and the metrics of SHOWN, as one line."""
    parts = [f"step {progress.step}"] if progress.step else []
    parts += [f"{name} {progress.metrics[name]:.3g}" for name in SHOWN if name in progress.metrics]
    return "  ".join(parts)


def time_table(seconds: Mapping[str, float]) -> Table:
    """Seconds per step of a chain and in all; a step that was done before is "skipped"."""
    table = Table(title="Time by step", show_edge=False)
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}" if value else "skipped")
    table.add_row("[bold]all[/bold]", f"[bold]{sum(seconds.values()):.1f}[/bold]")
    return table


def ingest_table(manifest: Manifest) -> Table:
    """What a source held: found, used, and each reason why something was left out."""
    table = Table(title="Ingested", show_edge=False, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("example", overflow="fold")
    captions = ", ".join(f"{name} {count}" for name, count in manifest.languages.items())
    table.add_row("pictures found", str(manifest.found), "")
    used = escape(f"captions: {captions}") if captions else "no captions"
    table.add_row("[bold]pictures used[/bold]", f"[bold]{manifest.used}[/bold]", used)
    for loss in manifest.losses:
        table.add_row(LOST[loss.of] + loss.reason, str(loss.count), escape(loss.example))
    return table


LOST = {"image": "", "caption": "caption: ", "file": "file: "}
"""What stands before the reason of a loss, by what was lost."""


def trial_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    """One row per trial of a search, best first: loss, steps, settings, and why it failed."""
    table = Table(title="Trials, best first", show_edge=False)
    for name in ("trial", "validation loss", "steps", "settings"):
        table.add_column(name, justify="left" if name in ("trial", "settings") else "right")
    for row in trials:
        loss = row["validation_loss"]
        settings = ", ".join(
            f"{k.rpartition('.')[2]}={_short(v)}" for k, v in row["settings"].items()
        )
        table.add_row(
            escape(row["name"]),
            "-" if loss is None else f"{loss:.4f}",
            str(row["steps"]),
            escape(f"{settings}; failed: {row['failure']}" if row["failure"] else settings),
        )
    return table


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
