"""The ImageNet judge's training: frozen features of every real image, then two small heads.

Like the aligner it is a measuring instrument, so it trains on all splits: it has to know the
held-out concepts by which generators are evaluated, and generators never see it. Images are moved
and mirrored, never blurred or made noisy. Ray Data computes the features, once; on one CPU core an
image's take about 20 ms per view. The heads train in this process, in seconds.

    values = train_imagenet_judge(context, pixels, captions, config, image_size=64, encoder=encoder)
    values["held_out_r1"]      # of groups that another pair of heads was not shown, among theirs
    judge = ImageNetJudge.load(context.path / "bundle", encoder=encoder)

Shapes: N images, V views of each, D features, M distinct captions, C channels of their states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipeline.artifacts import publish_once
from pipeline.config import AugmentConfig, ImageNetJudgeConfig
from pipeline.data.preprocess.encode import actor_options, in_order, use_one_thread, view_seed
from pipeline.data.preprocess.store import MappedRows, fixed_width, read_table
from pipeline.evaluation.aligner import MAX_LOGIT_SCALE, START_TEMPERATURE, group_info_nce
from pipeline.evaluation.features import ImageNetFeatures
from pipeline.evaluation.judges.trained import JudgeHeads, save_heads
from pipeline.images.augment import Augment
from pipeline.images.mirror import may_mirror
from pipeline.metrics import recall_at_k
from pipeline.progress import OnProgress, Progress
from pipeline.runtime import choose_device
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.tracking.steps import BUNDLE, StepContext

FEATURES = "features.npy"
IMAGES_PER_CALL = 64  # of the features' network
STATISTICS_ROWS = 20_000  # at most, that normalisation and style classifier are fitted to
WARMUP_STEPS = 20
STYLE_C, STYLE_ITERATIONS = 0.01, 200  # of scikit-learn's LogisticRegression


def train_imagenet_judge(
    context: StepContext,
    pixels: Path,
    captions: Path,
    config: ImageNetJudgeConfig,
    *,
    image_size: int,
    encoder: HFCaptionEncoder,
) -> dict[str, float]:
    """Train the judge and save it as "bundle" in the step's directory. Ray must be running.

    Args:
        pixels, captions: outputs of `preprocess` and `encode_captions`.
        image_size: pixels per side of the preprocessed images.
        encoder: the one that the captions were read with.

    Returns:
        "images", how many it trained on, and what `measure_held_out` says.

    Raises:
        DataError: no image has a caption.
    """
    file = context.path / FEATURES
    publish_once(
        file,
        lambda new: encode_features(
            pixels, new, config, image_size=image_size, on_progress=context.on_progress
        ),
    )
    data = JudgeData.read(file, pixels, captions)
    values = measure_held_out(data, config)
    heads = fit_heads(data, np.arange(len(data)), config)
    save_heads(
        context.path / BUNDLE, heads, config=config, encoder=encoder, styles=data.styles,
        held_out=values,
    )  # fmt: skip
    return {"images": float(len(data)), **values}


# ---- Features ------------------------------------------------------------------------------------


class _FeatureEncoder:
    """Ray Data actor: pixels -> the features of each image and of its variants."""

    def __init__(self, config: ImageNetJudgeConfig, image_size: int) -> None:
        use_one_thread()
        device = choose_device()
        self.features = ImageNetFeatures(config.resolution, device)
        self.config, self.image_size = config, image_size
        self.augment = Augment(AugmentConfig(shift=config.shift, flip=0.5))

    def __call__(self, batch: pa.Table) -> pa.Table:
        shape = (3, self.image_size, self.image_size)
        images = torch.from_numpy(fixed_width(batch["image"], np.uint8, shape).copy())
        texts = [[c["text"] for c in captions] for captions in batch["captions"].to_pylist()]
        flippable = torch.tensor([may_mirror(captions) for captions in texts])
        views = [self.features(images)]
        for view in range(1, self.config.num_views):
            keys = batch["key"].to_pylist()
            seeds = torch.tensor([view_seed(key, view, self.config.seed) for key in keys])
            views.append(self.features(self.augment(images, seeds=seeds, flippable=flippable)))
        rows = torch.stack(views, 1).half().numpy()  # (B, V, D)
        return pa.table({"features": pa.array([row.tobytes() for row in rows], pa.binary())})


def encode_features(
    pixels: Path,
    output: Path,
    config: ImageNetJudgeConfig,
    *,
    image_size: int,
    on_progress: OnProgress | None = None,
) -> None:
    """Write the features of every image: a .npy of float16 (N, V, D), in the order of the pixels.

    They do not depend on the number of actors. Ray must be running.

    Args:
        pixels: the folder of Parquet files that `preprocess` wrote.
        output: the file to write.
        image_size: pixels per side of the images.
        on_progress: called after every batch.
    """
    total = len(read_table(pixels, columns=[]))
    with in_order():
        data = ray.data.read_parquet(str(pixels), columns=["key", "captions", "image"])
        encoded = data.map_batches(
            _FeatureEncoder,
            fn_constructor_args=(config, image_size),
            batch_format="pyarrow",
            batch_size=IMAGES_PER_CALL,
            **actor_options(),
        )
    shape = (total, config.num_views, ImageNetFeatures.width)
    done = 0
    with output.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        batches = encoded.iter_batches(batch_size=None, batch_format="pyarrow")
        for batch in cast(Iterator[pa.Table], batches):
            file.writelines(batch["features"].to_pylist())
            done += batch.num_rows
            if on_progress is not None:
                on_progress(Progress(share=done / max(1, total), step=done))
    assert done == total, f"{done} of {total} images came back"


# ---- What the heads train on ---------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeData:
    """Features and captions of the captioned images.

    Attributes:
        features: float16 (N, V, D), mapped from disk; view 0 is of the image as it is.
        means: float32 (M, C), the mean state of every distinct caption.
        caption_ids: per image, the numbers of its captions in `means`.
        groups: int64 (N,); images of one group show the same thing.
        style: int64 (N,), numbers in `styles`.
        styles: sorted.
    """

    features: MappedRows
    means: Tensor
    caption_ids: list[NDArray[np.int64]]
    groups: NDArray[np.int64]
    style: NDArray[np.int64]
    styles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def features_of(self, rows: NDArray[np.int64], views: NDArray[np.int64] | int) -> Tensor:
        """One view of each of these images: float32 (rows, D)."""
        views = np.broadcast_to(np.asarray(views), rows.shape)
        return torch.from_numpy(self.features[rows, views].astype(np.float32))

    @classmethod
    def read(cls, features: Path, pixels: Path, captions: Path) -> JudgeData:
        """Read what `encode_features`, `preprocess` and `encode_captions` wrote.

        Raises:
            DataError: no image has a caption.
        """
        table = read_table(pixels, columns=["group", "captions"], captioned=True)
        texts = json.loads((captions / "captions.json").read_text(encoding="utf-8"))
        number = {text: i for i, text in enumerate(texts)}
        ids = [
            np.array([number[caption["text"]] for caption in row])
            for row in table["captions"].to_pylist()
        ]
        styles, style = np.unique(table["style"].to_pylist(), return_inverse=True)
        mapped = np.load(features, mmap_mode="r")
        return cls(
            features=MappedRows(mapped, table["row_index"].to_numpy()),
            means=_mean_states(captions),
            caption_ids=ids,
            groups=np.unique(table["group"].to_pylist(), return_inverse=True)[1],
            style=style,
            styles=tuple(styles.tolist()),
        )


def _mean_states(captions: Path) -> Tensor:
    """The mean of every distinct caption's states, float32 (M, C)."""
    states = np.load(captions / "states.npy", mmap_mode="r")
    offsets = np.load(captions / "offsets.npy")
    means = [states[a:b].mean(0, dtype=np.float32) for a, b in pairwise(offsets)]
    return torch.from_numpy(np.stack(means))


# ---- Training ------------------------------------------------------------------------------------


def fit_heads(data: JudgeData, rows: NDArray[np.int64], config: ImageNetJudgeConfig) -> JudgeHeads:
    """Train both heads on the images numbered `rows`, by the same loss as the aligner's, and the
    style classifier where there are two styles or more.

    Deterministic by `config.seed`, on one device and number of threads.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _fit_heads(data, rows, config)


def _fit_heads(data: JudgeData, rows: NDArray[np.int64], config: ImageNetJudgeConfig) -> JudgeHeads:
    heads = JudgeHeads(
        config,
        width=data.features.shape[2],
        caption_width=data.means.shape[1],
        num_styles=len(data.styles),
    )
    known = np.unique(np.concatenate([data.caption_ids[row] for row in rows]))
    heads.image_norm.fit(data.features_of(_spread(rows), 0))
    heads.caption_norm.fit(data.means[_spread(known)])
    scale = torch.nn.Parameter(torch.tensor(math.log(1 / START_TEMPERATURE)))
    optimizer = _optimizer(heads, scale, config)
    rng = np.random.default_rng(config.seed)
    batches = _batches(rows, config.batch_size, rng)
    for step in range(config.steps):
        factor = min(1.0, (step + 1) / WARMUP_STEPS)
        factor *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        chosen = next(batches)
        features = data.features_of(chosen, rng.integers(config.num_views, size=len(chosen)))
        captions = np.array([rng.choice(data.caption_ids[row]) for row in chosen])
        images = heads.images_to_embeddings(features)
        texts = heads.captions_to_embeddings(data.means[captions])
        groups = data.groups[chosen]
        same = (groups[:, None] == groups) | (captions[:, None] == captions)
        logits = scale.clamp(max=MAX_LOGIT_SCALE).exp() * images @ texts.T
        loss = group_info_nce(logits, torch.from_numpy(same), config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    heads.eval()
    if len(data.styles) > 1:
        _fit_styles(heads, data, rows)
    return heads


def measure_held_out(data: JudgeData, config: ImageNetJudgeConfig) -> dict[str, float]:
    """What heads that were trained on most groups know of the others.

    Returns:
        "held_out_r1": how often an image finds its own first caption among those of as many held
        out images of other groups, "held_out_captions"; "held_out_style", how often the classifier
        is right about them, if there are two styles. Empty if fewer than two groups are held out.
    """
    groups = np.unique(data.groups)
    count = round(config.held_out * len(groups))
    if count < 2:
        return {}
    kept_out = np.random.default_rng(config.seed).permutation(groups)[:count]
    is_out = np.isin(data.groups, kept_out)
    heads = fit_heads(data, np.flatnonzero(~is_out), config)
    out = np.flatnonzero(is_out)
    firsts = out[np.unique(data.groups[out], return_index=True)[1]]  # one image per group
    features = data.features_of(firsts, 0)
    captions = data.means[[data.caption_ids[row][0] for row in firsts]]
    with torch.no_grad():
        hits = recall_at_k(
            heads.images_to_embeddings(features), heads.captions_to_embeddings(captions), k=1
        )
        styles = heads.features_to_styles(features).numpy()
    found = {"held_out_r1": float(hits.mean()), "held_out_captions": float(len(firsts))}
    if len(data.styles) > 1:
        found["held_out_style"] = float((styles == data.style[firsts]).mean())
    return found


def _optimizer(
    heads: JudgeHeads, scale: torch.nn.Parameter, config: ImageNetJudgeConfig
) -> torch.optim.Optimizer:
    """AdamW, which decays matrices alone."""
    trained = [*heads.image_head.parameters(), *heads.caption_head.parameters()]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [*(p for p in trained if p.ndim < 2), scale], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )


def _batches(
    rows: NDArray[np.int64], size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Endless batches; in each pass over the rows every row comes once."""
    queue = np.empty(0, np.int64)
    while True:
        while len(queue) < min(size, len(rows)):
            queue = np.concatenate([queue, rng.permutation(rows)])
        yield queue[:size]
        queue = queue[size:]


def _fit_styles(heads: JudgeHeads, data: JudgeData, rows: NDArray[np.int64]) -> None:
    """Write a logistic regression over the standardised features into the style head."""
    rows = _spread(rows)
    with torch.no_grad():
        model = LogisticRegression(C=STYLE_C, max_iter=STYLE_ITERATIONS)
        model.fit(heads.image_norm(data.features_of(rows, 0)).numpy(), data.style[rows])
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(weight) == 1:  # of two classes scikit-learn gives the second's weights alone
            weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
        heads.style_head.weight.copy_(weight)
        heads.style_head.bias.copy_(bias)


def _spread(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Up to STATISTICS_ROWS of the rows, evenly spread."""
    count = min(len(rows), STATISTICS_ROWS)
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
