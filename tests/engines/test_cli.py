"""The command's engine half as a user meets it: exit codes, one-line errors, real files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from engines.build.bundle import Blueprint, ensure_bundle, open_bundle
from engines.options import parse_loras, parse_timesteps

PROGRAM = "from engines.cli import app, run; run(app)"
# Runs a command and then says which heavy packages it has imported, on the last line of stdout.
SPYING = f"""
import json, sys
try:
    exec({PROGRAM!r})
finally:
    heavy = ["torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"]
    print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def _fourstep(
    *arguments: object, program: str = PROGRAM, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(checkpoints: Path, cache_dir: Path) -> Path:
    return ensure_bundle(
        Blueprint(checkpoints / "tiny-lcm"), cache_dir, lambda what, done, total: None
    ).folder


def test_a_device_that_is_not_here_is_one_line(bundle: Path, tmp_path: Path) -> None:
    arguments = ("generate", "x", "-o", tmp_path / "x.png", "--model", bundle)
    for device, message in (("cuda", "needs an NVIDIA GPU"), ("tpu", "known are auto, cpu, cuda")):
        done = _fourstep(*arguments, FOURSTEP_DEVICE=device)
        assert done.returncode == 1
        assert done.stderr.startswith("error: device")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_generate_from_a_bundle_needs_no_diffusers(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    arguments = ("generate", "a red cube", "-o", out, "--model", bundle, "--size", "96x64")
    done = _fourstep(*arguments, "--steps", 2, "--seed", 7, program=SPYING)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert image.size == (96, 64)
    assert json.loads(done.stdout.splitlines()[-1]) == ["torch", "onnx", "onnxruntime"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    again = tmp_path / "again.png"
    arguments = ("generate", "a red cube", "-o", again, "--model", bundle, "--size", "96x64")
    assert _fourstep(*arguments, "--steps", 2, "--seed", 7).returncode == 0
    with Image.open(out) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes()  # a seed is a picture


def test_a_hub_id_is_served_from_the_hub_cache(checkpoints: Path, tmp_path: Path) -> None:
    """The hub client itself finds the model, in a cache laid out as the hub's own, offline."""
    hub, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--someone--tiny-lcm"
    shutil.copytree(checkpoints / "tiny-lcm", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    offline = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    out, bundle = tmp_path / "out.png", tmp_path / "bundle"
    done = _fourstep("build", "someone/tiny-lcm", "--out", bundle, **offline)
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr, "libraries keep their wishes to themselves"
    assert open_bundle(bundle).facts.name == "someone/tiny-lcm"
    arguments = ("generate", "x", "-o", out, "--model", "someone/tiny-lcm", "--steps", 1)
    done = _fourstep(*arguments, "--engine", "torch", **offline)
    assert done.returncode == 0, done.stderr
    assert out.exists()
    done = _fourstep("build", "someone/absent", "--out", tmp_path / "absent", **offline)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]  # diffusers warns first that it is offline
    assert last.startswith("error: model 'someone/absent' cannot be fetched from the hub")


def test_help_is_light() -> None:
    done = _fourstep("--help", program=SPYING)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    for command in ("build", "inspect", "generate"):
        assert command in done.stdout


def test_inspect_shows_and_verifies(bundle: Path) -> None:
    done = _fourstep("inspect", bundle)
    assert done.returncode == 0, done.stderr
    for word in ("tiny-lcm", "stable_diffusion", "fp32", "denoiser.onnx", "lcm"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("inspect", "/nowhere"), "fourstep build"),
        (("build", "./nowhere", "--out", "/nowhere/out"), "./nowhere"),
        (("generate", "x", "-o", "x.png", "--model", "no-such"), "no-such"),
        (("generate", "x", "-o", "x.png", "--model", "./x", "--engine", "tensorrt"), "tensorrt"),
    ],
)
def test_errors_are_one_clear_line(arguments: tuple[str, ...], word: str) -> None:
    done = _fourstep(*arguments)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((b"\xff",), "prompt"), (("x", "--negative", b"\xe9"), "negative_prompt")],
)
def test_a_prompt_in_no_utf_8_is_one_clear_line(
    arguments: tuple[str | bytes, ...], field: str, bundle: Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, "generate", *arguments, "-o", "x.png"]
    done = subprocess.run([*command, "--model", str(bundle)], capture_output=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"error: {field} is '\\udc")
    assert line.endswith("which is no Unicode text; write it in UTF-8")


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a@b/it.safetensors", "a@b/it.safetensors", None),
        ("a@b/it.safetensors@0.8", "a@b/it.safetensors", 0.8),
        ("a@b/it.safetensors@-1e-1", "a@b/it.safetensors", -0.1),
        ("a@b/it@2", "a@b/it@2", None),  # there is such a file
        ("a@b/it@2@3", "a@b/it@2", 3.0),
        ("a@b/absent.safetensors", "a@b/absent.safetensors", None),
        ("absent.safetensors@2", "absent.safetensors", 2.0),
        ("owner/name@1", "owner/name", 1.0),
        ("owner/name/it.safetensors@0.5", "owner/name/it.safetensors", 0.5),
        ("a@b", "a@b", None),
    ],
)
def test_an_at_sign_in_a_path_is_no_weight(
    text: str, path: str, weight: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a@b").mkdir()
    for name in ("it.safetensors", "it@2"):
        (tmp_path / "a@b" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    weights = {} if weight is None else {"x": weight}
    assert parse_loras([f"x={text}"]) == ({"x": path}, weights)


@pytest.mark.parametrize("weight", ["", "strong", "nan", "inf"])
def test_a_weight_that_is_no_number(weight: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"weight '{weight}', which is no number"):
        parse_loras([f"x=it.safetensors@{weight}"])


def test_timesteps_have_commas_between_them() -> None:
    assert parse_timesteps("999,749, 499") == (999, 749, 499)
    assert parse_timesteps("") is None
    for wrong in ("999 749", "[999]", "999,", "9.5"):
        with pytest.raises(typer.BadParameter, match="write whole numbers, as 999,749,499,249"):
            parse_timesteps(wrong)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--size", "big", "512x512"), ("--steps", "0.5", "steps"), ("--size", "63x64", "multiple"),
        ("--timesteps", "499,999", "noisiest is first"),
    ],
)  # fmt: skip
def test_refuses_bad_values(option: str, value: str, word: str, bundle: Path) -> None:
    done = _fourstep("generate", "x", "-o", "x.png", "--model", bundle, option, value)
    assert done.returncode != 0
    assert word in done.stderr
    assert "Traceback" not in done.stderr
