"""diffusers' own pipelines, driven by our recipes: what every result is compared with."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from diffusers.pipelines.deprecated.audio_diffusion.pipeline_audio_diffusion import (
    AudioDiffusionPipeline,
)
from PIL import Image

from engines.drawing.runner import Runner
from engines.drawing.stage import Stage
from engines.families.recipe import Recipe
from engines.order import Order

SCHEDULERS = {
    "lcm": LCMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "tcd": TCDScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
}
PIPELINES = {  # of a checkpoint's own class → from text, from an image, with a mask
    "StableDiffusionPipeline": (
        StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
    ),
    "LatentConsistencyModelPipeline": (
        LatentConsistencyModelPipeline, LatentConsistencyModelImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    ),
    "StableDiffusionXLPipeline": (
        StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
    ),
    "StableDiffusionInpaintPipeline": (StableDiffusionInpaintPipeline,) * 3,
    "StableDiffusionXLInpaintPipeline": (StableDiffusionXLInpaintPipeline,) * 3,
    "PixArtAlphaPipeline": (PixArtAlphaPipeline, None, None),
    "PixArtSigmaPipeline": (PixArtSigmaPipeline, None, None),
    "AnimateDiffPipeline": (AnimateDiffPipeline, None, None),
}  # fmt: skip
ALGORITHMS = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}
MAX_LATENT_ERROR = 1e-3
MIN_PSNR_DB = 50.0


@dataclass(frozen=True)
class Result:
    """Final latents float32 ``[C, h, w]`` and pixels uint8 ``[H, W, 3]``; of clips ``[C, F, h, w]``
    and ``[F, H, W, 3]``.
    """

    latents: np.ndarray
    pixels: np.ndarray


def scheduler_of(sampler: str, config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler for one of our samplers, as its ``from_config`` makes it."""
    algorithm = {"algorithm_type": ALGORITHMS[sampler]} if sampler in ALGORITHMS else {}
    return SCHEDULERS[sampler].from_config(dict(config), **algorithm)


def recipe(**changes: Any) -> Recipe:
    """A 64-pixel, four-step recipe with some of it changed."""
    values: dict[str, Any] = {
        "prompt": "a red cube", "width_px": 64, "height_px": 64, "seed": 3, "num_steps": 4,
        "guidance_scale": 1.0, "sampler": "lcm", "eta": 0.0,
    }  # fmt: skip
    return Recipe(**(values | changes))


class Peer:
    """The diffusers pipelines over one checkpoint folder."""

    def __init__(
        self,
        folder: Path,
        *,
        loras: Mapping[str, Path] | None = None,
        encode: Callable[[Any, Recipe], dict[str, Any]] | None = None,
        vae: Any = None,
    ) -> None:
        """``encode``: a pipeline and a recipe to arguments that stand in for its prompts; ``vae``
        in place of the checkpoint's own.
        """
        self._encode = encode
        own = json.loads((folder / "model_index.json").read_text())["_class_name"]
        self._text_class, self._image_class, self._mask_class = PIPELINES[own]
        self._pipeline = self._text_class.from_pretrained(folder, use_safetensors=True)
        if vae is not None:
            self._pipeline.register_modules(vae=vae)
        self._folder, self._loras = folder, dict(loras or {})
        for name, path in self._loras.items():
            self._pipeline.load_lora_weights(path, adapter_name=name)
        self._known: dict[Any, Result] = {}

    def draw(self, wanted: Recipe) -> Result:
        """What diffusers makes of a recipe, with a generator of the recipe's seed."""
        fields = (getattr(wanted, name) for name in wanted.__slots__)
        key = tuple(v.tobytes() if isinstance(v, np.ndarray) else repr(v) for v in fields)
        if key not in self._known:
            self._known[key] = self._draw(wanted)
        return self._known[key]

    def fuse(self, wanted: Recipe) -> dict[str, torch.Tensor]:
        """The UNet's weights by name after diffusers' own `fuse_lora`, on a pipeline of its own."""
        pipeline = self._text_class.from_pretrained(self._folder, use_safetensors=True)
        for name in wanted.loras:
            pipeline.load_lora_weights(self._loras[name], adapter_name=name)
        pipeline.set_adapters(list(wanted.loras), list(wanted.loras.values()))
        pipeline.fuse_lora(components=["unet"], adapter_names=list(wanted.loras))
        named = pipeline.unet.named_parameters()
        return {name.replace(".base_layer", ""): weight.detach() for name, weight in named}

    def _of(self, kind: Any, **parts: Any) -> Any:
        """The checkpoint as another of its family's pipelines."""
        parts = self._pipeline.components | parts
        known = inspect.signature(kind).parameters
        options = {
            "requires_safety_checker": False, "safety_checker": None, "feature_extractor": None,
            "image_encoder": None, "add_watermarker": False,
            "force_zeros_for_empty_prompt": self._pipeline.config.get(
                "force_zeros_for_empty_prompt"
            ),
        }  # fmt: skip
        given = parts | options
        return kind(**{name: given[name] for name in known if name in given})

    def inpaint_region(self, wanted: Recipe, padding_px: int) -> np.ndarray:
        """uint8 ``[H, W, 3]`` of the recipe's image: what its mask marks, drawn at its size."""
        assert wanted.image is not None
        assert wanted.mask is not None
        pipeline = self._of(self._mask_class)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            prompt=wanted.prompt, image=Image.fromarray(wanted.image),
            mask_image=Image.fromarray(wanted.mask).convert("L"), padding_mask_crop=padding_px,
            width=wanted.width_px, height=wanted.height_px, strength=wanted.strength,
            num_inference_steps=wanted.num_steps, guidance_scale=wanted.guidance_scale,
            generator=torch.Generator().manual_seed(wanted.seed),
        ).images  # fmt: skip
        return np.asarray(images[0])

    def _draw(self, wanted: Recipe) -> Result:
        if wanted.loras:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(list(wanted.loras), list(wanted.loras.values()))
        elif self._loras:
            self._pipeline.disable_lora()
        if self._text_class is self._mask_class:
            wanted = _with_mask(wanted)
        scheduler = scheduler_of(wanted.sampler, self._pipeline.scheduler.config)
        arguments: dict[str, Any] = {
            "prompt": wanted.prompt,
            "num_inference_steps": wanted.num_steps,
            "guidance_scale": wanted.guidance_scale,
            "generator": torch.Generator().manual_seed(wanted.seed),
            "output_type": "latent",
        }
        if wanted.timesteps is not None:
            arguments["timesteps"] = list(wanted.timesteps)
        if wanted.blends:
            arguments |= {"prompt": None, "prompt_embeds": self._blended(wanted)}
        if self._text_class is not LatentConsistencyModelPipeline or wanted.mask is not None:
            arguments |= {"negative_prompt": wanted.negative_prompt, "eta": wanted.eta}
        if self._text_class is StableDiffusionXLPipeline:
            arguments |= {
                "original_size": wanted.original_size, "target_size": wanted.target_size,
                "crops_coords_top_left": wanted.crops_coords_top_left or (0, 0),
            }  # fmt: skip
        if self._encode is not None:
            arguments |= self._encode(self._pipeline, wanted)
        pixart = self._text_class in (PixArtAlphaPipeline, PixArtSigmaPipeline)
        if pixart:  # an absent negative prompt is no text to it
            arguments |= {"negative_prompt": wanted.negative_prompt or "", "clean_caption": False}
        if self._text_class is AnimateDiffPipeline:
            arguments["num_frames"] = wanted.num_frames
        if wanted.image is None:
            kind = self._text_class
            arguments |= {"width": wanted.width_px, "height": wanted.height_px}
        else:
            kind = self._image_class
            arguments |= {
                "image": Image.fromarray(wanted.image), "strength": wanted.strength,
            }  # fmt: skip
        if wanted.mask is not None:
            kind = self._mask_class
            size = {"width": wanted.width_px, "height": wanted.height_px}
            arguments |= {"mask_image": Image.fromarray(wanted.mask), **size}
        pipeline = self._of(kind, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        if kind is AnimateDiffPipeline:
            return _clip(pipeline, arguments)
        with torch.inference_mode():
            latents = pipeline(**arguments).images  # [1, C, h, w]
            decoded = pipeline.vae.decode(_unscaled(pipeline.vae.config, latents)).sample
            if pixart:
                decoded = pipeline.image_processor.resize_and_crop_tensor(
                    decoded, wanted.width_px, wanted.height_px
                )
            pixels = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return Result(latents[0].numpy(), np.asarray(pixels))

    def _blended(self, wanted: Recipe) -> torch.Tensor:
        """The prompt's embeddings ``[1, L, D]``, moved by diffusers' own slerp."""
        prompts = [wanted.prompt, *(blend.prompt for blend in wanted.blends)]
        with torch.inference_mode():
            found = [self._pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in prompts]
        embeds = found[0]
        for end, blend in zip(found[1:], wanted.blends, strict=True):
            embeds = AudioDiffusionPipeline.slerp(embeds, end, blend.share)
        return embeds


def _clip(pipeline: AnimateDiffPipeline, arguments: Mapping[str, Any]) -> Result:
    """Latents and frames as the pipeline itself decodes them."""
    with torch.inference_mode():
        latents = pipeline(**arguments).frames  # [1, C, F, h, w]
        decoded = pipeline.decode_latents(latents)
        frames = pipeline.video_processor.postprocess_video(decoded, output_type="pil")[0]
    return Result(latents[0].numpy(), np.stack([np.asarray(frame) for frame in frames]))


def _with_mask(wanted: Recipe) -> Recipe:
    """As the pipelines of UNets that take a mask want it, which draw from nothing else."""
    shape = (wanted.height_px, wanted.width_px)
    mask = np.ones(shape, bool) if wanted.mask is None else wanted.mask
    if wanted.image is not None:
        return dataclasses.replace(wanted, mask=mask)
    image = np.full((*shape, 3), 200, np.uint8)  # of which nothing is left
    return dataclasses.replace(wanted, mask=mask, image=image, strength=1.0)


def _unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """As the pipelines decode: by a mean and a standard deviation where the config has them."""
    if vae.get("latents_mean") is None:
        return latents / vae.scaling_factor
    mean, std = (
        torch.tensor(vae[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    return latents * std / vae.scaling_factor + mean


def open_runner(checkpoint: Path, backend: str, cache_dir: Path, **more: Any) -> Runner:
    """For batches of 8; ``more`` is of the order."""
    ordered = {"backend": backend, "cache_dir": cache_dir, "max_batch": 8, "num_threads": 1} | more
    return Runner.open(Order(str(checkpoint), **ordered))


def assert_alone(runner: Runner, peer: Peer, recipes: Sequence[Recipe]) -> None:
    """Each agrees, drawn by itself, and is of its own size."""
    for wanted in recipes:
        (ours,) = draw_together(runner, [wanted])
        assert ours.pixels.shape[-3:] == (wanted.height_px, wanted.width_px, 3)
        assert_agree(ours, peer.draw(wanted), wanted)


def draw_together(runner: Runner, recipes: Sequence[Recipe]) -> list[Result]:
    """Draw with all rows of one stage and group in one call; keep the final latents."""
    drawings = [runner.start(wanted) for wanted in recipes]
    latents: dict[int, np.ndarray] = {}
    calls = {
        Stage.ENCODE_TEXT: runner.encode_text,
        Stage.ENCODE_IMAGE: runner.encode_image,
        Stage.DENOISE: runner.denoise,
        Stage.PREVIEW: runner.decode,
        Stage.DECODE: runner.decode,
    }
    while pending := [drawing for drawing in drawings if drawing.stage is not Stage.DONE]:
        stage = min(drawing.stage for drawing in pending)
        alike = next(drawing.alike for drawing in pending if drawing.stage is stage)
        rows = [d for d in pending if d.stage is stage and d.alike == alike]
        if stage is Stage.DECODE:
            for row in rows:
                assert row.latents is not None
                latents[id(row)] = row.latents.cpu().numpy().copy()
        calls[stage](rows)
    results = []
    for drawing in drawings:
        assert drawing.pixels is not None
        results.append(Result(latents[id(drawing)], drawing.pixels))
    return results


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def assert_agree(ours: Result, theirs: Result, what: object = "") -> None:
    """Latents within 1e-3 and images at 50 dB or more."""
    assert ours.latents.shape == theirs.latents.shape, what
    error = np.abs(ours.latents - theirs.latents).max()
    assert error <= MAX_LATENT_ERROR, (what, error)
    assert psnr_db(ours.pixels, theirs.pixels) >= MIN_PSNR_DB, what
