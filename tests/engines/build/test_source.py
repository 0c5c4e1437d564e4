"""Where things are: the hub client itself, offline, on a cache laid out as the hub's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from engines.build.source import find, find_lora, find_model, find_overrides, name_of
from engines.drawing.model import load_model
from engines.errors import CheckpointError
from engines.order import Order
from tests.engines.checkpoints import make_lora

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Publish = Callable[[str, Path, str], Path]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Lays a file or folder into a repository, at a path in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(hub_id: str, what: Path, at: str = "") -> Path:
        repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        place = repository / "snapshots" / COMMIT / at
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if what.is_dir():
            shutil.copytree(what, place, dirs_exist_ok=True)
        else:
            shutil.copy(what, place)
        return place

    return put


def _no_progress(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    "text",
    [
        "owner/name/sub/it.safetensors",
        "https://huggingface.co/owner/name/blob/main/sub/it.safetensors",
        "https://huggingface.co/owner/name/resolve/main/sub/it.safetensors?download=true",
        f"https://hf.co/owner/name/blob/{COMMIT}/sub/it.safetensors",
    ],
)
def test_a_file_on_the_hub(text: str, publish: Publish, checkpoints: Path) -> None:
    unet = checkpoints / "tiny-sd" / "unet" / "diffusion_pytorch_model.safetensors"
    at = publish("owner/name", unet, "sub/it.safetensors")
    for found in (
        find_model(text),
        find_lora(text),
        find_overrides(text, None, None).components["unet"],
    ):
        assert found == at
        assert name_of(found) == "owner/name/sub/it"


@pytest.mark.parametrize("at", ["", "unet"])
def test_a_component_on_the_hub(at: str, publish: Publish, checkpoints: Path) -> None:
    """A repository of its own, or a pipeline's."""
    publish("someone/unet", checkpoints / "tiny-lcm" / "unet", at)
    order = Order(str(checkpoints / "tiny-sd"), "torch", unet="someone/unet")
    model = load_model(order, _no_progress)
    assert model.facts.components == {"unet": "someone/unet"}
    assert model.facts.time_cond_dim == 32
    expected = load_file(checkpoints / "tiny-lcm" / "unet" / "diffusion_pytorch_model.safetensors")
    module = model.engines["denoiser"]._module  # type: ignore[attr-defined]
    found = module.unet.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    model.close()


@pytest.mark.parametrize("address", ["", "https://huggingface.co/"])
def test_a_lora_on_the_hub(
    address: str, publish: Publish, checkpoints: Path, tmp_path: Path
) -> None:
    lora = make_lora(checkpoints / "tiny-sd", tmp_path / "lora", ["to_q"])
    publish("someone/lora", lora, "")
    loras = {"hub": f"{address}someone/lora", "here": lora}
    model = load_model(Order(str(checkpoints / "tiny-sd"), "torch", loras=loras), _no_progress)
    assert model.adapters.names == ("hub", "here")
    model.close()


def test_a_repository_without_what_is_looked_for(publish: Publish, checkpoints: Path) -> None:
    config = checkpoints / "tiny-sd" / "unet" / "config.json"
    publish("someone/other", config, "config.json")
    with pytest.raises(CheckpointError, match=r"name the file itself: someone/other/FILE\.safe"):
        find_lora("someone/other")
    with pytest.raises(CheckpointError, match=r"name the file itself: someone/other/FILE\.safe"):
        find_overrides("someone/other", None, None)


@pytest.mark.parametrize("text", ["someone/absent", "someone/absent/it.safetensors"])
@pytest.mark.usefixtures("publish")
def test_what_cannot_be_fetched_says_why(text: str, checkpoints: Path) -> None:
    base = str(checkpoints / "tiny-sd")
    orders = {
        "model": Order(text),
        "unet": Order(base, unet=text),
        "vae": Order(base, vae=text),
        "LoRA": Order(base, loras={"it": text}),
    }
    for what, order in orders.items():
        with pytest.raises(CheckpointError) as caught:
            find(order)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{what} {text!r} cannot be fetched from the hub: ")
        assert "HF_HUB_OFFLINE" in line
        assert line.endswith("or give a local path")


@pytest.mark.parametrize(
    "text",
    [
        "absent",
        "./absent",
        "a/b/c",
        "/a/b/it.safetensors",
        "./a/it.safetensors",
        "~/a/b.safetensors",
    ],
)
def test_what_is_neither_here_nor_a_hub_id(text: str, checkpoints: Path) -> None:
    with pytest.raises(CheckpointError, match=f"LoRA '{text}' is neither a file nor a folder"):
        find_lora(text)
    with pytest.raises(CheckpointError, match=f"vae '{text}' is neither a file nor a folder"):
        find_overrides(None, text, None)
    with pytest.raises(CheckpointError, match="one of stable-diffusion-2-1, "):
        find_overrides(None, None, text)


def test_shipped_names(checkpoints: Path) -> None:
    assert find_lora("demo-lcm-lora").name == "demo-lcm-lora"
    tiny = find_overrides(None, "demo-tiny-vae", None).components["vae"]
    assert (tiny / "config.json").is_file()
    found = find_overrides(None, None, "stable-diffusion-2-1-base").architecture
    assert found is not None
    assert (found / "unet" / "config.json").is_file()
