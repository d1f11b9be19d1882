"""Training a generator on image tokens and captions: what a worker builds, and the bundle after.

A base bundle gives its weights and its styles; new styles take free places in the style table and
start from the mean of those that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from pipeline import registry
from pipeline.bundle import load_bundle, read_bundle, save_bundle
from pipeline.checkpoint import best_weights
from pipeline.config import CaptionEncoderConfig, GeneratorConfig
from pipeline.contracts import (
    CaptionIds,
    Family,
    GenerationRequest,
    ImageTokenizer,
    ModelParts,
    ModelSpec,
)  # fmt: skip
from pipeline.data_config import check_unmixed
from pipeline.datasets import captioned_dataset, sample_captions
from pipeline.errors import RecipeError
from pipeline.finetune import adapter_weights, merged_weights
from pipeline.image_grid import grid
from pipeline.models import load_family
from pipeline.models._captions import KnownCaptions
from pipeline.objective import GeneratorNetwork, Objective
from pipeline.overrides import shaped_like
from pipeline.steps import StepContext
from pipeline.tasks import gives_source
from pipeline.tasks._dataset import TaskDataset
from pipeline.text import HFCaptionEncoder, identify
from pipeline.tokenizers._saved import load_tokenizer
from pipeline.train import Training, fit

SAMPLE_PROMPTS = (
    "red apple", "dog face", "house", "fire engine", "rainbow", "pizza", "sailboat", "robot",
    "红苹果", "狗脸", "房子", "消防车", "彩虹", "披萨", "帆船", "机器人",
)  # fmt: skip


@dataclass(frozen=True)
class GeneratorTask:
    """Everything a worker needs to build its training; small enough to travel.

    Attributes:
        config: the recipe's section, completed from the base.
        spec: the sizes that the network is built by.
        sample_prompts: the caption encoder's states of what `draw_samples` draws.
        tokenizer: the image tokenizer's directory.
        images: image tokens or pixels, whichever the family reads.
        captions: the caption encoder's states of every caption.
        base: the bundle that training starts from.
        language_model: where the pretrained language model lies that the network is built around,
            or the base's text tokenizer.
    """

    config: GeneratorConfig
    spec: ModelSpec
    sample_prompts: KnownCaptions
    tokenizer: Path
    images: Path
    captions: Path
    base: Path | None
    language_model: str | None = None

    @property
    def family(self) -> Family:
        return load_family(self.config.family)

    @property
    def caption_ids(self) -> CaptionIds | None:
        """See `contracts.Family.caption_ids`."""
        return self.family.caption_ids(self.config, self.language_model)

    def model(self) -> GeneratorNetwork:
        """The network that training starts from: the base's, or a fresh one."""
        model = self.family.build(self.config, self.spec)
        if self.base is not None:
            start_from(model, self.base, self.spec)
        elif self.language_model is not None:
            model.start_from_language_model(self.language_model)
        return model

    def build(self) -> Training:
        """See pipeline.train.Training."""
        family, model, tokenizer = self.family, self.model(), self.caption_ids
        sizes = (
            {"num_tokens": self.spec.num_tokens}
            if family.reads == "image_tokens"
            else {"image_size": self.spec.image_size}
        )
        train, validation = (
            captioned_dataset(
                self.images,
                self.captions,
                split=split,
                styles=self.spec.styles,
                max_tokens=self.sample_prompts.max_tokens,
                image_filter=self.config.data,
                caption_tokenizer=tokenizer,
                **sizes,
            )
            for split in ("train", "validation")
        )
        if self.base is None and tokenizer is None:
            model.standardise_captions(*sample_captions(train))
        if gives_source(self.config.tasks):
            train, validation = (
                TaskDataset(rows, self.config.tasks) for rows in (train, validation)
            )
        objective = family.objective(model, self.config)
        return Training(objective, train, validation, sample=partial(draw_samples, task=self))


def train_generator(
    context: StepContext,
    task: GeneratorTask,
    *,
    encoder: HFCaptionEncoder,
    caption_encoder: CaptionEncoderConfig,
    split: str,
) -> dict[str, float]:
    """Train on Ray and leave "bundle" in the step's directory, and of LoRA "adapters.safetensors".

    Args:
        encoder: the one that the task's captions were read with.
        caption_encoder: how it is found again.
        split: DataConfig.split of the pictures.

    Returns:
        The metrics of the checkpoint that the bundle is made of.

    Raises:
        TesseraError: as `train.fit`.
    """
    config = task.config
    result = fit(
        task.build,
        config.train,
        storage=context.path,
        name="generator",
        run=context.run,
        on_progress=context.on_progress,
    )
    weights = best_weights(result.checkpoint)
    if adapters := adapter_weights(weights):
        (context.path / "adapters.safetensors").write_bytes(save(adapters))
        weights = merged_weights(task.model(), config.train, weights)
    if config.base_share:
        torch.manual_seed(config.train.seed)  # as the workers did before they made theirs
        weights = mixed_with_start(task.model(), weights, config.base_share)
    save_bundle(
        context.path / "bundle",
        weights=weights,
        tokenizer=task.tokenizer,
        image_size=task.spec.image_size,
        config=config,
        spec=task.spec,
        caption_encoder=caption_encoder,
        identity=identify(encoder),
        text_tokenizer=task.language_model,
        split=split,
    )
    return result.metrics


def check_generator(config: GeneratorConfig, section: str = "generator") -> None:
    """Refuse what a generator's section says that its family cannot do: tasks that do not exist or
    that the family cannot learn, augmentation where it sees no pixels, sizes that do not fit.

    Raises:
        RecipeError: names the setting and what there is.
    """
    family = load_family(config.family)
    family.check(config, section)
    augment = config.train.augment
    reads_tokens = family.reads == "image_tokens"
    if reads_tokens and any(getattr(augment, name) for name in augment.model_fields_set):
        raise RecipeError(
            f"{section}.train.augment: the family {config.family} trains on image tokens, encoded "
            "once; augment the views they are made of in the section `encode`"
        )
    if not reads_tokens:
        check_unmixed(augment, f"{section}.train")
    if gives_source(config.tasks) and not family.reads_source:
        able = [n for n in registry.names("models") if load_family(n).reads_source]
        raise RecipeError(
            f"{section}.tasks={list(config.tasks)}: the family {config.family} sees no source "
            f"picture; take text_to_image alone, or one of the families {', '.join(able)}"
        )


def shape_of_base(config: GeneratorConfig, base: Path | None) -> GeneratorConfig:
    """The recipe's generator section with what it leaves open of the network's shape from the base;
    as it is without a base.

    Raises:
        RecipeError: the recipe sets a shape that is not the base's.
        BundleError: the base cannot be read.
    """
    if base is None:
        return config.completed()
    built = read_bundle(base).generator
    values = shaped_like(config, built, ("family",), section="generator", whose="the base's")
    values.setdefault("tasks", built.tasks)
    config = GeneratorConfig.model_validate(values).completed()
    values = shaped_like(
        config, built.completed(), load_family(config.family).shape_fields,
        section="generator", whose="the base's",
    )  # fmt: skip
    return GeneratorConfig.model_validate(values)


def make_spec(
    tokenizer: ImageTokenizer,
    caption_width: int,
    styles: Sequence[str],
    base: Path | None,
    config: GeneratorConfig,
    language_model: str | None = None,
) -> ModelSpec:
    """The sizes a generator is built by; a base's styles keep their places.

    Args:
        tokenizer: the one whose tokens it draws.
        caption_width: of the caption encoder's states.
        styles: of the pictures it trains on.
        base: the bundle it starts from.
        language_model: where a causal family's pretrained one lies.

    Raises:
        RecipeError: more styles than generator.num_styles.
    """
    known = read_bundle(base).model_spec.styles if base else ()
    names = (*known, *sorted(set(styles) - set(known)))
    if len(names) > config.num_styles:
        raise RecipeError(
            f"{len(names)} styles ({', '.join(names)}) do not fit generator.num_styles="
            f"{config.num_styles}; raise it or filter generator.data.styles"
        )
    return ModelSpec(
        image_size=tokenizer.image_size,
        codebook_size=tokenizer.codebook_size,
        num_tokens=tokenizer.grid_size**2,
        levels=tokenizer.levels,
        caption_width=caption_width,
        styles=names,
        language_model=_language_model_config(config, base, language_model),
    )


def _language_model_config(
    config: GeneratorConfig, base: Path | None, source: str | None
) -> Mapping[str, Any]:
    found = (
        read_bundle(base).model_spec.language_model
        if base is not None
        else load_family(config.family).language_model_config(config, source)
    )
    dropout = {"attention_dropout": config.dropout} if "attention_dropout" in found else {}
    return {**found, **dropout}


@torch.no_grad()
def mixed_with_start(
    model: nn.Module, weights: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """The trained `weights`, with a `share` of those that `model` has, which training began with.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3: what is
    trained is better where it was trained, the mean of both also where it was not.
    """
    start = model.state_dict()
    return {
        name: tensor.lerp(start[name].to(tensor), share) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


@torch.no_grad()
def start_from(model: GeneratorNetwork, base: Path, spec: ModelSpec) -> None:
    """Copy a base bundle's weights; `model` has the base's shape (`shape_of_base`).

    Where it learns tasks that the base does not know, its tables may have more rows: those at the
    end stay as they are.

    Raises:
        RecipeError: the base knows tasks that the recipe leaves out, and has weights for them.
    """
    bundle = load_bundle(base)
    weights, wanted = bundle.model.state_dict(), model.state_dict()
    for name, known in weights.items():
        if known.shape == wanted[name].shape:
            continue
        if len(known) > len(wanted[name]):
            raise RecipeError(
                f"generator.tasks leaves out some of {list(bundle.manifest.generator.tasks)}, "
                "which the base has learnt: leave the setting out to take the base's"
            )
        weights[name] = torch.cat([known, wanted[name][len(known) :]])
    model.load_state_dict(weights)
    if known := bundle.manifest.model_spec.styles:
        rows = model.style_rows()
        fresh = [i for i, name in enumerate(spec.styles) if name not in known]
        rows[fresh] = rows[: len(known)].mean(0)


def draw_samples(objective: Objective, *, task: GeneratorTask) -> Image.Image:
    """Fixed prompts and seeds, eight a row: English above, Chinese below."""
    device = next(objective.model.parameters()).device
    was_training = objective.model.training
    tokenizer = load_tokenizer(task.tokenizer).to(device)
    generator = task.family.generator(
        objective.model,
        task.config,
        task.spec,
        ModelParts(tokenizer, task.sample_prompts, device, task.caption_ids),
    )
    style = task.spec.styles[-1] if task.spec.styles else None
    requests = [GenerationRequest(p, seed=i, style=style) for i, p in enumerate(SAMPLE_PROMPTS)]
    images = generator.generate(requests)
    objective.model.train(was_training)
    return grid(images, columns=8, captions=list(SAMPLE_PROMPTS), scale=2)
