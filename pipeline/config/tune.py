"""The recipe's section `tune`: a search for better settings of the generator.

tune:
  num_trials: 8
  space:
    generator.train.learning_rate: {loguniform: [1.0e-4, 3.0e-3]}
    generator.depth: {choice: [4, 6, 8]}
"""

from __future__ import annotations

import random
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.config.section import Config

FIXED = {
    "family": "validation losses of two families cannot be compared; list them as candidates",
    "data": "trials must be validated on the same pictures",
    "tasks": "trials must be validated on the same tasks",
    "base_share": "it acts after training and does not change the validation loss",
    "guidance_scale": "it does not change the validation loss",
    "guidance_schedule": "it does not change the validation loss",
    "temperature": "it does not change the validation loss",
    "num_steps": "it does not change the validation loss",
    "train.max_steps": "it is the budget that trials compete within",
    "train.time_limit_s": "it is the budget that trials compete within",
    "train.restore": "trials are compared by the checkpoint that the recipe restores",
    "train.batch_size": "it says how many pictures trials are validated on",
    "train.sample_every": "it draws sample grids and does not change the training",
    "train.max_failures": "it does not change the training",
    "train.validation_batches": "trials must be validated on the same pictures",
}
"""Settings below `generator.` that cannot be searched, and why; a family adds its own
(`contracts.Family.unsearchable`)."""


class SettingSpace(Config):
    """The values that one setting is drawn from; exactly one of these is given."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="one of these values")
    uniform: tuple[float, float] | None = Field(None, description="a number from low to high")
    loguniform: tuple[float, float] | None = Field(
        None, description="a number from low to high whose logarithm is uniformly distributed"
    )
    integer: tuple[int, int] | None = Field(None, description="a whole number from low to high")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = sorted(name for name in type(self).model_fields if getattr(self, name) is not None)
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of choice, uniform, loguniform, integer; "
                f"there is {', '.join(given) or 'none'}"
            )
        limits = self.uniform or self.loguniform or self.integer
        if limits is not None and limits[0] >= limits[1]:
            raise ValueError(f"{given[0]}: {list(limits)} must rise from low to high")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform: {list(self.loguniform)} must be above 0")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or the two ends of a range."""
        return self.choice or self.uniform or self.loguniform or self.integer or ()

    def draw(self, rng: random.Random) -> Any:
        """One value, drawn as Ray Tune's search space of the same name draws."""
        from ray import tune  # seconds to import, and most commands do without it

        if self.choice is not None:
            return rng.choice(self.choice)
        if self.integer is not None:
            domain: Any = tune.randint(self.integer[0], self.integer[1] + 1)
        elif self.loguniform is not None:
            domain = tune.loguniform(*self.loguniform)
        else:
            assert self.uniform is not None
            domain = tune.uniform(*self.uniform)
        value = domain.sample(random_state=rng.randrange(2**32))
        return int(value) if self.integer is not None else float(value)


class TuneConfig(Config):
    """A search for better settings of the generator: random trials, the worse ones stopped early.

    ASHA (Li et al. 2020, arXiv 1810.05934) has rungs at grace_steps, reduction_factor times as many
    steps, and so on: of the trials that reach a rung, one in reduction_factor trains on.
    """

    num_trials: int = Field(8, ge=2, description="combinations of settings that are tried")
    space: dict[str, SettingSpace] = Field(
        min_length=1, description="dotted settings below `generator.`, each with its space"
    )
    grace_steps: int = Field(200, ge=1, description="optimiser steps before a trial can be stopped")
    reduction_factor: float = Field(
        3.0, gt=1, description="one trial in this many trains on at each rung"
    )
    max_concurrent: int = Field(1, ge=1, description="trials that train at once")
    seed: int = Field(0, ge=0, description="seed by which the trials' settings are drawn")

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        for key in self.space:
            inside = key.removeprefix("generator.")
            if inside == key:
                raise ValueError(
                    f"tune.space: {key!r} is no setting of the generator; the search trains "
                    "generators alone, so every key begins with 'generator.'"
                )
            for name, reason in FIXED.items():
                if inside == name or inside.startswith(name + "."):
                    raise ValueError(f"tune.space: {key!r} cannot be searched: {reason}")
        return self

    def draws(self) -> list[dict[str, Any]]:
        """The trials' settings by dotted key; the same ones for the same section."""
        rng = random.Random(self.seed)
        return [
            {key: space.draw(rng) for key, space in self.space.items()}
            for _ in range(self.num_trials)
        ]
