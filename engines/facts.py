"""What is known of a model besides its weights: the part of a manifest that serving reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EIGHT_BITS = ("int8", "fp8")  # precisions; the latter is TensorRT's alone
DECODERS = ("full", "tiny")  # a model's own VAE, and a tiny one beside it
TINY_VAE = "tiny_vae"  # name of the component that stands beside the model's own VAE
MOTION_ADAPTER = "motion_adapter"  # of the one that makes a UNet of pictures one of clips


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that does not say, in place of the checkpoint's own; None leaves it."""

    sampler: str | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    timesteps: tuple[int, ...] | None = None
    decoder: str | None = None


# Of a prompt that goes on in further windows: 225 tokens, as trainers have it (kohya's
# `max_token_length`); each costs an encoder call and length in every cross-attention.
MAX_CHUNKS = 3
OWN_DEFAULTS = Defaults()  # the checkpoint's


@dataclass(frozen=True, slots=True)
class Window:
    """What the text encoder reads of a text: an input of its part, filled by one tokenizer."""

    input: str
    tokenizer: str  # of a pipeline and, as a file with the ending .json, of a bundle
    max_tokens: int  # begin and end marks included
    pad_token_id: int
    eos_token_id: int
    lowered: bool = False  # reads texts in small letters, without spaces around them

    def written(self, text: str) -> str:
        """A text as it is given to the tokenizer."""
        return text.lower().strip() if self.lowered else text


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes in pixels unless named otherwise; ``scheduler``: what the checkpoint's config gives."""

    name: str
    family: str
    latent_channels: int
    vae_scale_factor: int  # pixels per latent side
    default_size_px: int
    size_multiple_px: int
    min_size_px: int
    max_size_px: int
    windows: tuple[Window, ...]
    time_cond_dim: int  # of the guidance embedding; 0: the model has none
    default_sampler: str
    default_num_steps: int
    default_guidance_scale: float
    scheduler: Mapping[str, Any]
    num_coefficients: int = 7  # of a step that the denoiser takes, see `engines.samplers`
    # Names of what stands in for the checkpoint's own, or beside it, by a component's name.
    components: Mapping[str, str] = field(default_factory=dict)
    # Names of the files that taught its text encoders a word, by that word.
    embeddings: Mapping[str, str] = field(default_factory=dict)
    idle_weights: tuple[str, ...] = ()  # how names begin of those that no part's output depends on
    strength_drops_steps: bool = True  # see `engines.samplers.schedule.Wanted`
    zeros_for_no_negative: bool = False  # guided rows without negative prompt have no text at all
    takes_mask: bool = False  # its UNet sees what is to stay, see `engines.drawing.inpainting`
    max_chunks: int = 1  # windows of text that the denoiser's conditioning may have the length of
    default_timesteps: tuple[int, ...] | None = None  # of default_num_steps with default_sampler
    default_decoder: str = "full"  # one of `decoders`
    gives_image: bool = True  # its decoders do, before it is rounded: what tiles need
    tiny_encodes: bool = True  # a tiny VAE does both ways
    default_num_frames: int = 1  # of a clip
    max_num_frames: int = 1
    frames_per_second: int = 0  # at which its clips are shown; 0: it draws pictures
    t5_int8: bool = False  # the linear layers of its text encoder are in 8 bits
    told_size: bool = False  # its denoiser is told the size that is drawn
    # Height and width by their ratio: what it draws from text at, see `drawn_size`.
    aspect_bins: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def drawn_size(self, width_px: int, height_px: int, has_image: bool = False) -> tuple[int, int]:
        """Width and height of what is drawn for a size that is asked for: of the nearest bin in
        ratio, as ``PixArtImageProcessor.classify_height_width_bin`` of diffusers; from an image,
        or where there are no bins, the size itself.
        """
        if not self.aspect_bins or has_image:
            return width_px, height_px
        wanted = height_px / width_px
        nearest = min(self.aspect_bins, key=lambda ratio: abs(float(ratio) - wanted))
        height, width = self.aspect_bins[nearest]
        return width, height

    @property
    def draws_clips(self) -> bool:
        """Whether its latents have an axis of frames, and what it draws as well."""
        return self.frames_per_second > 0

    @property
    def max_tokens(self) -> int:
        """Of a text, where no encoder is to cut it."""
        return min(window.max_tokens for window in self.windows)

    @property
    def decoders(self) -> tuple[str, ...]:
        """What a recipe may be decoded by."""
        return DECODERS if TINY_VAE in self.components else DECODERS[:1]

    @property
    def encoders(self) -> tuple[str, ...]:
        """What images may be encoded by; none for clips, which are drawn from text alone."""
        if self.draws_clips:
            return ()
        return self.decoders if self.tiny_encodes else DECODERS[:1]

    @property
    def scheduler_class(self) -> str | None:
        """The checkpoint's own, of diffusers; None in manifests of before it was kept."""
        return self.scheduler.get("_class_name")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """As `to_json` wrote them, now or before there was what it fills in."""
        values = {"gives_image": False, "tiny_encodes": False} | dict(values)
        if "windows" not in values:
            names = ("max_tokens", "pad_token_id", "eos_token_id")
            only = {name: values.pop(name) for name in names}
            values["windows"] = [{"input": "input_ids", "tokenizer": "tokenizer", **only}]
            values["num_coefficients"] = 6
            # What Stable Diffusion's pipelines set, and options of a class without it lacked.
            values["scheduler"] = {"clip_sample": False} | values["scheduler"]
        values.setdefault("strength_drops_steps", not values["time_cond_dim"])
        values["idle_weights"] = tuple(values.get("idle_weights", ()))
        values["windows"] = tuple(Window(**window) for window in values["windows"])
        bins = values.get("aspect_bins", {})
        values["aspect_bins"] = {ratio: tuple(size) for ratio, size in bins.items()}
        if values.get("default_timesteps") is not None:
            values["default_timesteps"] = tuple(values["default_timesteps"])
        return cls(**values)
