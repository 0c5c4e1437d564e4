"""What a model is to be loaded as: the one description that building and loading share.

Imports nothing heavy, so that a command can make one before it checks anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.facts import OWN_DEFAULTS, Defaults

DEFAULT_CACHE_DIR = Path("~/.cache/fourstep").expanduser()


@dataclass(frozen=True, slots=True)
class Order:
    """``backend``, ``precision`` and ``device`` may be ``auto``; None leaves a number to
    the engine. The device ``cpu`` draws as if no GPU were here, ``cuda`` only where there is one.
    """

    model: str  # folder, single file, shipped name, hub id or bundle
    backend: str = "auto"
    precision: str = "auto"
    cache_dir: Path = DEFAULT_CACHE_DIR
    num_threads: int | None = None
    max_batch: int | None = None
    loras: Mapping[str, str | Path] = field(default_factory=dict)  # those that a recipe may name
    defaults: Defaults = OWN_DEFAULTS
    serve_meanwhile: bool = False  # draw by torch at once where a bundle must be built first
    device: str = "auto"
    unet: str | None = None  # in place of the model's own, as is `vae`: folder, file or hub id
    vae: str | None = None
    tiny_vae: str | None = None  # beside the VAE, a second one; None: the demo models' own
    motion_adapter: str | None = None  # makes a model of pictures one of clips
    vae_tiling_px: int = 0  # images with a longer side are decoded in tiles of it; 0: none are
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # options over the checkpoint's own
    architecture: str | None = None  # of a single file: a diffusers folder or a shipped name
    embeddings: Mapping[str, str | Path] = field(default_factory=dict)  # by the word for each
    t5_int8: bool = False  # the linear layers of a T5 encoder in 8 bits
    long_prompts: bool = False  # go on in further windows of the text encoder
