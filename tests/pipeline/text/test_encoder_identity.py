"""Which caption encoder it is: told from what it makes of captions, and loaded once for that."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.config import CaptionEncoderConfig
from pipeline.errors import BundleError, PretrainedNotFoundError
from pipeline.text import caption_encoder, pretrained
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.text.encoder_identity import (
    EncoderIdentity,
    check_encoder,
    encoder_width,
    fingerprint,
    identify,
    identity_of,
)


def test_an_identity_survives_json(encoder: HFCaptionEncoder) -> None:
    identity = identify(encoder)
    assert EncoderIdentity.from_dict(json.loads(json.dumps(asdict(identity)))) == identity
    check_encoder(identity, encoder)


def test_slightly_other_weights_pass_with_a_warning(
    encoder: HFCaptionEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_encoder(replace(identify(encoder), digest="0" * 64), encoder)
    assert "their probes agree" in caplog.text


@pytest.mark.parametrize("weights", ["the same", "other"])
def test_another_prefix_is_another_encoder(encoder: HFCaptionEncoder, weights: str) -> None:
    expected = identify(encoder)
    if weights == "other":
        expected = replace(expected, digest="0" * 64)
    encoder.prefix, prefix = "passage: ", encoder.prefix
    try:
        with pytest.raises(BundleError, match=r"multilingual-e5-small.*reads captions differently"):
            check_encoder(expected, encoder)
    finally:
        encoder.prefix = prefix


def test_another_width_is_another_encoder(encoder: HFCaptionEncoder) -> None:
    narrow = tuple(row[:8] for row in fingerprint(encoder))
    with pytest.raises(BundleError, match="8 wide"):
        check_encoder(EncoderIdentity("some/model", "0" * 64, narrow), encoder)


# ---- Without loading it --------------------------------------------------------------------------


def test_it_is_loaded_once_for_its_identity_while_its_files_stay(
    encoder: HFCaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.artifacts.SETTLED_S", -60)  # files count as settled at once
    model, cache = tmp_path / "model", tmp_path / "cache"
    save_encoder(encoder, model)
    config, loaded = CaptionEncoderConfig(model=str(model)), []

    def load(config: CaptionEncoderConfig, *, cache: Path) -> HFCaptionEncoder:
        loaded.append(config)
        return encoder

    monkeypatch.setattr(caption_encoder, "load_caption_encoder", load)
    first = identity_of(config, cache=cache)
    assert first == identify(encoder) == identity_of(config, cache=cache) and len(loaded) == 1
    identity_of(config.model_copy(update={"prefix": "passage: "}), cache=cache)
    assert len(loaded) == 2, "another prefix reads captions differently"
    (model / "vocab.txt").write_text("other words")
    identity_of(config, cache=cache)
    assert len(loaded) == 3, "another file may read captions differently"


def test_the_width_is_known_without_weights(
    encoder: HFCaptionEncoder, tmp_path: Path, pretrained_cache: Path
) -> None:
    save_encoder(encoder, tmp_path / "model")
    config = CaptionEncoderConfig(model=str(tmp_path / "model"))
    for _ in range(2):
        assert encoder_width(config, cache=tmp_path / "cache") == encoder.width
    assert encoder_width(CaptionEncoderConfig(), cache=pretrained_cache) == encoder.width


def test_an_encoder_that_is_nowhere_is_no_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    for find in (encoder_width, identity_of):
        with pytest.raises(PretrainedNotFoundError, match=r"tessera\[encoder\].*hub.*directory"):
            find(CaptionEncoderConfig(), cache=tmp_path)


def save_encoder(encoder: HFCaptionEncoder, directory: Path) -> None:
    """A directory with the encoder's configuration, as `save_pretrained` writes it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(encoder._model.config.to_dict()))
