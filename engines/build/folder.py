"""What a diffusers folder says of itself: its JSON files, and the variant of its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError, reason_of

# `model.safetensors`, and with a variant's name or a shard's number, in either order.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?"
    r"\.safetensors"
)


def read_json(file: Path) -> Mapping[str, Any]:
    """Raises CheckpointError where it is no JSON object."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {reason_of(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds {values!r:.40}; it must be a JSON object")
    return values


def weights_in(component: Path) -> dict[Path, str | None]:
    """The files with a component's weights, in order of their names, and the variant of each."""
    named = (
        (path, WEIGHTS.fullmatch(path.name)) for path in sorted(component.glob("*.safetensors"))
    )
    return {path: match["variant"] for path, match in named if match}


def variant_of(folder: Path, components: Iterable[Path]) -> str | None:
    """The variant of the weights, where a component's folder has them in no other form.

    diffusers takes it then for each component that has it, and plain weights for the others.
    """
    alone = []
    for component in components:
        found = list(weights_in(component).values())
        if found and None not in found:
            alone.append({variant for variant in found if variant})
    if not alone:
        return None
    shared = set.intersection(*alone)
    if not shared:
        listed = ", ".join(sorted(set().union(*alone)))
        raise CheckpointError(
            f"{folder} has its components in different variants ({listed}); save them in one"
        )
    return "fp16" if "fp16" in shared else min(shared)
