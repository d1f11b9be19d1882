"""A causal bundle as an ordinary Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from jobs.export import export
from pipeline.bundles.bundle import load_bundle
from pipeline.errors import BundleError, ResourceError


def test_transformers_loads_what_was_exported(
    tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    out = export(str(tiny_bundles["causal"]), tmp_path / "out", home=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out)
    vocabulary = load_bundle(tiny_bundles["causal"]).model.vocabulary
    assert model.config.vocab_size == vocabulary.size
    with pytest.raises(ResourceError, match="exists"):
        export(str(tiny_bundles["causal"]), out, home=tmp_path)


def test_other_families_have_no_other_format(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'masked'.*causal"):
        export(str(tiny_bundles["masked"]), tmp_path / "out", home=tmp_path)
    assert not (tmp_path / "out").exists()
