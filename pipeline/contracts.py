"""The interfaces between the parts of Tessera: what they know of each other, and nothing more.

A protocol here is what one part asks of another; optional behaviour has a documented default, which
an implementation inherits by subclassing the protocol.

Shapes use B images in a batch, H and W pixels (H = W = image_size), N image tokens
(N = grid_size ** 2), S styles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config.overrides import explain
from pipeline.errors import DataError

if TYPE_CHECKING:  # the HTTP ingress imports this file and does without PyTorch and PyArrow
    import torch
    from torch import Tensor

    from pipeline.config import GeneratorConfig
    from pipeline.config.section import Config
    from pipeline.config.tokenizer import TokenizerConfig
    from pipeline.data.shards.manifest import Manifest
    from pipeline.objective import GeneratorNetwork, Objective, TokenizerNetwork

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Caption:
    """One description of an image.

    Attributes:
        text: what the image shows, NFC-normalised, not empty.
        language: BCP 47 tag, for example "en" or "zh".
    """

    text: str
    language: str


@dataclass(frozen=True)
class Sample:
    """One captioned image, still encoded, with its provenance.

    Attributes:
        key: unique name within a shard set; letters, digits, "-" and "_" only.
        image: the encoded image (PNG, WebP or JPEG); empty where the source has none.
        extension: the image's file name extension without the dot: "png", "webp", "jpg".
        captions: what it shows; the first caption of a language is the shortest, canonical one.
            Empty for images that train the tokenizer alone.
        group: what the image is of; a split never parts a group (for emoji: the code point).
        style: who made it, or in which manner; a condition that the generator can be given.
        source: where it came from, name and version.
        license: SPDX identifier.
        attribution: the credit that the licence asks for.
    """

    key: str
    image: bytes
    extension: str
    captions: tuple[Caption, ...]
    group: str
    style: str
    source: str
    license: str
    attribution: str


@dataclass(frozen=True)
class LeftOut:
    """Something that a source holds and cannot use, told beside its samples: nothing is lost
    without a word.

    Attributes:
        reason: a key for tables, one of `REASONS` in pipeline/data/shards/tally.py where it fits.
        example: where it is and what is wrong, for a person: "row 7 names gone.png, ...".
        of: what is lost: an image, one caption of an image that stays, or a file that is neither.
    """

    reason: str
    example: str
    of: Literal["image", "caption", "file"] = "image"

    def within(self, where: str) -> LeftOut:
        """The same, its example preceded by what it is in."""
        return replace(self, example=f"{where}: {self.example}")


@dataclass(frozen=True)
class Positional:
    """Marks a setting of a source that `tessera ingest` takes by its position, not by its name.

    folder: Annotated[str, Positional()] = Field(description="A directory or URI.")
    """


@dataclass(frozen=True)
class OptionName:
    """The name of a setting on the command line, where it is not the field's.

    vendors: Annotated[tuple[str, ...], OptionName("vendor")] = Field(("noto",), description="...")
    """

    name: str


class Source(BaseModel):
    """Captioned images from anywhere, as one stream of `Sample`s.

    A source is one file of pipeline/data/sources, or of a plugin directory (pipeline/registry.py),
    that defines a subclass of this class as `SOURCE`. `tessera ingest` has a command of the file's
    name. The first paragraph of the file's docstring is the command's help; the fields of the class
    are its arguments and options, with their descriptions, defaults and limits (`ge`, `le`):

        class SquaresSource(Source):
            side: int = Field(64, ge=8, description="Side of a square, in pixels.")

            def samples(self) -> Iterator[Sample | LeftOut]:
                ...

        SOURCE = SquaresSource

    A field may be a text, number, truth value, path, `Literal`, an optional one of these, or a
    tuple of any number of them, which becomes an option that may be repeated.

    Attributes:
        default_output: where `tessera ingest` writes without --out; None: --out must be given.
        captioned: whether an image without a caption is a loss, which the ingest's table counts.
        cache: directory to keep downloads in. `tessera ingest` sets it to HOME/downloads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_output: ClassVar[str | None] = None
    captioned: ClassVar[bool] = True
    cache: Path = Path(".tessera/downloads")

    def __init__(self, **settings: Any) -> None:
        """Check the settings.

        Raises:
            DataError: a setting is unknown, missing, of the wrong type or outside its limits.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise DataError(explain(error, type(self))) from error

    @abstractmethod
    def samples(self) -> Iterator[Sample | LeftOut]:
        """Yield every sample once, in a deterministic order, and what cannot be used as `LeftOut`.

        One bad row costs itself, not the set. A sample without its image or its captions may be
        yielded as it is: `tessera ingest` counts it with its reason.

        Raises:
            DataError: the source is missing or damaged as a whole.
        """

    def index(self, output: str) -> Manifest | None:
        """The manifest of WebDataset tars that are read where they are, for a set at `output`.

        By default None: the samples are written to `output` as shards.
        """
        return None


@dataclass(frozen=True)
class Canvas:
    """An image to start from, S = image_size pixels per side.

    Attributes:
        pixels: uint8 (S, S, 3), RGB, as bytes.
        mask: uint8 (S, S) as bytes, not 0 where the image is generated anew; the rest stays as it
            is. None: a random `share` of its image tokens is generated anew, chosen by the
            request's seed.
        share: of the image tokens, in (0, 1]; only without a mask.
    """

    pixels: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    share: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One image to generate. It depends on its own request alone, not on the rest of its batch: on
    CPUs to the bit (README.md names the exceptions).

    Attributes:
        prompt: what the image shows, in any language that the caption encoder reads; it may be
            empty if there is a canvas.
        seed: 0 <= seed <= MAX_SEED; the same request gives the same image again.
        style: one of the generator's styles, or None for whichever the model prefers.
        guidance_scale: classifier-free guidance, >= 1; 1 is off. None: the model's default.
        temperature: > 0 scales the sampling noise; 0 is greedy. None: the model's default.
        num_steps: decoding steps, >= 1. None: the model's default.
        negative_prompt: what guidance leads away from. None: from an image without a caption.
        canvas: an image to start from; for models with the task "completion".
    """

    prompt: str
    seed: int = 0
    style: str | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    num_steps: int | None = None
    negative_prompt: str | None = None
    canvas: Canvas | None = None


OnStep = Callable[[int, int], None]
"""Called after every decoding step with (steps done, steps in all); may raise to stop."""


@runtime_checkable
class ImageGenerator(Protocol):
    """A model ready to generate, of whatever family. Evaluation and serving know nothing else.

    Attributes:
        image_size: pixels per side of the images.
        tasks: what it can be asked for, by the names of pipeline/tasks.
        styles: the styles that a request may name.
    """

    image_size: int
    tasks: frozenset[str]
    styles: tuple[str, ...]

    def generate(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Generate one image per request.

        Args:
            requests: B of them, with settings of their own each.
            on_step: called after every decoding step.

        Returns:
            uint8 (B, 3, H, W), RGB.

        Raises:
            RequestError: a request is outside the model's limits; nothing was generated.
        """


class GenerationBatch(Protocol):
    """A batch that is generated one decoding step at a time; requests are numbered as rows."""

    def step(self) -> bool:
        """Do one decoding step of every row that is neither done nor dropped.

        Returns:
            Whether there was such a row.
        """

    def progress(self, row: int) -> tuple[int, int]:
        """How many steps of a row are done, and how many there are."""

    def drop(self, rows: Sequence[int]) -> None:
        """Generate these rows no further, which leaves more time for the others."""

    def images(self, rows: Sequence[int]) -> Tensor:
        """The images of these rows as far as they are: uint8 (len(rows), 3, H, W)."""


@runtime_checkable
class ContinuousBatch(GenerationBatch, Protocol):
    """A batch that requests join, and finished rows leave, between two decoding steps.

    Attributes:
        joinable: whether the model at hand can do it.
    """

    joinable: bool

    def join(self, requests: Sequence[GenerationRequest]) -> range:
        """Add requests.

        Returns:
            Their rows.

        Raises:
            RequestError: as `ImageGenerator.generate`; no request was added.
        """

    def forget(self, rows: Sequence[int]) -> None:
        """Drop these rows and forget their images; their numbers are not used again."""


@dataclass(frozen=True)
class TokenCount:
    """What one image cost.

    Attributes:
        text: tokens of its prompts that were read.
        canvas: image tokens of its canvas that were read.
        drawn: image tokens that were generated.
    """

    text: int
    canvas: int
    drawn: int


@runtime_checkable
class SteppedGenerator(ImageGenerator, Protocol):
    """A generator that can be watched and interrupted between its decoding steps."""

    def start(self, requests: Sequence[GenerationRequest]) -> GenerationBatch:
        """Begin what `generate` does at once.

        Raises:
            RequestError: as `generate`.
        """

    def count_tokens(self, request: GenerationRequest) -> TokenCount:
        """What the image of a request that was served has cost."""


@runtime_checkable
class StepChoosingGenerator(ImageGenerator, Protocol):
    """A generator whose requests may choose the number of decoding steps.

    Attributes:
        num_steps: of a request that does not choose.
    """

    num_steps: int


@dataclass(frozen=True)
class PromptTokens:
    """How much of a prompt a model reads.

    Attributes:
        used: tokens that are read; the rest of the prompt is cut.
        given: tokens that the prompt has, those included that the encoder puts around it.
    """

    used: int
    given: int


@runtime_checkable
class PromptCountingGenerator(ImageGenerator, Protocol):
    """A generator that tells how much of a prompt it reads."""

    def count_prompt(self, prompt: str) -> PromptTokens:
        """May be called from any thread, while the generator works."""


@runtime_checkable
class ImageTokenizer(Protocol):
    """An image <-> a grid of discrete tokens. Encoding, generators and evaluation know no more.

    Attributes:
        codebook_size: how many values a token can have.
        levels: the FSQ levels of a token's dimensions, by which generators embed neighbouring codes
            alike; empty for other tokenizers.
        grid_size: tokens per side, so that N = grid_size ** 2.
        image_size: pixels per side.
    """

    codebook_size: int
    levels: tuple[int, ...]
    grid_size: int
    image_size: int

    def encode(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [-1, 1] -> int64 (B, N) in [0, codebook_size)."""

    def decode(self, image_tokens: Tensor) -> Tensor:
        """int64 (B, N) -> float (B, 3, H, W) in [-1, 1]."""


class TokenizerKind(Protocol):
    """A kind of image tokenizer: everything that the rest of Tessera asks of it, in one object.

    A file of pipeline/tokenizers (or of a plugin directory) defines `TOKENIZER`, an instance of a
    subclass of this protocol; the file's name is what a recipe calls it in `tokenizer.name`.

    Attributes:
        options: the config class of the section `tokenizer.NAME`, where NAME is the file's name.
        shape_fields: dotted settings below `tokenizer` that decide which weights the network has,
            beside the name; a training that goes on from a tokenizer takes them from there.
        unread: settings below `tokenizer` that have no effect, each with the reason as the end of
            the sentence "SETTING is without effect REASON".
    """

    options: type[Config]
    shape_fields: tuple[str, ...] = ()
    unread: Mapping[str, str] = {}

    def build(self, config: TokenizerConfig, image_size: int) -> TokenizerNetwork:
        """The network, freshly initialised, for square images of `image_size` pixels per side.

        Raises:
            RecipeError: the settings do not fit each other or the image size.
        """
        ...


class CaptionEncoder(Protocol):
    """A frozen pretrained language model that reads captions.

    Attributes:
        width: of its states.
        max_tokens: L; longer captions are cut.
    """

    @property
    def width(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> states float (B, L, width) and mask bool (B, L), L <= max_tokens."""

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption before it is cut; from any thread."""


class CaptionTokenizer(Protocol):
    """Reads captions as token ids, for families built around a language model of their own.

    Attributes:
        max_tokens: L; longer captions are cut.
    """

    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> ids int64 (B, L) and mask bool (B, L); an empty caption stands for none
        and has a mask that is all False."""

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption before it is cut; from any thread."""


@dataclass(frozen=True)
class ModelSpec:
    """The sizes that a generator's network is built by; part of a bundle's config.json.

    Attributes:
        image_size: pixels per side.
        codebook_size: how many values an image token can have.
        num_tokens: image tokens per image, N.
        levels: FSQ levels of a token's dimensions; empty for other tokenizers.
        caption_width: width of the caption encoder's states.
        styles: names by style id; at most GeneratorConfig.num_styles.
        language_model: its Hugging Face config, for families that are built around one.
    """

    image_size: int
    codebook_size: int
    num_tokens: int
    levels: tuple[int, ...]
    caption_width: int
    styles: tuple[str, ...]
    language_model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelParts:
    """What a generator needs beside its network.

    Attributes:
        tokenizer: decodes image tokens.
        encoder: reads captions as states.
        device: where images are generated.
        caption_tokenizer: reads captions as token ids, for families that read those instead.
    """

    tokenizer: ImageTokenizer
    encoder: CaptionEncoder
    device: torch.device
    caption_tokenizer: CaptionTokenizer | None = None


class Family(Protocol):
    """A model family: everything that the rest of Tessera asks of it, in one object.

    A file of pipeline/models (or of a plugin directory) defines `FAMILY`, an instance of a subclass
    of this protocol; the file's name is the family's name in `generator.family`. No code outside
    pipeline/models asks which family it is.

    Attributes:
        options: the config class of the section `generator.NAME`, where NAME is the family's name.
        reads: what training batches hold: image tokens made once by the tokenizer, or pixels.
        reads_source: whether it can see a source image, which the task `completion` gives.
        shape_fields: dotted settings below `generator` that decide the network's shape, beside the
            family itself; a fine-tune takes them from its base.
        unsearchable: dotted settings below `generator` that `tessera tune` must not search, each
            with the reason.
        exports: whether `export` writes a format that other programs load.
    """

    options: type[Config]
    reads: Literal["image_tokens", "images"] = "image_tokens"
    reads_source: bool = False
    shape_fields: tuple[str, ...] = ()
    unsearchable: Mapping[str, str] = {}
    exports: bool = False

    def unread(self, config: GeneratorConfig) -> Mapping[str, str]:
        """The settings below `generator` that have no effect, each with the reason as the end of
        the sentence "SETTING is without effect REASON". The default is none."""
        return {}

    def check(self, config: GeneratorConfig, section: str) -> None:
        """Refuse settings that do not go together; the default accepts all.

        Args:
            section: the recipe's name for the section, for the message.

        Raises:
            RecipeError: names the setting and what would fit.
        """
        return

    def pretrained_features(self, config: GeneratorConfig) -> Mapping[str, str]:
        """The pretrained image features that its losses look through, sha256 of the weights by
        name. A bundle records them, and no judge that sees through the same evaluates it. The
        default is none."""
        return {}

    def language_model(self, config: GeneratorConfig) -> str | None:
        """The pretrained language model that the network is built around: a hub id, a path or
        package:NAME. The default is none."""
        return None

    def language_model_config(
        self, config: GeneratorConfig, source: str | None
    ) -> Mapping[str, Any]:
        """`ModelSpec.language_model` of a new network; the default is none.

        Args:
            source: where the pretrained language model lies, if there is one.

        Raises:
            PretrainedNotFoundError: there is no such model.
            RecipeError: the model cannot serve this family.
        """
        return {}

    def caption_tokenizer(
        self, config: GeneratorConfig, source: str | None
    ) -> CaptionTokenizer | None:
        """What reads captions as token ids, given where the text tokenizer lies (None: there is
        none of its own). The default, None, means that the family reads the caption encoder's
        states."""
        return None

    @abstractmethod
    def build(self, config: GeneratorConfig, spec: ModelSpec) -> GeneratorNetwork:
        """The network, freshly initialised.

        Raises:
            RecipeError: the sizes do not fit together.
        """
        ...

    @abstractmethod
    def objective(self, model: Any, config: GeneratorConfig) -> Objective:
        """The losses that `model`, which `build` made, is trained by."""
        ...

    @abstractmethod
    def generator(
        self, model: Any, config: GeneratorConfig, spec: ModelSpec, parts: ModelParts
    ) -> ImageGenerator:
        """`model`, which `build` made, ready to generate images.

        The weights of `model` and of the tokenizer may be in the dtype of mixed precision
        (`runtime.cast_weights`): use both inside `runtime.autocast(device)`.
        """
        ...

    def export(self, model: Any, directory: Path) -> None:
        """Write the network in another program's format into the new directory."""
        raise AssertionError("only a family that sets `exports` is asked to export")


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; where it was measured once, both ends are the number."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def short(self) -> str:
        """For tables: without the interval where there is none."""
        return f"{self.value:.3f}" if self.low == self.high else str(self)


@dataclass(frozen=True)
class EvalReport:
    """What evaluation measured of one subject on one evaluation set.

    Attributes:
        subject: what was evaluated: "candidate", "champion", "untuned" (the base), "tokenizer"
            (reconstructions), "real", or the name of one of several candidates.
        metrics: by name, for example "kid/unseen", "imagenet_r1/all", "latency_s";
            pipeline/evaluation/scores.py lists them.
        details: which images it was measured on: the evaluation set's digest, its style, counts.
    """

    subject: str
    metrics: Mapping[str, Interval]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RuleVerdict:
    """What one rule of the promotion gate says of a candidate.

    Attributes:
        rule: the kind of rule; "judges": whether any judge is valid, "chance": that a model without
            a predecessor is better than shuffled captions.
        metric: what the rule is about; empty for "judges".
        outcome: "skipped" rules neither help nor refuse.
        reason: one sentence, numbers included.
        before, after: the metric of what the candidate must beat, and of the candidate.
        gain: of the candidate, above zero where it is better, with the interval of probability
            `level` that the rule was tested by.
        level: of the gain's interval, in (0, 1), corrected for the number of rules.
        needed: what the gain is compared with; in a limit, what `after` is compared with.
        images: how many the metric is of.
    """

    rule: Literal["judges", "chance", "improve", "keep", "limit", "slice"]
    metric: str
    outcome: Literal["yes", "no", "skipped"]
    reason: str
    before: float | None = None
    after: float | None = None
    gain: Interval | None = None
    level: float | None = None
    needed: float | None = None
    images: int = 0


@dataclass(frozen=True)
class Decision:
    """Whether the candidate becomes champion, and why.

    Attributes:
        promoted: True if the candidate becomes champion.
        reasons: a summary, then one sentence per rule, numbers included.
        verdicts: one per rule and slice.
    """

    promoted: bool
    reasons: tuple[str, ...]
    verdicts: tuple[RuleVerdict, ...] = ()
