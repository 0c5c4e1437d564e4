"""Clients that people have, as they are: `openai` for Node, LiteLLM, Open WebUI, LibreChat."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.service.web.test_api import picture, png
from tests.service.web.test_studio import serving

OPENAI_NODE = "openai@7.57.0"
# The wheels that nothing else here brings; the rest of LiteLLM's needs are this project's too.
LITELLM = ("litellm==1.110.2", "fastuuid==0.14.0", "tiktoken==0.14.0", "h2", "hpack", "hyperframe")
INSTALL_S, RUN_S = 120, 120
SCRIPT = Path(__file__).with_name("client.mjs")


@pytest.fixture(scope="module")
def url(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[str]:
    with serving(model=str(lcm_checkpoint), cache_dir=cache_dir) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as client:
        yield client


def install(command: list[str], folder: Path) -> None:
    """Of a public registry, into a folder of this session; skips where there is none."""
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_S
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[0]} was not answered by its registry")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{command[0]} cannot install: {error.stderr.strip()[-200:]}")


# -- openai for Node ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which Node finds the `openai` package."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no node: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("node")
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
    install(["npm", "install", *options, OPENAI_NODE], folder)
    return folder


def test_the_openai_client_for_node(url: str, node_package: Path, client: openai.OpenAI) -> None:
    """It gets the images that the Python client gets."""
    script = shutil.copy(SCRIPT, node_package)
    upload = png()
    command = ["node", str(script), url, base64.b64encode(upload).decode()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert run.returncode == 0, run.stderr
    got: dict[str, Any] = json.loads(run.stdout)

    drawn = client.images.generate(prompt="a red star", n=2, extra_body={"seed": 7}).data or []
    expected = [item.b64_json for item in drawn]
    assert [item["b64_json"] for item in got["generated"]["data"]] == expected
    assert [item["seed"] for item in got["generated"]["data"]] == [7, 8]
    assert got["url"]["address"].startswith(f"{url}/v1/images/files/")
    assert (got["url"]["type"], got["url"]["data"]) == ("image/png", expected[0])

    edit = client.images.edit(
        image=("in.png", upload), prompt="a red star", extra_body={"seed": 3, "strength": 0.5}
    )
    edited = (edit.data or [])[0].b64_json
    assert got["edited"]["data"][0]["b64_json"] == edited
    assert got["edited_list"]["data"][0]["b64_json"] == edited
    types = ["image_generation.partial_image", "image_generation.completed"]
    assert [event["type"] for event in got["streamed"]] == types
    assert got["streamed"][-1]["b64_json"] == expected[0]
    assert [event["type"] for event in got["edit_streamed"]] == ["image_edit.completed"]
    assert got["edit_streamed"][0]["b64_json"] == edited
    assert got["models"] == ["tiny-lcm"]
    assert got["refused"] == {"name": "BadRequestError", "status": 400, "param": "size"}


# -- LiteLLM -----------------------------------------------------------------------------------

LITELLM_SCRIPT = """
import io, json, sys
import litellm

url, prompt = sys.argv[1], "a red star"
options = {"model": "openai/tiny-lcm", "api_base": f"{url}/v1", "api_key": "none"}
drawn = litellm.image_generation(prompt=prompt, n=2, size="64x64", **options)
named = litellm.image_generation(
    prompt=prompt, extra_body={"response_format": "url"}, **options  # it knows it of DALL-E alone
)
image = io.BytesIO(sys.stdin.buffer.read())
image.name = "in.png"
edited = litellm.image_edit(image=[image], prompt=prompt, **options)
try:
    litellm.image_generation(prompt=prompt, size="60x64", **options)
except litellm.BadRequestError as error:
    refused = str(error)
print(json.dumps({
    "drawn": [item.b64_json for item in drawn.data],
    "url": named.data[0].url,
    "edited": edited.data[0].b64_json,
    "refused": refused,
}))
"""


@pytest.mark.slow  # 200 MB of wheel, and half a minute
def test_litellm(url: str, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "."]
    install([*pip, *LITELLM], tmp_path)
    environment = dict(os.environ) | {
        "PYTHONPATH": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would ask GitHub for prices
    }
    command = [sys.executable, "-c", LITELLM_SCRIPT, url]
    run = subprocess.run(
        command, input=png(), capture_output=True, env=environment, timeout=RUN_S, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    got: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert [picture(data).size for data in (*got["drawn"], got["edited"])] == [(64, 64)] * 3
    assert httpx.get(got["url"]).headers["content-type"] == "image/png"
    assert "size is 60x64" in got["refused"]


# -- requests as chat front ends send them -----------------------------------------------------


def test_open_webui_generates(url: str) -> None:
    """`routers/images.py` of Open WebUI 0.6 to 0.10, engine `openai`; users are in headers."""
    headers = {"authorization": "Bearer none", "x-openwebui-user-name": "Alice"}
    body = {
        "model": "tiny-lcm",
        "prompt": "a red star",
        "n": 1,
        "size": "64x64",
        "response_format": "b64_json",
    }
    address = f"{url}/v1/images/generations?api-version=2025-04-01-preview"
    answer = httpx.post(address, json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert picture(answer.json()["data"][0]["b64_json"]).size == (64, 64)


@pytest.mark.parametrize("field", ["image", "image[]"])
def test_open_webui_edits(url: str, field: str) -> None:
    """One image goes as `image`, a list as `image[]`; every other field as text."""
    form = {"model": "tiny-lcm", "prompt": "a red star", "n": "1", "size": "64x64"}
    form["response_format"] = "b64_json"
    files = [(field, ("upload.png", png(), "image/png"))]
    headers = {"authorization": "Bearer none"}
    address = f"{url}/v1/images/edits"
    answer = httpx.post(address, data=form, files=files, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert picture(answer.json()["data"][0]["b64_json"]).size == (64, 64)


@pytest.mark.parametrize(
    "more",
    [
        {"output_format": "png"},
        {"output_format": "webp", "output_compression": 100},
        {"output_format": "jpeg", "output_compression": 80, "n": 2},
    ],
)
def test_librechat_generates(client: openai.OpenAI, more: dict[str, Any]) -> None:
    """`OpenAIImageTools.js`: every field it has, with its own defaults, but the model's name."""
    answer = client.images.generate(
        model="tiny-lcm",
        prompt="a red star",
        background="auto",
        **{"n": 1, "quality": "auto", "size": "auto"} | more,
    )
    assert picture((answer.data or [])[0].b64_json).format == more["output_format"].upper()


def test_librechat_edits(url: str) -> None:
    """Its edits are forms of `image[]`, without a format; it reads `b64_json`."""
    form = {"model": "tiny-lcm", "prompt": "a red star", "quality": "auto", "size": "auto"}
    files = [("image[]", ("photo.png", png(), "image/png"))]
    answer = httpx.post(f"{url}/v1/images/edits", data=form, files=files, timeout=60)
    assert answer.status_code == 200, answer.text
    assert picture(answer.json()["data"][0]["b64_json"]).size == (64, 64)


def test_librechats_dalle_tool_opens_the_url(client: openai.OpenAI) -> None:
    """`DALLE3.js` asks for a `url` with `style` and `quality`, and downloads it."""
    answer = client.images.generate(
        model="tiny-lcm", prompt="a red star", quality="standard", style="vivid", n=1,
        response_format="url",
    )  # fmt: skip
    fetched = httpx.get(str((answer.data or [])[0].url))
    assert picture(base64.b64encode(fetched.content).decode()).size == (64, 64)
