"""What the training loop trains: a network and its losses, met in one small module.

The loop (`pipeline.training.loop`) knows these two base classes and nothing else: a family, the
image tokenizer and the aligner each subclass `Objective`, and what the fine-tuning policies ask of
a network stands in `TrainableNetwork`. Every optional method has a documented default here.

    class Regression(Objective):
        phases = ("fit",)

        def __init__(self, model: TrainableNetwork) -> None:
            super().__init__()
            self.model = model

        def losses(self, batch, phase):
            return {"loss": F.mse_loss(self.model(batch["x"]), batch["y"])}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class TrainableNetwork(nn.Module):
    """A network that the fine-tuning policies can be applied to (`pipeline.training.policy`).

    The policies `full` and, without text modules, nothing else are offered by default; a network
    offers `head` and `lora` by overriding `head_modules`, and `frozen` by overriding
    `text_modules`.
    """

    def head_modules(self) -> Sequence[nn.Module] | None:
        """The modules that the policy `head` trains and the policy `lora` trains in full: output
        head, new embeddings, last blocks. None: neither policy is offered."""
        return None

    def text_modules(self) -> Sequence[nn.Module] | None:
        """The modules that read captions, which the policy `frozen` leaves untrained. None: the
        policy is not offered."""
        return None


class GeneratorNetwork(TrainableNetwork):
    """The network of a text-to-image family (`contracts.Family.build`)."""

    def style_rows(self) -> Tensor:
        """The styles' embeddings (num_styles or more, D), one row per style in the order of their
        ids. Writing to the rows changes the network."""
        raise NotImplementedError

    def standardise_captions(self, states: Tensor, mask: Tensor) -> None:
        """Start from the statistics of these captions' states, float (B, L, C) with mask bool
        (B, L). The default does nothing: for networks that do not read states."""

    def start_from_language_model(self, source: str) -> None:
        """Take the weights of the pretrained language model that lies at `source`. Only called
        for families whose `language_model` names one."""
        raise NotImplementedError


class TokenizerNetwork(TrainableNetwork):
    """The network of an image tokenizer (`contracts.TokenizerKind.build`): an autoencoder that is
    a `contracts.ImageTokenizer`, with its attributes.

    Shapes: B images, H = W = image_size, N = grid_size ** 2 tokens.
    """

    codebook_size: int
    levels: tuple[int, ...] = ()
    grid_size: int
    image_size: int

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What training learns by.

        Args:
            images: float (B, 3, H, W) in [-1, 1].

        Returns:
            The reconstruction through the tokens, float (B, 3, H, W), not clamped, with gradients
            to everything that trains; and the tokenizer's own loss, a scalar that is added to the
            reconstruction losses (0 where it has none).
        """
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [-1, 1] -> int64 (B, N) in [0, codebook_size), row by row."""
        raise NotImplementedError

    def decode(self, image_tokens: Tensor) -> Tensor:
        """int64 (B, N) -> float (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def head_modules(self) -> Sequence[nn.Module]:
        """What the policy `head` trains: modules that `decode` uses and `encode` does not, so that
        image tokens keep their meaning."""
        raise NotImplementedError


class Objective(nn.Module):
    """A network together with the losses it is trained by.

    Attributes:
        phases: what one training step does, in order. A language model has one phase; a GAN has
            ("discriminator", "generator"). Each phase has its own backward pass and optimiser step.
        model: the network that is averaged (EMA), saved and used after training.
        min_validation_rows: the fewest rows that `validate` needs in one batch.
    """

    phases: tuple[str, ...]
    model: TrainableNetwork
    min_validation_rows: int = 1

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """Scalars of one phase by name; the one called "loss" is minimised."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """The same as `losses`: DistributedDataParallel calls `forward`."""
        return self.losses(batch, phase)

    def trained_network(self, phase: str) -> nn.Module:
        """The network whose weights the phase updates, with an optimiser of its own per network.
        The default is `model` in every phase."""
        return self.model

    def learning_rate_ratio(self, phase: str) -> float:
        """The factor on the recipe's learning rate in a phase. The default is 1."""
        return 1.0

    def validate(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of a validation batch by name, "loss" among them, by which training stops and
        the best checkpoint is chosen. The default is the losses of the last phase."""
        return self.losses(batch, self.phases[-1])

    def compilable(self) -> Sequence[nn.Module]:
        """Modules to hand to torch.compile, best blocks that are alike: compilation takes time for
        every further shape. The default is none."""
        return ()
