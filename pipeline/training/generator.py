"""Training a generator: what every worker builds, and the bundle that training leaves.

    task = GeneratorTask(config, spec, ...)
    metrics = train_generator(context, task, encoder=encoder, ...)  # writes context.path / "bundle"

Training that starts from a base bundle takes its weights and its styles. New styles take free rows
of the style table, and start from the mean of the base's styles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.bundles.bundle import load_bundle, read_bundle, save_bundle
from pipeline.config import CaptionEncoderConfig, GeneratorConfig
from pipeline.contracts import (
    CaptionTokenizer,
    Family,
    GenerationRequest,
    ModelParts,
    ModelSpec,
)  # fmt: skip
from pipeline.errors import RecipeError
from pipeline.images.grid import grid
from pipeline.models import load_family
from pipeline.objective import GeneratorNetwork, Objective
from pipeline.tasks import gives_source
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.text.caption_readers import KnownCaptions
from pipeline.text.encoder_identity import identify
from pipeline.tokenizers._saved import load_tokenizer
from pipeline.tracking.steps import StepContext
from pipeline.training.checkpoint import best_weights
from pipeline.training.datasets import captioned_dataset, sample_captions
from pipeline.training.loop import Training, fit
from pipeline.training.policy import adapter_weights, merged_weights
from pipeline.training.task_dataset import TaskDataset

SAMPLE_PROMPTS = (
    "red apple", "dog face", "house", "fire engine", "rainbow", "pizza", "sailboat", "robot",
    "红苹果", "狗脸", "房子", "消防车", "彩虹", "披萨", "帆船", "机器人",
)  # fmt: skip


@dataclass(frozen=True)
class GeneratorTask:
    """Everything that a worker needs to build its training; small enough to send to any worker.

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
    def caption_tokenizer(self) -> CaptionTokenizer | None:
        """See `contracts.Family.caption_tokenizer`."""
        return self.family.caption_tokenizer(self.config, self.language_model)

    def model(self) -> GeneratorNetwork:
        """The network that training starts from: the base's, or a fresh one."""
        model = self.family.build(self.config, self.spec)
        if self.base is not None:
            start_from(model, self.base, self.spec)
        elif self.language_model is not None:
            model.start_from_language_model(self.language_model)
        return model

    def build(self) -> Training:
        """See pipeline.training.loop.Training."""
        family, model, tokenizer = self.family, self.model(), self.caption_tokenizer
        sizes = (
            {"num_tokens": self.spec.num_tokens}
            if family.reads == "image_tokens"
            else {"image_size": self.spec.image_size}
        )
        rows = [
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
        ]
        if self.base is None and tokenizer is None:
            model.standardise_captions(*sample_captions(rows[0]))
        train, validation = (
            TaskDataset(each, self.config.tasks) if gives_source(self.config.tasks) else each
            for each in rows
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
    """Train on Ray, and write "bundle" (with LoRA also "adapters.safetensors") to context.path.

    Args:
        encoder: the caption encoder that the task's captions were encoded with.
        caption_encoder: the recipe's section by which it is found again.
        split: DataConfig.split of the images.

    Returns:
        The metrics of the checkpoint that the bundle is made of.

    Raises:
        TesseraError: as `loop.fit`.
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
        torch.manual_seed(config.train.seed)  # the weights that the workers began with
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
        pretrained_features={
            **(read_bundle(task.base).pretrained_features if task.base is not None else {}),
            **task.family.pretrained_features(config),
        },
    )
    return result.metrics


@torch.no_grad()
def mixed_with_start(
    model: nn.Module, weights: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Mix trained weights with a `share` of those that training began with (WiSE-FT).

    Fine-tuned weights are better on what they were tuned on, the mix on what they were not.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903),
    section 3.

    Args:
        model: has the weights that training began with.
        weights: the trained ones.
    """
    start = model.state_dict()
    return {
        name: tensor.lerp(start[name].to(tensor), share) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


@torch.no_grad()
def start_from(model: GeneratorNetwork, base: Path, spec: ModelSpec) -> None:
    """Copy a base bundle's weights into a model of the base's shape (`shapes.shape_of_base`).

    The tables of a model that learns further tasks may have more rows than the base's: the rows at
    their end stay as they are.

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
    """Images of SAMPLE_PROMPTS with fixed seeds, eight per row: English above, Chinese below."""
    device = next(objective.model.parameters()).device
    was_training = objective.model.training
    tokenizer = load_tokenizer(task.tokenizer).to(device)
    generator = task.family.generator(
        objective.model,
        task.config,
        task.spec,
        ModelParts(tokenizer, task.sample_prompts, device, task.caption_tokenizer),
    )
    style = task.spec.styles[-1] if task.spec.styles else None
    requests = [GenerationRequest(p, seed=i, style=style) for i, p in enumerate(SAMPLE_PROMPTS)]
    images = generator.generate(requests)
    objective.model.train(was_training)
    return grid(images, columns=8, captions=list(SAMPLE_PROMPTS), scale=2)
