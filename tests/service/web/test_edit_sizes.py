"""The size of an edit, what of its picture it is drawn from, and what the client is told of it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from service.access.quota import Tenant
from service.replica import Replica
from service.settings import load_settings
from service.web.admission import Admitted, admit
from service.web.app import build_app
from service.web.masks import Edited
from service.web.schema import EditRequest

EDITS = "/v1/images/edits"
STEP, MIN, MAX = 8, 32, 128  # of the tiny model
LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def replica(lcm_checkpoint: Path, cache_dir: Path) -> Replica:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    return Replica(load_settings(values))


@pytest.fixture(scope="module")
def http(replica: Replica) -> Iterator[TestClient]:
    with TestClient(build_app(replica)) as client:
        info = replica.runner.info
        assert (info.size_multiple, info.min_size_px, info.max_size_px) == (STEP, MIN, MAX)
        yield client


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def admitted(replica: Replica, image: Image.Image, size: str = "auto") -> Admitted:
    params = EditRequest(prompt="x", size=size)
    return admit(
        params, replica.runner, replica.settings, Tenant(), Edited(np.asarray(image), None)
    )


AUTO = [  # the upload's size → what is drawn
    ((64, 96), (64, 96), None),
    ((100, 70), (96, 72), "image is 100x70: all of it was scaled to 96x72, 6.7 % narrower than its "
     "shape"),
    ((400, 300), (128, 96), "image is 400x300: all of it was scaled to 128x96"),
    ((30, 20), (48, 32), "image is 30x20: all of it was scaled to 48x32"),
    ((384, 128), (128, 40), "image is 384x128: all of it was scaled to 128x40, 6.2 % lower than "
     "its shape"),
    ((100, 10), (128, 32), "image is 100x10: all of it was scaled to 128x32, 60.0 % narrower than "
     "its shape; crop it first to keep that"),
    ((20, 2000), (32, 128), "image is 20x2000: all of it was scaled to 32x128, 96.0 % lower than "
     "its shape; crop it first to keep that"),
]  # fmt: skip


@pytest.mark.parametrize(("uploaded", "drawn", "warning"), AUTO)
@pytest.mark.usefixtures("http")
def test_auto_draws_from_all_of_it(
    replica: Replica, uploaded: tuple[int, int], drawn: tuple[int, int], warning: str | None
) -> None:
    image = noise(*uploaded)
    found = admitted(replica, image)
    assert (found.width, found.height) == drawn
    assert found.warnings == ([] if warning is None else [warning])
    wanted = np.asarray(image.resize(drawn, LANCZOS))
    assert np.array_equal(found.drawings[0].recipe.image, wanted)


@given(width=st.integers(1, 600), height=st.integers(1, 600))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_auto_keeps_the_shape_wherever_sides_allow(
    replica: Replica, http: TestClient, width: int, height: int
) -> None:
    found = admitted(replica, Image.new("RGB", (width, height)))
    drawn = (found.width, found.height)
    for side in drawn:
        assert side % STEP == 0
        assert MIN <= side <= MAX
    if max(width, height) <= MAX / MIN * min(width, height):
        scale = max(drawn) / max(width, height)  # the longer side's, itself off by half a step
        slack = (STEP / 2) * (1 + min(width, height) / max(width, height))
        assert abs(min(drawn) - scale * min(width, height)) <= slack
    else:
        assert sorted(drawn) == [MIN, MAX]
    assert bool(found.warnings) == (drawn != (width, height))


NAMED = [
    ((64, 64), "64x64", None),
    ((64, 64), "128x128", "image is 64x64: all of it was scaled to 128x128"),
    ((1365, 1024), "128x96", "image is 1365x1024: all of it was scaled to 128x96"),
    ((100, 70), "64x64", "image is 100x70, not of the shape of 64x64: its centre, 70x70, was drawn "
     "from; with size 'auto' all of it is"),
    ((50, 120), "96x48", "image is 50x120, not of the shape of 96x48: its centre, 50x25, was drawn "
     "from; with size 'auto' all of it is"),
]  # fmt: skip


@pytest.mark.parametrize(("uploaded", "size", "warning"), NAMED)
@pytest.mark.usefixtures("http")
def test_a_named_size_draws_from_the_centre_and_says_so(
    replica: Replica, uploaded: tuple[int, int], size: str, warning: str | None
) -> None:
    image = noise(*uploaded)
    found = admitted(replica, image, size)
    width, height = map(int, size.split("x"))
    assert (found.width, found.height) == (width, height)
    assert found.warnings == ([] if warning is None else [warning])
    wanted = np.asarray(ImageOps.fit(image, (width, height), LANCZOS))
    assert np.array_equal(found.drawings[0].recipe.image, wanted)


def test_the_client_is_told(http: TestClient) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(70, 100).save(buffer, "PNG", exif=exif)  # upright it is 100x70

    def post(headers: dict[str, str] | None = None, **form: Any) -> httpx.Response:
        files = {"image": ("x.png", buffer.getvalue())}
        return http.post(EDITS, data={"prompt": "x"} | form, files=files, headers=headers)

    scaled = AUTO[1][2]
    answer = post().json()
    assert (answer["size"], answer["warnings"]) == ("96x72", [scaled])
    assert post({"accept": "image/png"}).headers["x-fourstep-warnings"] == scaled
    lines = post(stream="true").text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["warnings"] == [scaled]
    assert post(size="64x64").json()["warnings"] == [NAMED[3][2]]
