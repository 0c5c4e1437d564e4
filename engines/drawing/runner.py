"""Drives rows over a model's engines: one method for each engine call there is.

`start` runs on any thread and calls no engine. The four calls advance their drawings in place; as
many run side by side, each of its own drawings, as ``info.max_calls`` says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engines.backends.adapters import AdapterSet
from engines.build.bundle import Progress
from engines.drawing import decoding, encoding, transfers
from engines.drawing.batching import rows_that_fit
from engines.drawing.decoding import Decoding
from engines.drawing.drawing import Drawing, Group, spread_previews
from engines.drawing.encoding import Encoding, pixels_to_encode
from engines.drawing.faults import engine_call
from engines.drawing.info import ModelInfo, check_recipe, describe
from engines.drawing.inpainting import begins_from_noise, marked
from engines.drawing.lanes import Lanes
from engines.drawing.model import Model, load_interim, load_model, must_be_built
from engines.drawing.noise import (
    Moments,
    begin_from_image,
    begin_from_text,
    begin_with_mask,
    draw_ahead,
)
from engines.drawing.prompts import Encoded, Prompts, key_of
from engines.drawing.stage import Stage
from engines.drawing.succession import Succession
from engines.drawing.texts import Texts
from engines.drawing.warming import draw_every_batch
from engines.errors import EngineError, InvalidInput
from engines.facts import Facts
from engines.families.family import Lanewise
from engines.families.recipe import Recipe
from engines.families.tiles import grid_of
from engines.order import Order
from engines.samplers import NoiseSchedule, Schedule, make_schedule

if TYPE_CHECKING:
    from engines.drawing.meanwhile import BackgroundBuild


class Runner:
    """A loaded model and the cache of its prompts' embeddings."""

    def __init__(self, model: Model, *, max_batch: int | None = None, model_id: str | None = None):
        self._succession = Succession(model, self._describe)
        noise = NoiseSchedule.from_config(model.facts.scheduler)
        self._prompts = Prompts()
        self._layouts: list[Lanes] = []  # of the last denoise calls, while their rows may go on
        self._schedule = functools.lru_cache(maxsize=1024)(functools.partial(make_schedule, noise))
        self._build: BackgroundBuild | None = None
        self.info: ModelInfo = describe(model, max_batch, model_id)

    @classmethod
    def open(
        cls,
        order: Order,
        *,
        model_id: str | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> Runner:
        """Load what is ordered; bundles are built on first use.

        With ``serve_meanwhile`` torch draws until that is done, see `succeed`.

        Raises:
            engines.errors.EngineError: it cannot be loaded here; the message says why.
        """
        if not (order.serve_meanwhile and must_be_built(order)):
            return cls(load_model(order, progress), max_batch=order.max_batch, model_id=model_id)
        from engines.drawing.meanwhile import BackgroundBuild

        runner = cls(load_interim(order), max_batch=order.max_batch, model_id=model_id)
        runner._build = BackgroundBuild(order, runner.succeed, runner._stay)
        runner._build.start()
        return runner

    def succeed(self, model: Model) -> None:
        """Go on with another build of the same model from the next engine call on, rows in flight
        included. It is tried first, on the calling thread: every batch size once.

        Raises:
            EngineError: it does not draw; nothing has changed.
        """
        Runner(model, max_batch=self.info.max_batch).warm_up()
        self._succession.follow(model)

    def _stay(self, reason: str) -> None:
        backend_reason = f"what was to follow failed: {reason}"
        self.info = dataclasses.replace(self.info, backend_reason=backend_reason)

    def _describe(self, model: Model) -> None:
        self._layouts = []
        self.info = describe(model, self.info.max_batch, self.info.model_id)

    @property
    def _model(self) -> Model:
        return self._succession.model

    # -- any thread --------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``, of the model that draws now."""
        return self._model.device

    def rows_that_fit(self, alike: Group | Encoding | Decoding) -> int:
        """The most rows of such latents that one call of the VAE may have."""
        fitting = self._pictures_that_fit(*alike.latents[-2:])
        if not isinstance(alike, Decoding) or alike.num_frames == 1:
            return fitting
        return max(1, min(fitting, self.info.max_decode_batch) // alike.num_frames)

    def _pictures_that_fit(self, rows: int, columns: int) -> int:
        return rows_that_fit(rows * columns * self._model.facts.vae_scale_factor**2)

    def start(self, recipe: Recipe) -> Drawing:
        """Validate a recipe and make its row. No engine call; about 0.1 ms.

        Raises:
            InvalidInput: a value the model or its samplers do not take.
        """
        model, facts = self._model, self._model.facts
        check_recipe(recipe, model)
        schedule = self._schedule(
            recipe.sampler,
            recipe.num_steps,
            strength=1.0 if recipe.image is None else recipe.strength,
            strength_drops_steps=recipe.mask is not None or facts.strength_drops_steps,
            eta=recipe.eta,
            timesteps=recipe.timesteps,
        )
        conditions = model.family.conditions(facts, recipe, schedule)
        *_, rows, columns = conditions.latents
        fitting = min(self.info.max_decode_batch, self._pictures_that_fit(rows, columns))
        loras = model.adapters.settle(recipe.loras)
        tokenize = functools.partial(model.tokenize, weighted=recipe.prompt_weighting)
        texts = Texts.of(
            tuple(None if text is None else tokenize(text) for text in conditions.texts),
            tuple((tokenize(blend.prompt), blend.share) for blend in recipe.blends),
            lambda: tokenize(""),
        )
        drawing = Drawing(
            recipe=recipe,
            schedule=schedule,
            group=Group(conditions.latents, loras, _shapes(conditions.tensors), texts.num_chunks),
            generator=torch.Generator().manual_seed(recipe.seed),
            texts=texts,
            tables={
                "coefficients": _coefficients(schedule, recipe, facts),
                "timestep": schedule.timesteps,
                **conditions.tables,
            },
            conditioning=dict(conditions.tensors),
            preview_steps=spread_previews(recipe.num_previews, schedule.num_steps),
            encoder=recipe.decoder if recipe.decoder in facts.encoders else "full",
            preview_decoder=facts.decoders[-1],
            grid=grid_of(
                rows,
                columns,
                model.tile_px,
                facts.vae_scale_factor,
                frames=recipe.num_frames if facts.draws_clips else 0,
                at_once=fitting,
            ),
        )
        keys = {key_of(tokens) for tokens in texts.tokens}
        known = self._known(loras, keys)
        if len(known) == len(keys):
            self._take_texts(drawing, known)
        if recipe.image is None and not facts.takes_mask:
            begin_from_text(drawing)
            draw_ahead(drawing)  # here, where no device waits for it
        return drawing

    # -- the engine threads ------------------------------------------------------------------

    @engine_call("text_encoder")
    def encode_text(self, drawings: Sequence[Drawing]) -> None:
        """Prompts (and negative prompts) of the rows to embeddings; each text is encoded once."""
        for loras in dict.fromkeys(drawing.group.loras for drawing in drawings):
            self._encode_alike(loras, [each for each in drawings if each.group.loras == loras])

    def _encode_alike(self, loras: AdapterSet, drawings: list[Drawing]) -> None:
        texts = {key_of(each): each for drawing in drawings for each in drawing.texts.tokens}
        known = self._known(loras, texts)
        unknown = [key for key in texts if key not in known]
        for start in range(0, len(unknown), self.info.max_batch):  # a row may have several texts
            keys = unknown[start : start + self.info.max_batch]
            inputs = {
                name: torch.from_numpy(np.stack([texts[key][name] for key in keys]))  # [B, L]
                for name in texts[keys[0]]
            }
            with self._succession.calling(loras):
                outputs = self._run("text_encoder", **inputs)
            for index, key in enumerate(keys):
                encoded = {name: values[index] for name, values in outputs.items()}
                self._prompts.add(loras, key, encoded)
                known[key] = encoded
        for drawing in drawings:
            self._take_texts(drawing, known)

    def _known(self, loras: AdapterSet, keys: Iterable[bytes]) -> dict[bytes, Encoded]:
        found = ((key, self._prompts.find(loras, key)) for key in keys)
        return {key: encoded for key, encoded in found if encoded is not None}

    def _take_texts(self, drawing: Drawing, known: Mapping[bytes, Encoded]) -> None:
        tokenwise = self._model.family.TOKENWISE
        drawing.conditioning |= drawing.texts.conditioning(known, tokenwise)
        drawing.text_encoded = True

    @engine_call("vae_encoder")
    def encode_image(self, drawings: Sequence[Drawing]) -> None:
        """Input images of rows of one `Encoding` to noised latents at each row's first timestep."""
        facts = self._model.facts
        scale = facts.vae_scale_factor
        if facts.takes_mask:
            self._encode_with_masks(drawings, scale)
            return
        with self._succession.calling():
            encoded = self._encode(drawings)
        for drawing, image in zip(drawings, encoded, strict=True):
            begin_from_image(drawing, image, scale)

    def _encode_with_masks(self, drawings: Sequence[Drawing], scale: int) -> None:
        kept = torch.from_numpy(np.stack([~marked(each.recipe) for each in drawings])).float()
        whole = [each for each in drawings if not begins_from_noise(each.recipe)]
        with self._succession.calling():
            masked = self._encode(drawings, kept=kept)
            ones = torch.ones_like(kept[: len(whole)])
            images = self._encode(whole, kept=ones) if whole else []
        encoded = dict(zip(map(id, whole), images, strict=True))
        for drawing, left in zip(drawings, masked, strict=True):
            begin_with_mask(drawing, encoded.get(id(drawing)), left, scale)

    def _encode(self, drawings: Sequence[Drawing], **more: Tensor) -> list[Moments]:
        part = encoding.PARTS[drawings[0].encoding.encoder]
        moments = self._run(part, pixels=pixels_to_encode(drawings), **more)  # [B, C, h, w]
        means = moments["mean"].unbind(0)
        stds = moments["std"].unbind(0) if "std" in moments else (None,) * len(means)
        return [Moments(mean, std) for mean, std in zip(means, stds, strict=True)]

    @engine_call("denoiser")
    def denoise(
        self, drawings: Sequence[Drawing], before_run: Callable[[], None] = lambda: None
    ) -> None:
        """One step of each row, rows of one group, any step, sampler and guidance, in one call.

        ``before_run`` is called when all is laid out and the engine is about to run: what it sets
        going in other threads then shares the processor with the engine, not with this one.
        """
        for drawing in drawings:
            draw_ahead(drawing)
        with self._succession.calling(drawings[0].group.loras):
            lanes = self._layout(drawings)
            inputs = lanes.inputs()
            before_run()
            lanes.advance(self._run("denoiser", **inputs))
            done = transfers.mark() if self._model.device == "cuda" else None
            for drawing in drawings:  # a GPU still works on this step
                draw_ahead(drawing)
            go_on = all(drawing.step_index < drawing.num_steps for drawing in drawings)
            if go_on:
                with contextlib.suppress(torch.OutOfMemoryError):  # the next call tries again
                    lanes.lay_out_noise()
            if done is not None:
                # Without this the host runs ahead, up to the next decode: rows that come would
                # stand behind steps that nobody has begun, and calls would seem to take no time.
                transfers.wait_for(done)
            others = [each for each in self._layouts if each is not lanes]
            self._layouts = [*others, *[lanes] * go_on][-self.info.max_calls :]

    def _layout(self, drawings: Sequence[Drawing]) -> Lanes:
        """The rows as their last step left them laid out, or laid out anew."""
        for lanes in self._layouts:
            if lanes.hold(drawings):
                return lanes
        return Lanes(drawings, self._model.device)

    @engine_call("vae_decoder")
    def decode(self, drawings: Sequence[Drawing]) -> None:
        """Rows of one `Decoding` to pixels: finished ones to their image, others to a preview. Of
        those that are decoded in tiles, one tile; of clips some frames.

        A row whose latents or pixels are no numbers any more gets a ``failure`` instead.
        """
        part = decoding.PARTS[drawings[0].decoding.decoder]
        latents = decoding.latents_of(drawings)
        with self._succession.calling():
            outputs = self._run(part, latents=latents)
            decoding.take_pixels(drawings, latents, outputs, self._model.precision)

    def _run(self, part: str, **inputs: Tensor) -> dict[str, Tensor]:
        return self._model.engines[part].run(inputs)

    # -- whole images ------------------------------------------------------------------------

    def draw(self, recipes: Sequence[Recipe]) -> list[Drawing]:
        """Draw images to the end in the model's own batches, without a service.

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
            alike = [d for d in open_ if (d.stage, d.alike) == (leader.stage, leader.alike)]
            pictures = itertools.accumulate(drawing.num_pictures for drawing in alike)
            num_rows = max(1, sum(count <= self.info.max_batch for count in pictures))
            if leader.stage is not Stage.DENOISE:
                fitting = self.rows_that_fit(leader.alike)
                num_rows = min(num_rows, self.info.max_decode_batch, fitting)
            calls[leader.stage](alike[:num_rows])
        for drawing in drawings:
            if drawing.failure is not None:
                raise EngineError(drawing.failure)
        return drawings

    def warm_up(self, loras: Mapping[str, float] = MappingProxyType({})) -> None:
        """Run every part once at every batch size, so that no request pays for a first time.

        Raises:
            EngineError: an engine fails, or draws what is no picture.
        """
        draw_every_batch(self, loras)
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
            timesteps=info.timesteps_for(info.default_sampler, num_steps),
            decoder=info.default_decoder,
            num_frames=info.default_num_frames,
        )

    def padded_rows(self) -> dict[str, int]:
        """By part, rows run so far to fill a batch up; an engine that takes any batch has none."""
        return {n: getattr(e, "num_padded_rows", 0) for n, e in self._model.engines.items()}

    def close(self) -> None:
        """Free the engines."""
        if self._build is not None:
            self._build.close()
        self._succession.close()


def _coefficients(schedule: Schedule, recipe: Recipe, facts: Facts) -> np.ndarray:
    """As many a step as the denoiser takes: float32 ``[num_steps, K]``."""
    known, unknown = np.split(schedule.coefficients, [facts.num_coefficients], axis=1)
    if unknown.any():
        raise InvalidInput(
            "sampler",
            recipe.sampler,
            f"sampler is {recipe.sampler!r}, which this model's bundle was built too early for; "
            "fourstep build MODEL --out DIR makes another",
        )
    return known


def _shapes(tensors: Mapping[str, Lanewise]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(values[0].shape)) for name, values in tensors.items())
