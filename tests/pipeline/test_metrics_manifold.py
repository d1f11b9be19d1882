"""Fidelity and variety of features against the papers' definitions, written out in loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.metrics import coverage, density, diversity, precision, recall

Point = list[float]
IN_BALLS = (precision, recall, density, coverage)


def sets(shift: float, spread: float, count: int = 25) -> tuple[Tensor, Tensor]:
    real, generated = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(0))
    return real, generated * spread + shift


def radius(points: list[Point], index: int, k: int) -> float:
    """NND_k: the distance to the k-th nearest of the others."""
    others = [p for i, p in enumerate(points) if i != index]
    return sorted(math.dist(points[index], p) for p in others)[k - 1]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (1.0, 1.0), (0.3, 0.3), (0.0, 3.0)])
def test_they_are_the_papers_definitions(shift: float, spread: float, k: int) -> None:
    real, generated = sets(shift, spread)
    x, y = real.double().tolist(), generated.double().tolist()
    n = len(x)
    x_radii, y_radii = ([radius(points, i, k) for i in range(n)] for points in (x, y))
    in_real = [[math.dist(x[i], y[j]) <= x_radii[i] for i in range(n)] for j in range(n)]
    in_generated = [[math.dist(x[i], y[j]) <= y_radii[j] for j in range(n)] for i in range(n)]
    assert precision(real, generated, k=k).tolist() == [float(any(row)) for row in in_real]
    assert recall(real, generated, k=k).tolist() == [float(any(row)) for row in in_generated]
    assert density(real, generated, k=k).tolist() == [sum(row) / k for row in in_real]
    covered = [float(any(row)) for row in zip(*in_real, strict=True)]
    assert coverage(real, generated, k=k).tolist() == covered


def test_alike_sets_are_near_their_expectations() -> None:
    real, generated = sets(0.0, 1.0, count=1_000)
    assert density(real, generated).mean() == pytest.approx(1, abs=0.05)
    assert coverage(real, generated).mean() == pytest.approx(1 - 2**-5, abs=0.02)
    assert diversity(real, generated).mean() == pytest.approx(1, abs=0.1)


def test_what_each_of_them_sees() -> None:
    real, _ = sets(0.0, 1.0, count=200)
    elsewhere, collapsed = real + 20, real[:1].expand(200, -1) + torch.randn(200, 3) * 1e-3
    assert all(measure(real, elsewhere).sum() == 0 for measure in IN_BALLS)
    assert diversity(real, elsewhere) == pytest.approx(np.ones(200), rel=1e-4)
    assert precision(real, collapsed).all(), "all of them are where a real one is"
    assert recall(real, collapsed).mean() < 0.05 and coverage(real, collapsed).mean() < 0.1
    assert diversity(real, collapsed).max() < 0.01


def test_copies_are_inside() -> None:
    """Whatever the rounding: a copy of the k-th neighbour lies on its ball."""
    real, _ = sets(0.0, 100.0)
    same = torch.ones(25, 3) / 3
    for measure in (precision, recall, coverage):
        assert measure(real, real.flip(0)).all() and measure(same, same).all()
    # k + 1 images lie in each ball, its own among them, and all of those that are the same
    assert density(real, real.flip(0), k=5).mean() == pytest.approx(6 / 5)
    assert density(same, same, k=5) == pytest.approx(np.full(25, 25 / 5))


@pytest.mark.parametrize("measure", [*IN_BALLS, diversity])
def test_a_feature_that_is_not_a_number_stays_so(
    measure: Callable[[Tensor, Tensor], np.ndarray],
) -> None:
    real, generated = sets(0.0, 1.0)
    broken = generated.clone()
    broken[3, 1] = math.nan
    assert np.isnan(measure(real, broken)[3]) or np.isnan(measure(real, broken)).all()
    assert np.isnan(measure(broken, real)).any()


@pytest.mark.parametrize("measure", [*IN_BALLS, diversity])
def test_sets_that_do_not_pair_are_refused(
    measure: Callable[[Tensor, Tensor], np.ndarray],
) -> None:
    real, generated = sets(0.0, 1.0)
    with pytest.raises(ValueError, match=r"differ in size: (25 and 24|24 and 25)"):
        measure(real, generated[:24])
    with pytest.raises(ValueError, match="1 images have no"):
        measure(real[:1], generated[:1])


def test_neighbours_that_there_are_not() -> None:
    real, generated = sets(0.0, 1.0)
    with pytest.raises(ValueError, match="25 images have no 25 neighbours each: give 1 <= k < 25"):
        coverage(real, generated, k=25)
