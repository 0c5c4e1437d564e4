"""Drives rows over a model's engines: one method for each engine call there is.

`start` runs on any thread and calls no engine; the four calls run on one thread and advance their
drawings in place. Noise belongs to the row: its own CPU generator draws in diffusers' order
(encoder sample, first noise, then one draw a step), so a result depends on nobody else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from engines.adapters import AdapterSet
from engines.bundle import Progress
from engines.drawing import Drawing, Group, Recipe, spread_previews
from engines.errors import EngineError, InvalidInput, OutOfMemory
from engines.facts import Facts
from engines.model import DEFAULT_MAX_BATCH, Model, load_model
from engines.order import Order
from engines.plan import PlanTarget
from engines.samplers import SAMPLERS, NoiseSchedule, Schedule, make_schedule
from engines.stage import Stage

NUM_CACHED_PROMPTS = 1024


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What callers may ask of the model; sizes in pixels."""

    model_id: str
    family: str
    backend: str
    backend_reason: str
    precision: str
    default_width: int
    default_height: int
    size_multiple: int
    min_size_px: int
    max_size_px: int
    max_tokens: int
    guidance_embedding: bool
    default_sampler: str
    default_num_steps: int
    default_guidance_scale: float
    samplers: tuple[str, ...]
    loras: tuple[str, ...]
    max_batch: int


class Runner:
    """A loaded model and the cache of its prompts' embeddings."""

    def __init__(self, model: Model, *, max_batch: int | None = None, model_id: str | None = None):
        self._model = model
        self._noise = NoiseSchedule.from_config(
            model.facts.scheduler, strength_drops_steps=not model.facts.time_cond_dim
        )
        self._prompts: OrderedDict[tuple[AdapterSet, bytes], Tensor] = OrderedDict()
        self._prompts_lock = threading.Lock()  # start() reads on other threads
        self._schedule = functools.lru_cache(maxsize=1024)(self._make_schedule)
        facts = model.facts
        self.info = ModelInfo(
            model_id=model_id or facts.name,
            family=facts.family,
            backend=model.choice.backend,
            backend_reason=model.choice.reason,
            precision=model.precision,
            default_width=facts.default_size_px,
            default_height=facts.default_size_px,
            size_multiple=facts.size_multiple_px,
            min_size_px=facts.min_size_px,
            max_size_px=facts.max_size_px,
            max_tokens=facts.max_tokens,
            guidance_embedding=facts.time_cond_dim > 0,
            default_sampler=facts.default_sampler,
            default_num_steps=facts.default_num_steps,
            default_guidance_scale=facts.default_guidance_scale,
            samplers=SAMPLERS,
            loras=model.adapters.names,
            max_batch=max_batch or DEFAULT_MAX_BATCH[model.device],
        )

    @classmethod
    def open(
        cls,
        order: Order,
        *,
        model_id: str | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> Runner:
        """Load what is ordered; bundles are built on first use.

        Raises:
            engines.errors.EngineError: it cannot be loaded here; the message says why.
        """
        return cls(load_model(order, progress), max_batch=order.max_batch, model_id=model_id)

    # -- any thread --------------------------------------------------------------------------

    def start(self, recipe: Recipe) -> Drawing:
        """Validate a recipe and make its row. No engine call; about 0.1 ms.

        Raises:
            InvalidInput: a value the model or its samplers do not take.
        """
        facts = self._model.facts
        _check(recipe, facts, self._model.target)
        image = recipe.image is not None
        schedule = self._schedule(
            recipe.sampler, recipe.num_steps, recipe.strength if image else 1.0, image, recipe.eta
        )
        guided = not facts.time_cond_dim and recipe.guidance_scale > 1
        texts = (recipe.prompt, recipe.negative_prompt) if guided else (recipe.prompt,)
        tokens = [self._tokenize(text) for text in texts]
        loras = self._model.adapters.settle(recipe.loras)
        ids = tuple(row for row, _ in tokens)
        scale = facts.vae_scale_factor
        drawing = Drawing(
            recipe=recipe,
            schedule=schedule,
            group=Group(recipe.height_px // scale, recipe.width_px // scale, loras),
            num_lanes=len(ids),
            generator=torch.Generator().manual_seed(recipe.seed),
            token_ids=ids,
            num_truncated_tokens=tokens[0][1],
            preview_steps=spread_previews(recipe.num_previews, schedule.num_steps),
        )
        if facts.time_cond_dim:
            drawing.timestep_cond = guidance_embedding(
                recipe.guidance_scale - 1.0, facts.time_cond_dim
            )
        drawing.prompt_embeds = self._cached(loras, ids)
        return drawing

    def _make_schedule(
        self, sampler: str, num_steps: int, strength: float, image: bool, eta: float | None
    ) -> Schedule:
        return make_schedule(
            self._noise, sampler, num_steps, strength=strength, image_to_image=image, eta=eta
        )

    def _tokenize(self, text: str) -> tuple[np.ndarray, int]:
        """Token ids int64 ``[L]``, padded, and how many did not fit."""
        facts = self._model.facts
        ids = self._model.tokenizer.encode(text).ids
        num_lost = max(0, len(ids) - facts.max_tokens)
        if num_lost:
            ids = [*ids[: facts.max_tokens - 1], facts.eos_token_id]
        padding = [facts.pad_token_id] * (facts.max_tokens - len(ids))
        return np.asarray(ids + padding, np.int64), num_lost

    def _cached(self, loras: AdapterSet, ids: tuple[np.ndarray, ...]) -> tuple[Tensor, ...] | None:
        with self._prompts_lock:
            found = [self._prompts.get((loras, row.tobytes())) for row in ids]
            if any(embeds is None for embeds in found):
                return None
            for row in ids:
                self._prompts.move_to_end((loras, row.tobytes()))
        return tuple(embeds for embeds in found if embeds is not None)

    # -- the engine thread -------------------------------------------------------------------

    def encode_text(self, drawings: Sequence[Drawing]) -> None:
        """Prompts (and negative prompts) of the rows to embeddings; each text is encoded once."""
        for loras in dict.fromkeys(drawing.group.loras for drawing in drawings):
            alike = [drawing for drawing in drawings if drawing.group.loras == loras]
            self._encode_alike(loras, alike)
        with self._prompts_lock:
            while len(self._prompts) > NUM_CACHED_PROMPTS:
                self._prompts.popitem(last=False)

    def _encode_alike(self, loras: AdapterSet, drawings: list[Drawing]) -> None:
        unknown: dict[bytes, np.ndarray] = {}
        for drawing in drawings:
            for ids in drawing.token_ids:
                if (loras, ids.tobytes()) not in self._prompts:
                    unknown[ids.tobytes()] = ids
        if unknown:
            input_ids = torch.from_numpy(np.stack(list(unknown.values())))  # [B, L]
            self._model.adapters.switch(loras)
            embeds = self._run("text_encoder", input_ids=input_ids)["prompt_embeds"]  # [B, L, D]
            with self._prompts_lock:
                keys = [(loras, key) for key in unknown]
                self._prompts.update(zip(keys, embeds.unbind(0), strict=True))
        for drawing in drawings:
            drawing.prompt_embeds = tuple(
                self._prompts[loras, ids.tobytes()] for ids in drawing.token_ids
            )

    def encode_image(self, drawings: Sequence[Drawing]) -> None:
        """Input images of one size to noised latents at each row's first timestep."""
        images = [drawing.recipe.image for drawing in drawings]
        pixels = torch.from_numpy(np.stack([image for image in images if image is not None]))
        moments = self._run("vae_encoder", pixels=pixels)  # mean, std [B, C, h, w]
        for drawing, mean, std in zip(drawings, moments["mean"], moments["std"], strict=True):
            latents = mean + std * self._draw_noise(drawing).to(mean.device)
            schedule = drawing.schedule
            noise = self._draw_noise(drawing).to(mean.device)
            drawing.latents = schedule.sample_scale * latents + schedule.noise_scale * noise

    def denoise(self, drawings: Sequence[Drawing]) -> None:
        """One step of each row, rows of one group, any step, sampler and guidance, in one call."""
        lanes = [drawing for drawing in drawings for _ in range(drawing.num_lanes)]
        first = np.cumsum([0] + [drawing.num_lanes for drawing in drawings])[:-1]
        for drawing in drawings:
            if drawing.latents is None:
                noise = self._draw_noise(drawing).to(self._model.device)
                drawing.latents = drawing.schedule.noise_scale * noise
        steps = [drawing.step_index for drawing in lanes]
        table = [lane.schedule.coefficients[k] for lane, k in zip(lanes, steps, strict=True)]
        guidance = np.ones(len(lanes), np.float32)
        uncond = np.arange(len(lanes))
        embeds: list[Tensor] = []
        noise_of: list[Tensor] = []
        for drawing, lane in zip(drawings, first, strict=True):
            assert drawing.prompt_embeds is not None, "encode_text comes first"
            embeds += drawing.prompt_embeds
            noise_of += [self._step_noise(drawing)] * drawing.num_lanes
            if drawing.num_lanes == 2:  # its second lane holds the unconditional prediction
                guidance[lane] = drawing.recipe.guidance_scale
                uncond[lane] = lane + 1
        inputs = {
            "sample": torch.stack([lane.latents for lane in lanes if lane.latents is not None]),
            "timestep": torch.tensor(
                [float(lane.schedule.timesteps[k]) for lane, k in zip(lanes, steps, strict=True)]
            ),
            "prompt_embeds": torch.stack(embeds),
            "coefficients": torch.from_numpy(np.stack(table)),
            "noise": torch.stack(noise_of),
            "guidance": torch.from_numpy(guidance),
            "uncond_index": torch.from_numpy(uncond),
        }
        if self._model.facts.time_cond_dim:
            conds = [lane.timestep_cond for lane in lanes if lane.timestep_cond is not None]
            inputs["timestep_cond"] = torch.stack(conds)
        self._model.adapters.switch(drawings[0].group.loras)
        outputs = self._run("denoiser", **inputs)
        for drawing, lane in zip(drawings, first, strict=True):
            drawing.latents = outputs["next_sample"][lane]
            drawing.denoised = outputs["denoised"][lane]
            drawing.step_noise = None
            drawing.step_index += 1

    def decode(self, drawings: Sequence[Drawing]) -> None:
        """Rows of one size to pixels: finished ones to their image, others to a preview.

        A row whose latents are no numbers any more gets a ``failure`` instead.
        """
        final = [drawing.stage is Stage.DECODE for drawing in drawings]
        latents = [
            drawing.latents if done else drawing.denoised
            for drawing, done in zip(drawings, final, strict=True)
        ]
        batch = torch.stack([tensor for tensor in latents if tensor is not None])
        pixels = self._run("vae_decoder", latents=batch)["pixels"].cpu().numpy()  # [B, H, W, 3]
        finite = torch.isfinite(batch).flatten(1).all(dim=1).tolist()
        for drawing, done, image, sound in zip(drawings, final, pixels, finite, strict=True):
            if not sound:
                drawing.failure = (
                    f"after step {drawing.step_index} the latents are not all finite numbers; a "
                    f"checkpoint that overflows in {self._model.precision} needs bf16 or fp32"
                )
            elif done:
                drawing.pixels = image
                drawing.latents = drawing.denoised = None
            else:
                drawing.previews.append(image)

    def _run(self, part: str, **inputs: Tensor) -> dict[str, Tensor]:
        try:
            return self._model.engines[part].run(inputs)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if self._model.device == "cuda":
                torch.cuda.empty_cache()
            rows = len(next(iter(inputs.values())))
            raise OutOfMemory(f"no memory for {part} of {rows} rows: {error}") from error

    def _draw_noise(self, drawing: Drawing) -> Tensor:
        """Standard normal float32 ``[C, h, w]`` from the row's own generator, on the CPU."""
        group = drawing.group
        shape = (1, self._model.facts.latent_channels, group.rows, group.columns)
        return torch.randn(shape, generator=drawing.generator)[0]

    def _step_noise(self, drawing: Drawing) -> Tensor:
        if drawing.schedule.draws_noise[drawing.step_index]:
            if drawing.step_noise is None:
                drawing.step_noise = self._draw_noise(drawing).to(self._model.device)
            return drawing.step_noise
        assert drawing.latents is not None, "the first noise is drawn before a step's"
        return torch.zeros_like(drawing.latents)

    # -- whole images ------------------------------------------------------------------------

    def draw(self, recipes: Sequence[Recipe]) -> list[Drawing]:
        """Draw images to the end in batches of at most ``max_batch`` lanes, without a service.

        Raises:
            EngineError: an image could not be drawn; the message says why.
        """
        drawings = [self.start(recipe) for recipe in recipes]
        calls = {
            Stage.ENCODE_TEXT: self.encode_text,
            Stage.ENCODE_IMAGE: self.encode_image,
            Stage.DENOISE: self.denoise,
            Stage.PREVIEW: self.decode,
            Stage.DECODE: self.decode,
        }
        while open_ := [drawing for drawing in drawings if drawing.stage is not Stage.DONE]:
            leader = open_[0]
            alike = [d for d in open_ if d.stage is leader.stage and d.group == leader.group]
            num_rows = max(1, self.info.max_batch // leader.num_lanes)
            calls[leader.stage](alike[:num_rows])
        for drawing in drawings:
            if drawing.failure is not None:
                raise EngineError(drawing.failure)
        return drawings

    def warm_up(self, loras: Mapping[str, float] = MappingProxyType({})) -> None:
        """Run every part at every batch size once, so that no request pays for a first time."""
        for count in range(1, self.info.max_batch + 1):
            recipes = [self.default_recipe(seed) for seed in range(count)]
            self.draw([dataclasses.replace(recipe, loras=loras) for recipe in recipes])
        self._prompts.clear()

    def default_recipe(self, seed: int, prompt: str = "warm-up", num_steps: int = 1) -> Recipe:
        """A recipe with the model's own defaults."""
        info = self.info
        return Recipe(
            prompt=prompt,
            width_px=info.default_width,
            height_px=info.default_height,
            seed=seed,
            num_steps=num_steps,
            guidance_scale=info.default_guidance_scale,
            sampler=info.default_sampler,
        )

    def padded_rows(self) -> dict[str, int]:
        """By part, rows run so far to fill a batch up; an engine that takes any batch has none."""
        return {n: getattr(e, "num_padded_rows", 0) for n, e in self._model.engines.items()}

    def close(self) -> None:
        """Free the engines."""
        for engine in self._model.engines.values():
            engine.close()


def _check(recipe: Recipe, facts: Facts, target: PlanTarget | None) -> None:
    """Raise `InvalidInput` for what no sampler could make good."""
    for name, side in (("width_px", recipe.width_px), ("height_px", recipe.height_px)):
        step = facts.size_multiple_px
        if side % step or not facts.min_size_px <= side <= facts.max_size_px:
            raise InvalidInput(
                name,
                side,
                f"{name} is {side}; it must be a multiple of {step} from "
                f"{facts.min_size_px} to {facts.max_size_px}",
            )
    if target and not target.takes(recipe.width_px, recipe.height_px):
        size = f"{recipe.width_px}x{recipe.height_px}"
        built = ", ".join(f"{width}x{height}" for width, height in target.sizes_px)
        raise InvalidInput(
            "width_px", size, f"size is {size}; this model's plans were built for {built}"
        )
    if not 0 <= recipe.seed < 2**64:
        raise InvalidInput(
            "seed", recipe.seed, f"seed is {recipe.seed}; it must be from 0 to 2**64 - 1"
        )
    if not math.isfinite(recipe.guidance_scale):
        raise InvalidInput(
            "guidance_scale", recipe.guidance_scale, "guidance_scale must be a finite number"
        )
    shape = (recipe.height_px, recipe.width_px, 3)
    if recipe.image is not None and (recipe.image.shape != shape or recipe.image.dtype != np.uint8):
        found = f"{recipe.image.dtype} {recipe.image.shape}"
        raise InvalidInput("image", found, f"image is {found}; it must be uint8 {shape}")


@functools.lru_cache(maxsize=256)  # most requests leave w at the model's default
def guidance_embedding(w: float, dim: int) -> Tensor:
    """Sinusoidal embedding of the guidance weight w, float32 ``[dim]``; not to be changed in place.

    Agrees with ``LatentConsistencyModelPipeline.get_guidance_scale_embedding`` (w times 1000).
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor(w, dtype=torch.float32) * 1000.0 * freqs
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    return torch.nn.functional.pad(embedding, (0, dim % 2))
