"""Which model families there are: each says how its pipeline becomes parts and facts.

A family module offers ``PIPELINES`` (diffusers class names), ``COMPONENTS`` (the classes of theirs
that it takes, by name), ``facts(name, pipeline)`` and ``parts(pipeline, facts)``.
Adding one means adding a module and a line here.
"""

from __future__ import annotations

from types import ModuleType

from engines.errors import CheckpointError
from engines.families import stable_diffusion

FAMILIES: tuple[ModuleType, ...] = (stable_diffusion,)


def family_of(pipeline_class: str) -> ModuleType:
    """The family that handles a diffusers pipeline class.

    Raises:
        CheckpointError: none does.
    """
    for family in FAMILIES:
        if pipeline_class in family.PIPELINES:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.PIPELINES)
    raise CheckpointError(f"pipeline class {pipeline_class!r} is not supported; known are {known}")
