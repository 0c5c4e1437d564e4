"""The stages in order, and the files each reads and writes in the work folder.

Each stage begins from what earlier ones left on disk, so that any can be run alone or again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from engines.distill import base, critic, lcm, lora, motion, text, tiny_decoder, tiny_vae, vae
from engines.distill.base import LatentData
from engines.distill.tokenizer import build_tokenizer
from engines.distill.training import Course, Place, TrainingError
from engines.distill.world import LOOKS


@dataclasses.dataclass(frozen=True)
class Stage:
    """``run(course, place)`` trains it and writes ``output``, relative to the work folder."""

    course: Course
    output: str
    run: Callable[[Course, Place], None]


def _need(place: Place, output: str) -> Path:
    folder = place.folder / output
    if not folder.exists():
        stage = next(name for name, stage in STAGES.items() if stage.output == output)
        raise TrainingError(
            f"--work {place.folder} has no {output} yet; run `fourstep distill {stage}` first"
        )
    return folder


def _load(kind: Any, place: Place, output: str) -> Any:
    model = kind.from_pretrained(_need(place, output), torch_dtype=torch.float32)
    return model.to(place.device).eval().requires_grad_(False)


def _write(model: Any, place: Place, output: str) -> None:
    """Save a whole folder or none."""
    folder = place.folder / output
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _vae(course: Course, place: Place) -> None:
    _write(vae.train_vae(course, place, build_tokenizer()), place, "vae")


def _text(course: Course, place: Place) -> None:
    _write(text.train_text_encoder(course, place, build_tokenizer()), place, "text")


STYLE_SHARE = 0.15  # of the plain pictures' number: a look takes fewer


def _data(place: Place, style: str = "plain") -> LatentData:
    if style != "plain":
        place = dataclasses.replace(place, data_share=STYLE_SHARE * place.data_share)
    return LatentData(_load(AutoencoderKL, place, "vae"), build_tokenizer(), place, style)


def _draft(course: Course, place: Place) -> None:
    encoder = _load(CLIPTextModel, place, "text")
    _write(base.train_draft(course, place, _data(place), encoder), place, "unet-draft")


def _base(course: Course, place: Place) -> None:
    encoder = _load(CLIPTextModel, place, "text")
    draft = _load(UNet2DConditionModel, place, "unet-draft")
    _write(base.train_base(course, place, _data(place), encoder, draft), place, "unet")


def _decoder(course: Course, place: Place) -> None:
    autoencoder = _load(AutoencoderKL, place, "vae")
    _write(vae.train_decoder(course, place, build_tokenizer(), autoencoder), place, "vae-sharp")


def _tiny_vae(course: Course, place: Place) -> None:
    sharp = _load(AutoencoderKL, place, "vae-sharp")
    _write(tiny_vae.train_tiny_vae(course, place, build_tokenizer(), sharp), place, "tiny-vae")


def _tiny_decoder(course: Course, place: Place) -> None:
    parts = {
        "encoder": _load(CLIPTextModel, place, "text"),
        "student": _load(UNet2DConditionModel, place, "unet-lcm"),
        "vae": _load(AutoencoderKL, place, "vae-sharp"),
        "tiny": _load(AutoencoderTiny, place, "tiny-vae"),
    }
    tiny = tiny_decoder.train_tiny_decoder(course, place, build_tokenizer(), **parts)
    _write(tiny, place, "tiny-vae-sharp")


def _student_parts(place: Place, style: str = "plain") -> dict[str, Any]:
    return {
        "data": _data(place, style),
        "encoder": _load(CLIPTextModel, place, "text"),
        "teacher": _load(UNet2DConditionModel, place, "unet"),
    }


def _lcm(course: Course, place: Place) -> None:
    parts = _student_parts(place)
    _write(lcm.train_lcm(course, place, tokenizer=build_tokenizer(), **parts), place, "unet-lcm")


def _lcm_lora(course: Course, place: Place) -> None:
    parts = _student_parts(place)
    student = lcm.train_lcm_lora(course, place, tokenizer=build_tokenizer(), **parts)
    lora.save_lora(student, place.folder / "lcm-lora")


def _style(style: str) -> Callable[[Course, Place], None]:
    def run(course: Course, place: Place) -> None:
        student = lora.train_style(style, course, place, **_student_parts(place, style))
        lora.save_lora(student, place.folder / f"{style}-lora")

    return run


def _critic(course: Course, place: Place) -> None:
    folder = place.folder / "critic"
    folder.mkdir(exist_ok=True)
    state = critic.train_critic(course, place).state_dict()
    halves = {name: tensor.half().cpu() for name, tensor in state.items()}
    save_file(halves, folder / "model.safetensors")


def _motion(course: Course, place: Place) -> None:
    data = motion.ClipData(_load(AutoencoderKL, place, "vae"), place)
    adapter = motion.train_motion(
        course, place, data, build_tokenizer(),
        _load(CLIPTextModel, place, "text"), _load(UNet2DConditionModel, place, "unet-lcm"),
    )  # fmt: skip
    _write(adapter, place, "motion-adapter")


STAGES: dict[str, Stage] = {
    "vae": Stage(vae.COURSE, "vae", _vae),
    "text": Stage(text.COURSE, "text", _text),
    "draft": Stage(base.DRAFT_COURSE, "unet-draft", _draft),
    "base": Stage(base.COURSE, "unet", _base),
    "lcm": Stage(lcm.COURSE, "unet-lcm", _lcm),
    "decoder": Stage(vae.DECODER_COURSE, "vae-sharp", _decoder),
    "tiny-vae": Stage(tiny_vae.COURSE, "tiny-vae", _tiny_vae),
    "tiny-decoder": Stage(tiny_decoder.COURSE, "tiny-vae-sharp", _tiny_decoder),
    "lcm-lora": Stage(lcm.LORA_COURSE, "lcm-lora", _lcm_lora),
    **{look: Stage(lora.STYLE_COURSE, f"{look}-lora", _style(look)) for look in LOOKS},
    "motion": Stage(motion.COURSE, "motion-adapter", _motion),
    "critic": Stage(critic.COURSE, "critic", _critic),
}


def run_stage(name: str, place: Place, changes: dict[str, Any]) -> bool:
    """Run one stage, its course changed by ``changes``; False if it was finished before.

    A finished stage says with which course and seed; asking for another is refused.
    """
    stage = STAGES[name]
    course = dataclasses.replace(stage.course, **changes)
    stamp = place.folder / f"{name}.json"
    asked = {"seed": place.seed, "data_share": place.data_share, **dataclasses.asdict(course)}
    if stamp.exists() and (place.folder / stage.output).exists():
        done = json.loads(stamp.read_text())
        if done == asked:
            return False
        differing = ", ".join(k for k in asked if asked[k] != done.get(k))
        raise TrainingError(
            f"{name} was finished in {place.folder} with other settings ({differing}); choose "
            f"another --work folder, or delete {stamp} to train it again"
        )
    stage.run(course, place)
    partial = stamp.with_suffix(".partial")
    partial.write_text(json.dumps(asked, indent=2))
    partial.replace(stamp)
    return True


def load_critic(folder: Path) -> critic.Critic:
    """The critic as saved beside the models."""
    model = critic.Critic()
    file = folder / "model.safetensors"
    if not file.exists():
        raise TrainingError(f"{file} is missing; run `fourstep distill critic` first")
    model.load_state_dict(load_file(file))
    return model.eval().requires_grad_(False)
