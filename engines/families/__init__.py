"""What a model is, family by family: how a pipeline becomes parts, what a recipe asks of them.

A family is a module that offers what `family.Family` lists; adding one means adding it below. Knows
diffusers' modules and no engine, no file and no request.
"""

from __future__ import annotations

from engines.errors import BundleError, CheckpointError
from engines.families import animatediff, pixart, stable_diffusion, stable_diffusion_xl
from engines.families.family import Family

FAMILIES: tuple[Family, ...] = (stable_diffusion, stable_diffusion_xl, pixart, animatediff)


def family_of(pipeline_class: str) -> Family:
    """The family that handles a diffusers pipeline class.

    Raises:
        CheckpointError: none does.
    """
    for family in FAMILIES:
        if pipeline_class in family.PIPELINES:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.PIPELINES)
    raise CheckpointError(f"pipeline class {pipeline_class!r} is not supported; known are {known}")


def family_named(name: str) -> Family:
    """The family of a name that `Facts` carry.

    Raises:
        BundleError: there is none of that name, in this version.
    """
    for family in FAMILIES:
        if name == family.NAME:
            return family
    known = ", ".join(family.NAME for family in FAMILIES)
    raise BundleError(f"the bundle is of family {name!r}; this version knows {known}")
