"""The checker reads painted truth back, through the autoencoder's blur too, and can say no."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from engines.distill.checker import NOTHING, read
from engines.distill.painter import paint
from engines.distill.world import ATTRIBUTES, STYLES, Scene, draw_scene, is_held_out

SCENE = Scene("heart", "purple", "large", "right", "top", "green", "night", "outlined")


@pytest.mark.parametrize("size_px", [(128, 128), (96, 96), (104, 184), (192, 128)])
@pytest.mark.parametrize("held_out", [False, True])
def test_reads_what_was_painted(size_px: tuple[int, int], held_out: bool) -> None:
    rng = np.random.default_rng(0)
    right = []
    for _ in range(60):
        scene = draw_scene(rng, held_out=held_out)
        assert is_held_out(scene) == held_out
        reading = read(paint(scene, *size_px))
        right.append([reading.agrees(scene, name) for name in (*ATTRIBUTES, "style")])
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize("style", STYLES)
def test_tells_the_looks_apart(style: str) -> None:
    rng = np.random.default_rng(1)
    scenes = [draw_scene(rng, style=style) for _ in range(40)]
    assert np.mean([read(paint(scene)).style == style for scene in scenes]) >= 0.95


def test_a_blurred_picture_is_still_read() -> None:
    picture = Image.fromarray(paint(SCENE)).filter(ImageFilter.GaussianBlur(1))
    reading = read(np.asarray(picture))
    assert all(reading.agrees(SCENE, name) for name in ATTRIBUTES)


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("shape", "star"),
        ("color", "teal"),
        ("size", "small"),
        ("column", "left"),
        ("background", "pink"),
        ("time", "day"),
        ("line", "flat"),
    ],
)
def test_one_wrong_attribute_is_noticed_alone(attribute: str, other: str) -> None:
    reading = read(paint(dataclasses.replace(SCENE, **{attribute: other})))
    wrong = [name for name in ATTRIBUTES if not reading.agrees(SCENE, name)]
    assert wrong == ["position" if attribute == "column" else attribute]


def test_noise_and_an_empty_picture_show_no_object() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert read(noise).shape == NOTHING
    assert read(np.full((128, 128, 3), 244, np.uint8)).shape == NOTHING
