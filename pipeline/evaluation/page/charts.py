"""The geometry of charts; the template draws it as inline SVG.

A dot with an interval is placed in per cent of its plot's width, so that a plot fits any screen
while its text keeps its size. Curves have a fixed aspect: WIDTH x HEIGHT units.

    scale = Scale.of([0.1, 0.9])
    scale.percent(0.5), scale.ticks                            # 50.0, (0.2, 0.4, 0.6, 0.8)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.contracts import Interval

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins of a curve's plot
MOST_POINTS = 400


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low, high: its ends, low < high.
        ticks: round numbers within.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float], *, steps: int = 4, room: float = 0.04) -> Scale:
        """An axis that holds all finite values, with about `steps` ticks and some room around."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        low, high = low - room * (high - low), high + room * (high - low)
        rough = (high - low) / steps
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(low / step), math.floor(high / step)
        return cls(low, high, tuple(step * number for number in range(first, last + 1)))

    def percent(self, value: float) -> float:
        """Where a value lies, 0 to 100."""
        return round(100 * (min(max(value, self.low), self.high) - self.low) / self.span, 2)

    @property
    def span(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class Mark:
    """One subject's number in a lane.

    Attributes:
        subject: whose number.
        number: with its interval.
        at, low, high: where they lie, in per cent; None if the number is not finite.
    """

    subject: str
    number: Interval
    at: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Lane:
    """One line of a panel.

    Attributes:
        label: what the numbers are of.
        marks: one per subject.
        images: how many the numbers are of; 0 where that is not known.
    """

    label: str
    marks: tuple[Mark, ...]
    images: int = 0


@dataclass(frozen=True)
class Panel:
    """Dots with intervals on one common axis.

    Attributes:
        metric: the measure or metric that is shown.
        groups: lanes by the heading above them.
    """

    metric: str
    scale: Scale
    groups: Mapping[str, Sequence[Lane]]


Numbers = Mapping[str, Interval]
"""By subject."""


def panel(
    metric: str,
    groups: Mapping[str, Mapping[str, tuple[Numbers, int]]],
    *,
    from_zero: bool = False,
) -> Panel:
    """Place all numbers on one axis.

    Args:
        groups: by heading, by the lane's label: the numbers and how many images they are of.
        from_zero: whether the axis holds zero in any case.
    """
    numbers = [
        number for lanes in groups.values() for found, _ in lanes.values()
        for number in found.values()
    ]  # fmt: skip
    ends = [end for number in numbers for end in (number.value, number.low, number.high)]
    scale = Scale.of([*ends, 0.0] if from_zero else ends)
    placed = {
        heading: [
            Lane(label, tuple(_mark(name, found[name], scale) for name in found), images)
            for label, (found, images) in lanes.items()
        ]
        for heading, lanes in groups.items()
    }
    return Panel(metric, scale, placed)


def _mark(subject: str, number: Interval, scale: Scale) -> Mark:
    if not math.isfinite(number.value):
        return Mark(subject, number, None, 0, 0)
    low, high = (end if math.isfinite(end) else number.value for end in (number.low, number.high))
    at, low, high = (scale.percent(value) for value in (number.value, low, high))
    return Mark(subject, number, at, low, high)


@dataclass(frozen=True)
class GainRow:
    """A gain beside zero and what a rule needs, all in per cent of the plot's width."""

    at: float
    low: float
    high: float
    zero: float
    needed: float | None


def gain_row(gain: Interval, needed: float | None) -> GainRow | None:
    """Where a gain lies; None if it is not finite."""
    if not all(map(math.isfinite, (gain.value, gain.low, gain.high))):
        return None
    bounds = [] if needed is None else [needed]
    scale = Scale.of([gain.value, gain.low, gain.high, 0.0, *bounds])
    at, low, high, zero = map(scale.percent, (gain.value, gain.low, gain.high, 0.0))
    return GainRow(at, low, high, zero, *(map(scale.percent, bounds) if bounds else (None,)))


# ---- Curves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: of the metric.
        points: for an SVG polyline.
        last: the last value.
    """

    name: str
    points: str
    last: float


@dataclass(frozen=True)
class Plot:
    """Curves over steps, in units of an SVG of WIDTH x HEIGHT.

    Attributes:
        title: what the lines share.
        lines: one per metric.
        x_ticks, y_ticks: position and value.
    """

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, float]]
    y_ticks: Sequence[tuple[float, float]]


def plots(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[Plot]:
    """One plot per metric: the lines of "train_NAME" and "validation_NAME" are in one."""
    together: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for name, points in curves.items():
        finite = [p for p in points if math.isfinite(p[1])]
        if finite:
            title = name.removeprefix("train_").removeprefix("validation_")
            together.setdefault(title, {})[name] = finite
    return [_plot(title, lines) for title, lines in together.items()]


def _plot(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Plot:
    points = [point for line in lines.values() for point in line]
    across, up = Scale.of((x for x, _ in points), room=0), Scale.of(y for _, y in points)

    def x(value: float) -> float:
        return round(LEFT + across.percent(value) / 100 * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - up.percent(value) / 100 * (HEIGHT - TOP - BOTTOM), 1)

    return Plot(
        title,
        [
            Line(name, " ".join(f"{x(a)},{y(b)}" for a, b in _thin(line)), line[-1][1])
            for name, line in lines.items()
        ],
        [(x(tick), tick) for tick in across.ticks],
        [(y(tick), tick) for tick in up.ticks],
    )


def _thin(line: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MOST_POINTS + 1 points, the last one among them."""
    return [*line[: -1 : -(-len(line) // MOST_POINTS)], line[-1]]
