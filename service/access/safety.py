"""The optional safety filter: what it is asked, how one is found, and what an answer says of it.

Off unless the setting `safety` names one. A filter runs in the image workers, never on the event
loop or the engine threads, and nothing that it fails on is delivered.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from service.errors import BadRequest, EngineFailure
from service.settings import Settings, SettingsError

logger = logging.getLogger("fourstep.safety")

SafetyStage = Literal["prompt", "preview", "image"]
SafetyOutcome = Literal["passed", "filtered", "error"]
Count = Callable[[SafetyStage, SafetyOutcome], None]

DIFFUSERS = "diffusers"
POLICY_CODE = "content_policy_violation"  # OpenAI's own, so that its users' handlers apply


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something may pass; ``reason`` is shown to the caller where it may not."""

    allowed: bool
    reason: str = ""


ALLOWED = Verdict(True)


@runtime_checkable
class SafetyFilter(Protocol):
    """What `module:attribute` must name, or make when called without arguments. Thread-safe."""

    def check_prompt(self, text: str) -> Verdict:
        """Judge a prompt before anything is queued."""

    def check_images(self, pixels: np.ndarray) -> list[Verdict]:
        """Judge uint8 ``[B, H, W, 3]``, previews and final images alike, one verdict each."""


class PolicyViolation(BadRequest):
    """The safety filter refuses the prompt, or every image that was drawn of it."""

    default_code = POLICY_CODE


class Safety:
    """A filter with its consequences: refusals, black pixels, counts, and no way around it."""

    def __init__(self, safety_filter: SafetyFilter, count: Count) -> None:
        self._filter = safety_filter
        self._count = count

    def check_prompt(self, text: str) -> None:
        """Raises PolicyViolation for a prompt that may not pass. Blocks: run it in a worker."""
        try:
            verdict = self._filter.check_prompt(text)
        except Exception as error:
            raise self._failed("prompt") from error
        self._count("prompt", "passed" if verdict.allowed else "filtered")
        if not verdict.allowed:
            raise PolicyViolation(
                "the safety filter refuses this prompt"
                + (f": {verdict.reason}" if verdict.reason else "; word it otherwise"),
                param="prompt",
            )

    def screen(self, pixels: np.ndarray, stage: SafetyStage) -> tuple[np.ndarray, bool]:
        """``pixels``, or black in their place and True. Blocks.

        An image's are uint8 ``[H, W, 3]``; a clip's, ``[F, H, W, 3]``, pass if every frame does.
        """
        try:
            frames = pixels.reshape(-1, *pixels.shape[-3:])
            verdicts = self._filter.check_images(frames)
            allowed = all(each.allowed for each, _ in zip(verdicts, frames, strict=True))
        except Exception as error:
            raise self._failed(stage) from error
        self._count(stage, "passed" if allowed else "filtered")
        return (pixels, False) if allowed else (np.zeros_like(pixels), True)

    def _failed(self, stage: SafetyStage) -> EngineFailure:
        logger.exception("the safety filter failed on a %s", stage)
        self._count(stage, "error")
        return EngineFailure(
            "the safety filter failed, and nothing is delivered unchecked; the log has the details",
            code="safety_filter_failure",
        )


def load_safety(settings: Settings, count: Count) -> Safety | None:
    """The filter that `safety` names, or None where it names none. Blocks while a model loads.

    Raises:
        SettingsError: it cannot be imported, is no filter, or its model is not there.
    """
    if settings.safety is None:
        return None
    if settings.safety == DIFFUSERS:
        assert settings.safety_model is not None, "Settings requires it"
        return Safety(DiffusersChecker(settings.safety_model), count)
    return Safety(_imported(settings.safety), count)


def _imported(name: str) -> SafetyFilter:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"setting 'safety' is {name!r}: {error}; it must be importable in the service's process"
        ) from error
    is_filter = isinstance(found, SafetyFilter) and not isinstance(found, type)
    made = found() if callable(found) and not is_filter else found
    if not isinstance(made, SafetyFilter):
        raise SettingsError(
            f"setting 'safety' is {name!r}, which has no check_prompt(text) and "
            "check_images(pixels); see service.access.safety.SafetyFilter"
        )
    return made


class DiffusersChecker:
    """Stable Diffusion's safety checker (CLIP against fixed concepts); it knows images alone.

    The folder is a checkpoint that has ``safety_checker`` and ``feature_extractor``, or holds both
    parts itself, in safetensors.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from diffusers.pipelines.stable_diffusion.safety_checker import (
            StableDiffusionSafetyChecker,
        )
        from transformers import CLIPImageProcessor

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._processor = CLIPImageProcessor.from_pretrained(
                _part(folder, "feature_extractor"), local_files_only=True
            )
            self._checker = StableDiffusionSafetyChecker.from_pretrained(
                _part(folder, "safety_checker"), use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"setting 'safety_model' is {str(folder)!r}, which has no safety checker in "
                f"safetensors with its image processor: {str(error).splitlines()[0][:300]}"
            ) from error
        self._checker.eval().to(self._device)

    def check_prompt(self, text: str) -> Verdict:
        return ALLOWED

    def check_images(self, pixels: np.ndarray) -> list[Verdict]:
        inputs = self._processor(list(pixels), return_tensors="pt").pixel_values
        _, found = self._checker(clip_input=inputs.to(self._device), images=list(pixels))
        return [Verdict(not each) for each in found]


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder
