"""`tessera generate` without a model: seeds, and what files say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from jobs.generate import generate
from pipeline.bundles.registry import ResolvedModel
from pipeline.contracts import GenerationRequest


class Grey:
    """A generator of grey images that remembers what it was asked."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> Tensor:
        self.seeds += [request.seed for request in requests]
        return torch.full((len(requests), 3, 8, 8), 127, dtype=torch.uint8)


@pytest.fixture
def grey(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Grey:
    generator = Grey()
    monkeypatch.setattr("jobs.generate.load_generator", lambda *_, **__: generator)
    resolved = ResolvedModel(tmp_path, "grey", "1")
    monkeypatch.setattr("jobs.generate.resolve_model", lambda *_, **__: resolved)
    return generator


def test_another_picture_each_time_unless_a_seed_is_given(grey: Grey, tmp_path: Path) -> None:
    for seed in (None, None, 7):
        generate("x", tmp_path / "a.png", home=tmp_path, model="m", num_images=2, seed=seed)
    first, second, third = grey.seeds[::2]
    assert len({first, second, third}) == 3 and third == 7
    assert [b - a for a, b in zip(grey.seeds[::2], grey.seeds[1::2], strict=True)] == [1, 1, 1]
    assert Image.open(tmp_path / "a-1.png").text["seed"] == "7"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_prompt_may_be_kept_out_of_the_file(grey: Grey, tmp_path: Path, name: str) -> None:
    for keep, is_there in ((True, True), (False, False)):
        path, *_ = generate(
            "a secret present", tmp_path / name, home=tmp_path, model="m", keep_prompt=keep
        )
        content = path.read_bytes().replace(b"\0", b"")  # EXIF's text is UTF-16
        assert (b"secret" in content) is is_there and str(grey.seeds[-1]).encode() in content
