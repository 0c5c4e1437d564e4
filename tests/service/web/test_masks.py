"""Masks of edits: as the `openai` client sends them, diffusers draws them and users expect them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from diffusers.image_processor import VaeImageProcessor
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.web.masks import Box, Edited, Paste, region_of
from service.web.uploads import Picture
from tests.engines.peers import Peer, psnr_db, recipe

SIDE = 64
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
HOLE = np.hypot(ROWS - 30, COLUMNS - 36) < 17  # what is to change
ASKED = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url=f"{http.base_url}/v1", http_client=http)


def png(pixels: np.ndarray, alpha: np.ndarray | None = None) -> bytes:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def clear(hole: np.ndarray) -> np.ndarray:
    """An alpha channel with a hole."""
    return np.where(hole, 0, 255).astype(np.uint8)


MASK = png(np.zeros_like(PHOTO), clear(HOLE))


def edit(
    client: openai.OpenAI,
    image: bytes,
    mask: Any = openai.NOT_GIVEN,
    warnings: Sequence[str] = (),
    **asked: Any,
) -> Any:
    answer = client.images.edit(
        image=("in.png", image), mask=mask, prompt="a red cube", extra_body=ASKED | asked
    )
    assert answer.model_extra is not None
    assert answer.model_extra["warnings"] == list(warnings)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))


@pytest.fixture(scope="module")
def drawn(client: openai.OpenAI) -> np.ndarray:
    """What the model made of it, before anything is put back."""
    return edit(client, png(PHOTO), MASK, paste_back=False)  # type: ignore[no-any-return]


def test_as_diffusers_draws_it(drawn: np.ndarray, lcm_checkpoint: Path) -> None:
    wanted = recipe(
        num_steps=3, guidance_scale=3.0, seed=5, image=PHOTO, mask=HOLE, strength=1.0,
    )  # fmt: skip
    assert psnr_db(drawn, Peer(lcm_checkpoint).draw(wanted).pixels) >= 50


def test_what_is_not_to_change_is_equal_to_the_byte(
    client: openai.OpenAI, drawn: np.ndarray
) -> None:
    hard = edit(client, png(PHOTO), MASK, mask_feather=0)
    assert np.array_equal(hard, np.where(HOLE[..., None], drawn, PHOTO))
    soft = edit(client, png(PHOTO), MASK, mask_feather=8)
    assert np.array_equal(soft[~HOLE], PHOTO[~HOLE])
    deep = np.hypot(ROWS - 30, COLUMNS - 36) < 2
    assert np.array_equal(soft[deep], drawn[deep])
    rim = HOLE & (np.hypot(ROWS - 30, COLUMNS - 36) > 16)
    apart = [np.abs(each[rim].astype(int) - PHOTO[rim]).mean() for each in (soft, hard)]
    assert apart[0] < apart[1]
    assert not np.array_equal(drawn[~HOLE], PHOTO[~HOLE])  # the decoder's own


def test_an_image_with_alpha_masks_itself(client: openai.OpenAI) -> None:
    """Also an outpainting: a larger canvas with clear borders is nothing else."""
    expected = edit(client, png(PHOTO), MASK)
    assert np.array_equal(edit(client, png(PHOTO, clear(HOLE))), expected)
    faint = np.where(HOLE, 127, 128).astype(np.uint8)  # cut where diffusers' masks are
    assert np.array_equal(edit(client, png(PHOTO, faint)), expected)
    nearly = np.full_like(faint, 128)
    whole = edit(client, png(PHOTO, nearly), strength=0.5)  # over white, and drawn anew as a whole
    white = np.asarray(Image.alpha_composite(
        Image.new("RGBA", (SIDE, SIDE), "white"), Image.open(io.BytesIO(png(PHOTO, nearly)))
    ).convert("RGB"))  # fmt: skip
    assert psnr_db(whole, edit(client, png(white), strength=0.5)) >= 40


def test_the_mask_decides_where_both_have_alpha(client: openai.OpenAI) -> None:
    other = png(PHOTO, clear(ROWS < 8))
    assert np.array_equal(edit(client, other, MASK), edit(client, png(PHOTO), MASK))


def test_a_mask_without_alpha_is_white_where_it_is_to_change(client: openai.OpenAI) -> None:
    grey = png(np.where(HOLE, 255, 0).astype(np.uint8))
    assert np.array_equal(edit(client, png(PHOTO), grey), edit(client, png(PHOTO), MASK))


def test_masks_in_json(http: TestClient, client: openai.OpenAI) -> None:
    urls = [
        "data:image/png;base64," + base64.b64encode(each).decode() for each in (png(PHOTO), MASK)
    ]
    body = ASKED | {"prompt": "a red cube", "images": [{"image_url": urls[0]}]}
    answer = http.post("/v1/images/edits", json=body | {"mask": {"image_url": urls[1]}})
    assert answer.status_code == 200, answer.text
    found = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert np.array_equal(np.asarray(found), edit(client, png(PHOTO), MASK))


def test_without_strength_a_mask_draws_from_pure_noise(client: openai.OpenAI) -> None:
    asked = edit(client, png(PHOTO), MASK, strength=1.0)
    assert np.array_equal(edit(client, png(PHOTO), MASK), asked)
    assert not np.array_equal(edit(client, png(PHOTO), MASK, strength=0.5), asked)
    assert np.array_equal(edit(client, png(PHOTO), strength=0.8), edit(client, png(PHOTO)))


def test_another_size_scales_image_and_mask_alike() -> None:
    picture = Picture(PHOTO, clear(HOLE))
    fitted = Edited.of(picture).fit(96, 64, crop=True).mask
    assert fitted is not None
    cut = Image.fromarray(np.invert(clear(HOLE))).crop((0, 11, 64, 53))
    wanted = np.asarray(cut.resize((96, 64), Image.Resampling.LANCZOS)) >= 128
    assert np.mean((fitted >= 128) != wanted) < 0.01


@pytest.mark.parametrize("feather_px", [0, 1, 4, 256])
def test_pasting_never_touches_what_is_kept(feather_px: int) -> None:
    other = RNG.integers(0, 256, PHOTO.shape, np.uint8)
    edited = Edited(PHOTO, np.invert(clear(HOLE)))
    pasted = Paste.of(edited, feather_px=feather_px).over(other)
    assert np.array_equal(pasted[~HOLE], PHOTO[~HOLE])
    least, most = np.minimum(PHOTO, other), np.maximum(PHOTO, other)
    assert ((pasted >= least) & (pasted <= most)).all()


def test_what_a_mask_marks_at_full_size(client: openai.OpenAI, lcm_checkpoint: Path) -> None:
    """As diffusers' `padding_mask_crop`, which also puts it back, by a mask of 0 and 255."""
    large = np.asarray(Image.fromarray(PHOTO).resize((200, 150), Image.Resampling.BICUBIC))
    rows, columns = np.mgrid[:150, :200]
    hole = np.hypot(rows - 60, columns - 110) < 20
    asked = {"padding_mask_crop": 6, "size": "64x64", "mask_feather": 0}
    ours = edit(client, png(large, clear(hole)), **asked)
    assert np.array_equal(ours[~hole], large[~hole])
    peer = Peer(lcm_checkpoint)
    wanted = recipe(
        num_steps=3, guidance_scale=3.0, seed=5, image=large, mask=hole, strength=1.0,
    )  # fmt: skip
    assert psnr_db(ours, peer.inpaint_region(wanted, padding_px=6)) >= 40


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_regions_are_those_of_diffusers(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(8, 60)), data.draw(st.integers(8, 60))
    mask = np.zeros((rows, columns), np.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        mask[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))] = 255
    width, height = data.draw(st.sampled_from([(64, 64), (96, 64), (64, 128)]))
    padding = data.draw(st.integers(0, 20))
    peers = VaeImageProcessor.get_crop_region(Image.fromarray(mask), width, height, padding)
    assert region_of(mask, width, height, padding) == Box(*peers)
