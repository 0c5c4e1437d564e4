"""``fourstep serve``: what is on the command line, in the environment, or nowhere."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from engines.cli import app
from service import cli
from service.ray_serve import serve
from service.ray_serve.serve_config import ServeConfig
from service.settings import Settings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that were to be served; nothing is."""
    found: list[Settings] = []

    def serve_here(what: ServeConfig, **_: Any) -> int:
        found.extend(application.settings for application in what.applications)
        return 0

    monkeypatch.setattr(serve, "serve_here", serve_here)
    return found


@pytest.mark.parametrize(
    "name", ["model", "engine", "precision", "device", "unet", "vae", "tiny_vae", "architecture"]
)
def test_a_flag_wins_over_the_environment_and_that_over_the_default(
    name: str, served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "model": ("demo-base", "demo-lcm"), "engine": ("torch", "onnxruntime"),
        "precision": ("bf16", "fp16"), "device": ("cpu", "cuda"),
        "unet": ("owner/unet", "unet.safetensors"), "vae": ("owner/vae", "vae.safetensors"),
        "tiny_vae": ("owner/taesd", "taesd.safetensors"),
        "architecture": ("folder", "stable-diffusion-2-1-base"),
    }  # fmt: skip
    in_environment, on_command_line = values[name]
    option = f"--{name.replace('_', '-')}"
    assert cli.app is app
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    monkeypatch.setenv(f"FOURSTEP_{name.upper()}", in_environment)
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    assert CliRunner().invoke(app, ["serve", option, on_command_line]).exit_code == 0
    default, from_environment, from_flag = (getattr(each, name) for each in served)
    assert default == Settings.model_fields[name].default
    assert from_environment == in_environment
    assert from_flag == on_command_line
    if hasattr(served[2].order, name):
        assert getattr(served[2].order, name) == on_command_line


def test_a_lora_is_a_file_or_on_the_hub(served: list[Settings]) -> None:
    given = {"lcm": "owner/lcm-lora", "ink": "owner/inks/ink.safetensors", "here": "a/ink"}
    texts = [f"lcm={given['lcm']}@0.5", f"ink={given['ink']}", f"here={given['here']}@1"]
    options = [word for text in texts for word in ("--lora", text)]
    assert CliRunner().invoke(app, ["serve", *options]).exit_code == 0
    assert served[0].order.loras == given
    assert served[0].default_loras == {"lcm": 0.5, "here": 1.0}
