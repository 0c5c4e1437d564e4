"""What a model family offers: how its pipeline becomes parts, and what a recipe asks of them.

Whatever a denoiser takes beside latents, timestep, coefficients, noise and guidance is its
conditioning: tensors that the family names, fills and documents. Nobody above reads the names.
Where the tensors come from decides who fills them in:

    from the recipe alone (a size, a guidance weight)   `Conditions.tensors`, at once
    a number for each step (a share of a ControlNet)    `Conditions.tables`, at once
    from texts (embeddings, pooled ones, masks)         the outputs of the part ``text_encoder``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from engines.facts import Facts
from engines.families.part import Part
from engines.families.recipe import Recipe
from engines.samplers import Schedule

Lanewise = tuple[Tensor, ...]  # one for all lanes of a row, or one for each


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a recipe asks of the parts, as far as no engine call is needed to know it.

    ``texts`` has one for each lane: the prompt, then, under classifier-free guidance, what to keep
    out. None stands for zeros in place of all that the text encoder would say. ``latents`` is the
    shape of the row's latents, without the batch. Tables are float32 ``[num_steps, ...]``.

    Rows share an engine call where latents and tensors of the same name have the same shapes.
    """

    texts: tuple[str | None, ...]
    latents: tuple[int, ...]
    tensors: Mapping[str, Lanewise] = field(default_factory=dict)
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)


class Family(Protocol):
    """A module of this package; ``NAME`` is what manifests and `Facts.family` say, ``PIPELINES``
    are class names of diffusers.
    """

    @property
    def NAME(self) -> str: ...  # noqa: N802 - constants of a module

    @property
    def PIPELINES(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def COMPONENTS(self) -> Mapping[str, tuple[str, ...]]:  # noqa: N802
        """Of a pipeline, by name: the classes that the parts can be made of."""

    @property
    def SIZE_CONDITIONING(self) -> bool:  # noqa: N802
        """Whether its models are told sizes: `Recipe.original_size` and the two beside it."""

    @property
    def TOKENWISE(self) -> tuple[str, ...]:  # noqa: N802
        """Outputs of the part ``text_encoder`` that speak of each token, ``[B, L, ...]``; others
        speak of a text as a whole. The denoiser takes those of several windows side by side.
        """

    def facts(self, name: str, pipeline: Any, scheduler: Mapping[str, Any]) -> Facts:
        """What serving must know of a loaded diffusers pipeline; ``scheduler`` are options that
        count instead of its own, as with diffusers' ``from_config(config, **options)``.
        """

    def parts(self, pipeline: Any, known: Facts) -> list[Part]:
        """The graphs of a pipeline, the largest last; `engines/README.md` has names and shapes."""

    def conditions(self, facts: Facts, recipe: Recipe, schedule: Schedule) -> Conditions:
        """What a recipe asks of the parts. Runs where requests are handled: host work, no pipeline.

        Raises:
            engines.errors.InvalidInput: a value that this family's models do not take.
        """
