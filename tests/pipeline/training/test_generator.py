"""What a fine-tune takes from its base, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import registry
from pipeline.bundles.bundle import load_bundle
from pipeline.chain import shapes
from pipeline.chain.shapes import make_spec, shape_of_base
from pipeline.config import GeneratorConfig
from pipeline.errors import BundleError, RecipeError
from pipeline.models import load_family
from pipeline.models.gan import GanConfig
from pipeline.tokenizers._saved import resolve_tokenizer
from pipeline.training.generator import mixed_with_start, start_from


def test_the_shape_comes_from_the_base(tiny_bundle: Path) -> None:
    built = load_bundle(tiny_bundle).manifest.generator
    config = shape_of_base(GeneratorConfig(dropout=0.25), tiny_bundle)
    assert (config.width, config.depth, config.heads) == (built.width, built.depth, built.heads)
    assert config.dropout == 0.25, "what is no shape stays the recipe's"
    again = shape_of_base(GeneratorConfig(width=built.width), tiny_bundle)
    assert again.width == built.width


def test_another_shape_than_the_bases_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(RecipeError, match=r"generator\.width=96 is not the base's, which has"):
        shape_of_base(GeneratorConfig(width=96), tiny_bundle)


@pytest.mark.parametrize("family", registry.names("models"))
def test_a_new_style_starts_from_the_mean_of_the_known(
    tiny_bundles: dict[str, Path], family: str
) -> None:
    base = tiny_bundles[family]
    bundle = load_bundle(base)
    known = bundle.manifest.model_spec
    config = shape_of_base(GeneratorConfig(family=family), base)
    spec = make_spec(bundle.tokenizer, known.caption_width, ["crayon"], base, config)
    assert spec.styles == (*known.styles, "crayon")
    model = load_family(family).build(config, spec)
    start_from(model, base, spec)
    table, rows = bundle.model.style_rows()[: len(known.styles)], model.style_rows()
    assert len(rows) >= config.num_styles
    torch.testing.assert_close(rows[len(known.styles)], table.mean(0))
    torch.testing.assert_close(rows[: len(known.styles)], table)


def test_tasks_that_the_recipe_names_are_its_own(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = shapes.read_bundle(tiny_bundle)
    both = ("text_to_image", "completion")
    wider = built.model_copy(
        update={"generator": built.generator.model_copy(update={"tasks": both})}
    )
    monkeypatch.setattr(shapes, "read_bundle", lambda _: wider)
    assert shape_of_base(GeneratorConfig(), tiny_bundle).tasks == both
    assert shape_of_base(GeneratorConfig(tasks=both[:1]), tiny_bundle).tasks == both[:1]


def test_a_causal_model_has_the_recipes_dropout(tiny_bundles: dict[str, Path]) -> None:
    base = tiny_bundles["causal"]
    config = shape_of_base(GeneratorConfig(family="causal", dropout=0.25), base)
    spec = make_spec(load_bundle(base).tokenizer, 384, ["noto"], base, config)
    assert spec.language_model["attention_dropout"] == 0.25


def test_a_gans_width_comes_from_the_base(tiny_bundles: dict[str, Path]) -> None:
    base = tiny_bundles["gan"]
    built = load_bundle(base).manifest.generator.gan
    config = shape_of_base(GeneratorConfig(family="gan", gan=GanConfig(penalty_weight=1)), base)
    assert config.gan == built.model_copy(update={"penalty_weight": 1.0})
    wider = GanConfig(channels=built.channels + 8)
    with pytest.raises(RecipeError, match=r"generator\.gan\.channels=\d+ is not the base's"):
        shape_of_base(GeneratorConfig(family="gan", gan=wider), base)


def test_a_share_of_the_start_stays(tiny_bundle: Path) -> None:
    start = load_bundle(tiny_bundle).model
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    trained = {n: t + 1 if t.is_floating_point() else t for n, t in before.items()}
    mixed = mixed_with_start(start, trained, 0.25)
    assert mixed.keys() == before.keys()
    for name, tensor in mixed.items():
        moved = 0.75 if tensor.is_floating_point() else 0
        torch.testing.assert_close(tensor, before[name] + moved)
    assert all(torch.equal(t, before[n]) for n, t in start.state_dict().items()), "left alone"


def test_a_tokenizer_is_found_alone_or_in_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    inner = tiny_bundle.absolute() / "tokenizer"
    assert resolve_tokenizer(tiny_bundle) == resolve_tokenizer(inner) == inner
    with pytest.raises(BundleError, match="no bundle at"):
        resolve_tokenizer(tmp_path)
