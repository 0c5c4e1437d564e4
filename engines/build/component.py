"""A UNet, a VAE or a motion adapter alone, in place of a checkpoint's own or beside it: of a folder
or of one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.build import motion
from engines.build.folder import read_json, variant_of
from engines.build.single_file import TINY_VAE_KEYS, Header, misplaced, read_header
from engines.errors import CheckpointError, reason_of
from engines.facts import MOTION_ADAPTER, TINY_VAE

TINY_CLASS = "AutoencoderTiny"
WANTED = {
    "unet": "a UNet", "vae": "a VAE", TINY_VAE: "a tiny VAE", MOTION_ADAPTER: "a motion adapter",
}  # fmt: skip
OPTIONS = {"MotionAdapter": "--motion-adapter", "AutoencoderTiny": "--tiny-vae"}  # by class
GUIDANCE_EMBEDDING = "time_embedding.cond_proj.weight"


def load_component(name: str, path: Path, classes: Sequence[str], base: Path, dtype: Any) -> Any:
    """The module of class ``classes`` at ``path``; a file has the shape that ``base`` says.

    ``base`` is a diffusers folder, of which only the component's configuration is read.

    Raises:
        CheckpointError: it is something else, or was made for another architecture.
    """
    try:
        if path.is_dir():
            return _of_folder(name, path, classes, dtype)
        return _of_file(name, read_header(path), classes, base, dtype)
    except CheckpointError:
        raise
    except Exception as error:  # diffusers raises many kinds; all mean the same here
        raise CheckpointError(
            f"{name} {path} cannot be loaded by diffusers: {reason_of(error)}; a file must be of "
            "the base's own architecture, give any other as a folder with its config.json"
        ) from error


def _kind(name: str) -> str:
    """The component of a pipeline that one of this name is of."""
    return "vae" if name == TINY_VAE else name


def check_tiny_vae(pipeline: Any, path: Path) -> None:
    """Raise CheckpointError where the pipeline's ``tiny_vae`` reads other latents than its VAE."""
    found, wanted = (
        (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
        for vae in (pipeline.tiny_vae, pipeline.vae)
    )
    if found != wanted:
        raise CheckpointError(
            f"{TINY_VAE} {path} decodes latents of {found[0]} channels to {found[1]} pixels a "
            f"side, this model's have {wanted[0]} and make {wanted[1]}: use one made for them"
        )


def _of_folder(name: str, path: Path, classes: Sequence[str], dtype: Any) -> Any:
    import diffusers

    folder = _kind(name)
    places = [place for place in (path, path / folder) if (place / "config.json").is_file()]
    if not places:
        raise CheckpointError(
            f"{name} {path} has neither config.json nor {folder}/config.json: it is no diffusers "
            "folder; a file alone is given by its own path"
        )
    found = read_json(places[0] / "config.json").get("_class_name")
    if found not in classes:
        way_out = f": give it by {OPTIONS[found]}" if found in OPTIONS else ""
        raise CheckpointError(
            f"{name} {places[0]} is of class {found!r}; known are {', '.join(classes)}{way_out}"
        )
    return getattr(diffusers, str(found)).from_pretrained(
        places[0],
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        variant=variant_of(path, [places[0]]),
    )


def _of_file(name: str, header: Header, classes: Sequence[str], base: Path, dtype: Any) -> Any:
    import diffusers

    if header.kind not in (_kind(name), "checkpoint"):
        raise CheckpointError(misplaced(header, WANTED[name], "--model BASE"))
    if name == MOTION_ADAPTER:
        return motion.of_file(header, dtype)
    if header.has(*TINY_VAE_KEYS) and TINY_CLASS in classes:
        return _tiny_vae(header.file, dtype)
    if name == TINY_VAE:
        raise CheckpointError(
            f"{name} {header.file} has no {TINY_CLASS} (TAESD's architecture) in it: give a whole "
            "VAE by --vae FILE"
        )
    own = read_json(base / name / "config.json").get("_class_name", classes[0])
    if own != classes[0]:
        raise CheckpointError(
            f"{name} {header.file} has no configuration, and the base's own is of class {own}: "
            "give it as a folder with its config.json"
        )
    embedding = header.shapes.get(GUIDANCE_EMBEDDING)
    return getattr(diffusers, classes[0]).from_single_file(
        str(header.file),
        config=str(base),
        subfolder=name,
        dtype=dtype,
        local_files_only=True,
        **({"time_cond_proj_dim": embedding[1]} if embedding else {}),
        **({"in_channels": 9} if header.unet_channels == 9 else {}),
    )


def _tiny_vae(file: Path, dtype: Any) -> Any:
    """TAESD in diffusers' own names: there is one architecture of it, with no factor of its own."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    vae = AutoencoderTiny()
    vae.load_state_dict(load_file(file))
    return vae.to(dtype).eval()
