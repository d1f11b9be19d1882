"""What tests share: one Ray session, the converted caption encoder, a tiny but real bundle."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.runtime import ENVIRONMENT, start_ray

os.environ.pop("TESSERA_PLUGINS", None)  # tests are of Tessera's own files
# before PyTorch and Ray are imported; what the user has set stays
os.environ.update({"HF_HUB_OFFLINE": "1", **ENVIRONMENT, **os.environ})

import pytest
import ray
import torch
from hypothesis import settings

from pipeline import registry
from pipeline.bundles.bundle import save_bundle
from pipeline.config import CaptionEncoderConfig, GeneratorConfig, TokenizerConfig
from pipeline.contracts import ModelSpec
from pipeline.models import load_family
from pipeline.models.gan import GanConfig
from pipeline.text.caption_encoder import HFCaptionEncoder, load_caption_encoder
from pipeline.text.encoder_identity import identify
from pipeline.tokenizers import build_tokenizer
from pipeline.tokenizers._saved import save_tokenizer
from pipeline.tracking.runs import connect

settings.register_profile("shared-machine", deadline=None, max_examples=50)
settings.load_profile("shared-machine")

# A runner in the background of a shell ignores Ctrl-C, and its children inherit that: some tests
# press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_TOKENIZER = TokenizerConfig(
    levels=(5, 5, 5), widths=(16, 32), encoder_depths=(1, 1), decoder_depths=(1, 1)
)
TINY_GENERATOR = GeneratorConfig(
    width=32, depth=2, heads=2, caption_depth=1, num_steps=4, gan=GanConfig(channels=8)
)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray for all tests of the run."""
    started = start_ray()
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def pretrained_cache(request: pytest.FixtureRequest) -> Path:
    """Converted pretrained models, kept from run to run."""
    return Path(request.config.cache.mkdir("pretrained"))


@pytest.fixture(scope="session")
def encoder(pretrained_cache: Path) -> HFCaptionEncoder:
    """The default caption encoder, for real."""
    return load_caption_encoder(CaptionEncoderConfig(), cache=pretrained_cache)


@pytest.fixture(scope="session")
def tiny_bundles(
    tmp_path_factory: pytest.TempPathFactory, encoder: HFCaptionEncoder
) -> dict[str, Path]:
    """A bundle with random weights for every family: everything real but the training."""
    directory = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TINY_TOKENIZER, 64)
    save_tokenizer(directory / "tokenizer", tokenizer.state_dict(), TINY_TOKENIZER, 64)
    spec = ModelSpec(
        image_size=64,
        codebook_size=tokenizer.codebook_size,
        num_tokens=64,
        levels=TINY_TOKENIZER.levels,
        caption_width=encoder.width,
        styles=("noto", "twemoji"),
    )
    for family in registry.names("models"):
        made = load_family(family)
        config = TINY_GENERATOR.model_copy(update={"family": family})
        spec = replace(spec, language_model=made.language_model_config(config, None))
        save_bundle(
            directory / family,
            weights=made.build(config, spec).state_dict(),
            tokenizer=directory / "tokenizer",
            image_size=64,
            config=config,
            spec=spec,
            caption_encoder=CaptionEncoderConfig(),
            identity=identify(encoder),
        )
    return {family: directory / family for family in registry.names("models")}


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundles: dict[str, Path]) -> Path:
    """That of the masked family."""
    return tiny_bundles["masked"]


@pytest.fixture(scope="session")
def new_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes a home directory whose database has its tables, which MLflow takes
    seconds to make."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = tmp_path_factory.mktemp("made")
        connect(made)

    def copy(name: str) -> Path:
        home = tmp_path_factory.mktemp(name)
        shutil.copy(made / "mlflow.db", home)
        return home

    return copy
