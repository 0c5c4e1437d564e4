"""The shapes that a plan takes: of each size, batch and length of text, and of clips' frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from engines.build.plan import PlanTarget, Profile, Shape
from engines.facts import Facts
from engines.families.tiles import grid_of

if TYPE_CHECKING:
    from engines.families.part import Part

LANES_OF_A_CLIP = 2  # with guidance
Shapes = Mapping[str, Shape]  # by input


def profiles_of(part: Part, target: PlanTarget, facts: Facts) -> list[Profile]:
    """The shapes a part's plan takes.

    `tensorrt`: one fixed shape for each size, batch and length of text, which its tactics are then
    timed for; of clips as many frames as such a call may have.
    `tensorrt-rtx` specialises kernels when it runs and wants one wide profile; of clips there are
    two, one of few frames in many lanes.
    """
    scale = facts.vae_scale_factor
    latents = [(h // scale, w // scale) for w, h in target.sizes_px]
    if "decoder" in part.name:
        latents = _decoded(latents, target, scale)
    if target.engine == "tensorrt":
        least = (1, *(batch + 1 for batch in target.batches))  # lanes that are filled up to one
        fixed = [
            _profile(
                *(_shapes(part, batch, *size, chunks, n) for n in _frames(lanes, target, facts))
            )
            for chunks in range(1, target.max_chunks + 1)
            for size in latents
            for batch, lanes in zip(target.batches, least, strict=False)
        ]
        return [profile for i, profile in enumerate(fixed) if profile not in fixed[:i]]
    rows, columns = zip(*latents, strict=True)
    of_clips = any(dim and dim[0] == "frames" for dims in part.dynamic.values() for dim in dims)
    spans = [(1, target.max_batch)]
    if of_clips and target.max_batch > LANES_OF_A_CLIP:
        spans = [(1, LANES_OF_A_CLIP), (LANES_OF_A_CLIP + 1, target.max_batch)]
    profiles = []
    for fewest, most in spans:
        few, own, many = _frames(fewest, target, facts)
        low = _shapes(part, fewest, min(rows), min(columns), 1, few)
        best = _shapes(part, most, *latents[0], 1, own)
        high = _shapes(part, most, max(rows), max(columns), target.max_chunks, many)
        profiles.append(_profile(low, best, high))
    return profiles


def _frames(lanes: int, target: PlanTarget, facts: Facts) -> tuple[int, int, int]:
    """Of a clip in a call of so many lanes: at least, by default and at most.

    As `engines.drawing.runner` fills calls: one clip of any length, or pictures up to the batch.
    """
    most = facts.max_num_frames
    if lanes > LANES_OF_A_CLIP:
        most = max(1, min(most, target.max_batch // lanes))
    return 1, min(most, facts.default_num_frames), most


def _profile(low: Shapes, best: Shapes, high: Shapes) -> Profile:
    return {name: (low[name], best[name], high[name]) for name in low}


def _decoded(
    latents: list[tuple[int, int]], target: PlanTarget, scale: int
) -> list[tuple[int, int]]:
    """What decoders are given of latents, rows and columns each: whole ones, or their tiles.

    A wide profile takes sizes between those named too, whose last tiles may be of one latent.
    """
    grids = [grid_of(*size, target.tile_px, scale) for size in latents]
    found = [
        shape
        for size, grid in zip(latents, grids, strict=True)
        for shape in ([size] if grid is None else grid.shapes())
    ]
    wide = target.engine != "tensorrt" and any(grid is not None for grid in grids)
    return [*dict.fromkeys(found), *[(1, 1)] * wide]


def _shapes(part: Part, batch: int, rows: int, columns: int, chunks: int, frames: int) -> Shapes:
    sizes = {
        "batch": batch, "rows": rows // part.patch, "columns": columns // part.patch,
        "chunks": chunks, "frames": frames,
    }  # fmt: skip
    return {
        name: tuple(
            int(fixed) if dim is None else dim[1] * sizes[dim[0]]
            for fixed, dim in zip(example.shape, part.dynamic[name], strict=True)
        )
        for name, example in part.example.items()
    }
