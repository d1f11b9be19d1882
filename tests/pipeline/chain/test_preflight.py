"""What a recipe shows before anything is started: each mistake is told by the chain's making."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import ASSETS, WEIGHTS
from pipeline.chain.judging import evaluation_needs
from pipeline.chain.plan import Plan, resolve
from pipeline.chain.preflight import check, check_candidate, check_evaluation
from pipeline.config import load_recipe
from pipeline.data.shards.splits import split_of
from pipeline.errors import (
    BundleError,
    DataError,
    PretrainedNotFoundError,
    RecipeError,
    TesseraError,
)
from pipeline.tokenizers._saved import load_tokenizer


def checked(recipe: str, *settings: str, home: Path) -> Plan:
    """What a chain does before any work."""
    plan = resolve(load_recipe(recipe, settings, environment={}), home)
    check(plan)
    return plan


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pretrained_cache: Path) -> Path:
    """One for all: the caption encoder is loaded once a cache."""
    path = tmp_path_factory.mktemp("preflight")
    (path / "pretrained").symlink_to(pretrained_cache)
    return path


@pytest.mark.parametrize(
    ("recipe", "setting", "said"),
    [
        ("smoke", "evaluate.styles=[twemojy]", "evaluate.styles names twemojy.*noto, twemoji"),
        ("smoke", "generator.data.exclude_styles=[nto]", "generator.data.exclude_styles names nto"),
        ("smoke", "tokenizer.data.styles=[noto,x]", "tokenizer.data.styles names x"),
        ("emoji-families", "candidates.gan.data.styles=[x]", "candidates.gan.data.styles names x"),
        ("smoke", "tokenizer.name=vqq", "vqq"),
        ("emoji-demo", "tokenizer.patch=2", "tokenizer.patch=2 is not that of the tokenizer in"),
        (
            "emoji-demo",
            "aligner={source: 'asset:aligner', tune: true, embedding: 8}",
            "embedding=8",
        ),
        ("smoke", "aligner.train.policy=frozen", "train.policy='frozen' is not offered"),
        ("emoji-causal", "generator.causal.max_prompt_tokens=5000", "5000 caption tokens.*2048"),
        ("smoke", "generator.num_styles=1", r"2 styles \(noto, twemoji\) do not fit"),
        ("smoke", "generator.width=65", "generator.width=65 must be a multiple of .*heads=2"),
        ("emoji-families", "candidates.causal.width=65", "candidates.causal.width=65 must be"),
        ("smoke", "evaluate.judges=[aligner]", "promote.improve: imagenet_r1/all asks the judge"),
        (
            "smoke",
            "promote.limits=[{metric: kid/style:noto, at_most: 1}]",
            "promote.limits: kid/style:noto is of no style that is evaluated; these are twemoji",
        ),
        (
            "smoke",
            "promote.keep=[{metric: aligner_r1/language:fr, margin: 1}]",
            r"of no language that is evaluated; these are en, zh \(evaluate.languages\)",
        ),
        ("smoke", f"data.shards=[asset:emoji, {ASSETS / 'emoji'}]", "are the same data set"),
        ("smoke", "tokenizer.train.optimizer=muon", "QuantizedAutoencoder has nothing for muon"),
    ],
)
def test_mistakes_are_told_before_any_work(
    home: Path, recipe: str, setting: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        checked(recipe, setting, home=home)


def test_a_size_that_the_family_cannot_draw_is_refused(home: Path) -> None:
    settings = ["preprocess.image_size=96", "generator.family=gan"]
    with pytest.raises(RecipeError, match="the gan family doubles"):
        checked("smoke", *settings, home=home)


def test_a_width_that_no_heads_share_is_no_mistake(home: Path) -> None:
    checked("emoji-gan", "generator.width=130", home=home)


def test_a_size_that_the_tokens_of_a_source_do_not_fill_is_refused(home: Path) -> None:
    settings = ["tokenizer.source=asset:base", "preprocess.image_size=68"]
    with pytest.raises(RecipeError, match=r"image_size=68 must be a multiple of .*downsample=8"):
        checked("emoji-causal", "tokenizer.freeze=false", *settings, home=home)


def test_a_trial_is_checked_as_the_recipe_itself_is(home: Path) -> None:
    plan = checked("emoji-gan", home=home)
    options = plan.recipe.generator.gan.model_copy(update={"patch": 3})
    trial = plan.candidate(plan.recipe.generator.model_copy(update={"gan": options}))
    with pytest.raises(RecipeError, match="the gan family doubles"):
        check_candidate(trial)


def test_missing_perceptual_features_are_told_at_once(home: Path) -> None:
    settings = ["tokenizer.perceptual_weight=0.1", "tokenizer.perceptual_features=nowhere"]
    with pytest.raises(TesseraError, match="no perceptual features at 'nowhere'"):
        checked("smoke", *settings, home=home)


def test_shards_on_two_file_systems_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

    from pipeline.chain import preflight
    from pipeline.data.shards.manifest import locate, read_manifest

    plan = resolve(load_recipe("smoke", environment={}), home)
    uri = locate("asset:emoji")
    sets = {uri: read_manifest(uri), "elsewhere": read_manifest(uri)}
    systems = iter([LocalFileSystem(), SubTreeFileSystem("/tmp", LocalFileSystem())])
    monkeypatch.setattr(preflight, "open_shards", lambda *_: (next(systems), ""))
    with pytest.raises(DataError, match=r"several file systems .*elsewhere.* copy them to one"):
        preflight.check_data(replace(plan, shards=sets))


def test_idle_sections_are_named(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ["tokenizer.train.policy=full", "aligner.embedding=8"]
    with caplog.at_level(logging.WARNING):
        checked("emoji-demo", *settings, home=home)
    assert (
        "tokenizer: data, train are without effect because base=asset:base brings its tokenizer"
        in caplog.text
    )
    assert (
        "aligner: embedding is without effect because asset:aligner is taken as it is"
        in caplog.text
    )
    with caplog.at_level(logging.WARNING):
        checked("emoji-gan", "encode.num_views=2", "generator.depth=3", home=home)
    assert "encode: num_views is without effect because gan reads no image tokens" in caplog.text
    assert "generator: depth is without effect on the family gan" in caplog.text
    with caplog.at_level(logging.WARNING):
        checked("emoji-causal", "generator.num_steps=4", "generator.train.lora_rank=2", home=home)
    assert "generator: num_steps is without effect on the family causal" in caplog.text
    assert "generator.train: lora_rank is without effect with policy=full" in caplog.text


def test_the_decoder_of_the_bases_tokenizer_is_trained(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = checked("emoji-demo", "tokenizer.source=asset:base", home=home)
    assert made.tokenizer.trains and made.tokenizer.source is not None
    built = load_tokenizer(made.tokenizer.source).config
    assert made.tokenizer.config.levels == built.levels
    assert "source is without effect because the decoder of base=asset:base trains" in caplog.text
    taken = checked("emoji-demo", "tokenizer.train.policy=full", home=home)
    assert not taken.tokenizer.trains and taken.tokenizer.source == made.tokenizer.source


def test_an_evaluation_too_small_to_promote_anything_is_told(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checked("smoke", "promote.unjudged=true", "evaluate.judges=[aligner]", home=home)
    assert "nothing can be promoted" not in caplog.text
    checked("smoke", home=home)
    assert "nothing can be promoted: evaluate.num_images=8 of two sets" in caplog.text


def test_what_is_to_be_read_is_whole(home: Path, tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "base", tmp_path / "base")
    shutil.copytree(ASSETS / "emoji", tmp_path / "set")
    settings = [f"base={tmp_path / 'base'}", f"data.shards=[{tmp_path / 'set'}]"]
    checked("emoji-demo", *settings, home=home)
    for weights in (tmp_path / "base" / WEIGHTS, tmp_path / "base" / "tokenizer" / WEIGHTS):
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        with pytest.raises(BundleError, match=f"{weights} is not the file its config.json names"):
            checked("emoji-demo", *settings, home=home)
        weights.write_bytes(whole)
    first, second, *_ = sorted((tmp_path / "set").glob("*.tar.gz"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    said = rf"{first.name} is truncated \(\d+ of \d+ bytes\); {second.name} is missing"
    with pytest.raises(DataError, match=said):
        checked("emoji-demo", *settings, home=home)
    check(resolve(load_recipe("emoji-demo", settings, environment={}), home), ["generator"])


def test_captions_that_the_encoder_does_not_read_as_before_are_told(home: Path) -> None:
    with pytest.raises(BundleError, match=r"trained with: .*caption_encoder.max_tokens=24, "):
        checked("emoji-demo", "caption_encoder.max_tokens=4", home=home)


def test_weights_of_a_language_model_that_are_cut_off_are_told(home: Path, tmp_path: Path) -> None:
    plan = checked("emoji-demo", home=home)
    there = tmp_path / "encoder"
    shutil.copytree(plan.encoder.source, there)
    (weights,) = there.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size - 8)
    broken = replace(plan, encoder=replace(plan.encoder, source=str(there)))
    with pytest.raises(PretrainedNotFoundError, match=f"{weights} cannot be read"):
        check(broken)


def test_rules_about_what_is_not_measured_are_refused(home: Path) -> None:
    rule = "promote.improve=[{metric: composition/compositions}]"
    with pytest.raises(RecipeError, match=r"improve: composition/compositions is not measured"):
        checked("smoke", rule, home=home)
    checked("smoke", rule, "evaluate.compositions=true", home=home)


def test_only_judges_that_are_asked_are_trained(home: Path) -> None:
    both, one = (
        evaluation_needs(resolve(load_recipe("smoke", settings, environment={}), home))
        for settings in ([], ["evaluate.judges=[aligner]"])
    )
    assert {"aligner", "judge"} <= set(both) and set(both) - set(one) == {"judge"}


def preprocessed(folder: Path, plan: Plan, count: int, num_captions: int) -> Path:
    """Pixels' tables of images with captions, split as the plan says."""
    data = plan.recipe.data
    rows = [
        {
            "key": f"{i:03d}", "group": f"g{i}", "style": "noto",
            "split": split_of(f"g{i}", data.split_seed, data.validation_fraction,
                              data.test_fraction),
            "captions": [{"text": f"thing {i % num_captions}", "language": "en"}],
        }
        for i in range(count)
    ]  # fmt: skip
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    return folder


@pytest.mark.parametrize(
    ("count", "num_captions", "said"),
    [
        (500, 500, None),
        (200, 200, None),
        (50, 50, r"only . of . unseen pictures.*With data\.validation_fraction=.* are unseen then"),
        (20, 20, r"With data\.validation_fraction=.* data\.test_fraction=.* data\.split_seed="),
        (12, 12, r"No other split helps: there are 12 pictures, and 12 captions"),
        (300, 5, r"No other split helps: .* and 5 captions that differ \(thing 0, .*tessera train"),
    ],
)
def test_small_sets_are_told_before_any_training(
    count: int, num_captions: int, said: str | None, home: Path, tmp_path: Path
) -> None:
    def plan_of(*settings: str) -> Plan:
        evaluation = ("evaluate.styles=[noto]", "evaluate.languages=[en]")
        return resolve(load_recipe("smoke", (*evaluation, *settings), environment={}), home)

    plan = plan_of()
    pixels = preprocessed(tmp_path / "pixels", plan, count, num_captions)
    if said is None:
        check_evaluation(plan, pixels)
        return
    with pytest.raises(DataError, match=said) as caught:
        check_evaluation(plan, pixels)
    remedy = re.findall(r"data\.\w+=[\d.]+", str(caught.value).partition("With ")[2])
    if remedy:
        other = plan_of(*remedy)
        check_evaluation(other, preprocessed(tmp_path / "other", other, count, num_captions))


def test_a_set_that_no_model_can_win_on_is_told(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("evaluate.styles=[noto]", "evaluate.languages=[en]", "evaluate.num_images=100")
    plan = resolve(load_recipe("smoke", settings, environment={}), home)
    check_evaluation(plan, preprocessed(tmp_path / "pixels", plan, 300, 300))
    assert "nothing can be promoted" not in caplog.text
    settings = (*settings, "promote.min_images=200")
    plan = resolve(load_recipe("smoke", settings, environment={}), home)
    check_evaluation(plan, tmp_path / "pixels")
    assert "pictures of style 'noto' can be judged by, fewer than promote.min_images=200" in (
        caplog.text
    )


def test_every_worker_needs_a_validation_image(home: Path, tmp_path: Path) -> None:
    settings = ("evaluate.styles=[noto]", "evaluate.languages=[en]",
                "data.validation_fraction=0.001")  # fmt: skip
    plan = resolve(load_recipe("smoke", settings, environment={}), home)
    with pytest.raises(DataError, match="only 0 pictures are in the validation split"):
        check_evaluation(plan, preprocessed(tmp_path / "pixels", plan, 200, 200))
