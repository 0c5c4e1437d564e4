"""Bundles: whole or refused, whatever happens to their files or their builders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import engines.build.bundle as bundle_of_engines
from engines.build.bundle import (
    MANIFEST,
    Blueprint,
    Bundle,
    build_bundle,
    ensure_bundle,
    is_bundle,
    open_bundle,
)
from engines.drawing.runner import Runner
from engines.errors import BackendUnavailable, BundleError, CheckpointError
from engines.facts import Defaults
from engines.order import Order

PARTS = ["text_encoder", "vae_decoder", "vae_encoder", "denoiser"]  # in the order of building
WAY_OUT = "fourstep build"


def _no_progress(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def built(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the tiny LCM in every respect but its graphs, which are a word each."""
    cache = tmp_path_factory.mktemp("slow")
    output = subprocess.check_output(_builder(checkpoints / "tiny-lcm", cache, 0), text=True)
    return open_bundle(Path(output.splitlines()[-1]))


@pytest.fixture
def copy(built: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.folder, tmp_path / "bundle"))


def _builder(checkpoint: Path, cache: Path, delay_s: float) -> list[str]:
    program = [sys.executable, "-m", "tests.engines.build_slowly"]
    return [*program, str(checkpoint), str(cache), str(delay_s)]


def _edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_opens_what_it_built(copy: Path, built: Bundle) -> None:
    bundle = open_bundle(copy)
    assert bundle.manifest == built.manifest
    assert bundle.facts.time_cond_dim == 32
    assert {f"{name}.onnx" for name in PARTS} < set(bundle.manifest["files"])
    assert "tokenizer.json" in bundle.manifest["files"]


def test_refuses_a_changed_byte(copy: Path) -> None:
    path = copy / "denoiser.onnx"
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"denoiser\.onnx.*{WAY_OUT}"):
        open_bundle(copy)


def test_refuses_a_truncated_file(copy: Path) -> None:
    path = copy / "vae_decoder.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"vae_decoder\.onnx.*{WAY_OUT}"):
        open_bundle(copy)


def test_refuses_a_missing_file(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=rf"tokenizer\.json is missing.*{WAY_OUT}"):
        open_bundle(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_refuses_a_bad_manifest(text: str, copy: Path) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=WAY_OUT):
        open_bundle(copy)


def test_refuses_a_manifest_of_another_version(copy: Path) -> None:
    _edit(copy, lambda manifest: manifest.update(format=2))
    with pytest.raises(BundleError, match="format 2"):
        open_bundle(copy)


def test_refuses_facts_it_does_not_know(copy: Path) -> None:
    _edit(copy, lambda manifest: manifest.update(facts={"name": "x"}))
    with pytest.raises(BundleError, match=WAY_OUT):
        open_bundle(copy)


def test_refuses_a_folder_without_manifest(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    with pytest.raises(BundleError, match=WAY_OUT):
        open_bundle(tmp_path)


def test_refuses_another_precision_than_asked(copy: Path) -> None:
    with pytest.raises(BundleError, match="fp32, not fp16"):
        Runner.open(Order(str(copy), backend="onnxruntime", precision="fp16"))


def test_torch_needs_the_checkpoint(copy: Path) -> None:
    with pytest.raises(BundleError, match="checkpoint"):
        Runner.open(Order(str(copy), backend="torch"))


def test_the_key_covers_all_that_a_bundle_is_made_of(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, lora = checkpoints / "tiny-lcm", tmp_path / "lora.safetensors"
    lora.write_bytes(b"one")
    keys = [
        Blueprint(source).key,
        Blueprint(checkpoints / "tiny-sd").key,
        Blueprint(source, "fp16").key,
        Blueprint(source, loras=((lora, 1.0),)).key,
        Blueprint(source, loras=((lora, 0.5),)).key,
        Blueprint(source, defaults=Defaults(num_steps=2)).key,
        Blueprint(source, defaults=Defaults(timesteps=(999, 499))).key,
    ]
    lora.write_bytes(b"two")
    keys.append(Blueprint(source, loras=((lora, 1.0),)).key)
    (tmp_path / "adapter_config.json").write_text("{}")  # peft's alphas
    keys.append(Blueprint(source, loras=((lora, 1.0),)).key)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    keys.append(Blueprint(source).key)
    assert len(set(keys)) == len(keys)
    assert Blueprint(source).key == keys[-1]


def test_a_changed_checkpoint_is_another_bundle(checkpoints: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoints / "tiny-sd", tmp_path / "source"))
    first = subprocess.check_output(_builder(source, tmp_path, 0), text=True).split()
    again = subprocess.check_output(_builder(source, tmp_path, 0), text=True).split()
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"steps_offset": 1', '"steps_offset": 0'))
    changed = subprocess.check_output(_builder(source, tmp_path, 0), text=True).split()
    assert again == first[-1:]  # nothing built
    assert changed[:-1] == PARTS
    assert changed[-1] != first[-1]


def test_two_processes_build_once(checkpoints: Path, tmp_path: Path) -> None:
    command = _builder(checkpoints / "tiny-lcm", tmp_path, 0.3)
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=1200)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(map(len, outputs)) == [1, 1 + len(PARTS)]
    assert outputs[0][-1] == outputs[1][-1]
    _assert_only_whole_bundles(tmp_path)


def test_a_whole_bundle_is_opened_without_the_lock(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else pods that start together would hash gigabytes one after the other; each does it once."""
    blueprint = Blueprint(checkpoints / "tiny-lcm")
    subprocess.check_call(_builder(checkpoints / "tiny-lcm", tmp_path, 0))
    built = ensure_bundle(blueprint, tmp_path, _no_progress)
    monkeypatch.delattr("engines.build.bundle.FileLock")
    hashed: Counter[str] = Counter()

    def counting(path: Path) -> str:
        if path.is_relative_to(built.folder):
            hashed[path.name] += 1
        return hash_of(path)

    hash_of = bundle_of_engines._sha256
    monkeypatch.setattr(bundle_of_engines, "_sha256", counting)
    assert ensure_bundle(blueprint, tmp_path, _no_progress).folder == built.folder
    assert set(hashed.values()) == {1}


def test_a_killed_build_resumes(checkpoints: Path, tmp_path: Path) -> None:
    command = _builder(checkpoints / "tiny-lcm", tmp_path, 1.0)
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    with killed.stdout as stdout:
        names = [stdout.readline().strip() for _ in range(3)]
        killed.kill()
        killed.wait()
    assert names == PARTS[:3]
    assert not any(is_bundle(folder) for folder in (tmp_path / "bundles").iterdir())
    resumed = subprocess.check_output(_builder(checkpoints / "tiny-lcm", tmp_path, 0), text=True)
    assert resumed.split()[:-1] == PARTS[2:]  # the third was half written: made again
    assert (Path(resumed.split()[-1]) / "vae_encoder.onnx").read_text() == "vae_encoder"
    _assert_only_whole_bundles(tmp_path)


def _assert_only_whole_bundles(cache: Path) -> None:
    left = [path for path in (cache / "bundles").iterdir() if path.suffix != ".lock"]
    assert len(left) == 1
    open_bundle(left[0])
    assert not list(left[0].glob("*.done"))


def test_a_damaged_cache_entry_is_built_again(checkpoints: Path, tmp_path: Path) -> None:
    command = _builder(checkpoints / "tiny-lcm", tmp_path, 0)
    folder = Path(subprocess.check_output(command, text=True).split()[-1])
    (folder / "denoiser.onnx").write_text("?")
    assert subprocess.check_output(command, text=True).split() == [*PARTS, str(folder)]


def test_never_overwrites_what_is_not_a_bundle(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(BundleError, match="choose another --out"):
        build_bundle(Blueprint(checkpoints / "tiny-lcm"), tmp_path, _no_progress)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def _checkpoint(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "tiny-lcm", tmp_path / "model"))


def test_refuses_an_unsupported_pipeline(checkpoints: Path, tmp_path: Path) -> None:
    source = _checkpoint(checkpoints, tmp_path)
    index = source / "model_index.json"
    index.write_text(index.read_text().replace("LatentConsistencyModelPipeline", "FluxPipeline"))
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        ensure_bundle(Blueprint(source), tmp_path / "cache", _no_progress)
    assert not any(is_bundle(path) for path in (tmp_path / "cache" / "bundles").iterdir())


def test_refuses_an_unsupported_scheduler_option(checkpoints: Path, tmp_path: Path) -> None:
    source = _checkpoint(checkpoints, tmp_path)
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"flow_prediction"'))
    with pytest.raises(CheckpointError, match="prediction_type='flow_prediction'"):
        Runner.open(Order(str(source), backend="torch"))


def test_refuses_pickled_weights(checkpoints: Path, tmp_path: Path) -> None:
    source = _checkpoint(checkpoints, tmp_path)
    for path in source.rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="safetensors"):
        Runner.open(Order(str(source), backend="torch"))


@pytest.mark.parametrize("model", ["no-such-model", "./nowhere", "/nowhere/at/all"])
def test_names_what_is_not_there(model: str) -> None:
    with pytest.raises(CheckpointError, match=model):
        Runner.open(Order(model, backend="torch"))


def test_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        Runner.open(Order(str(tmp_path), backend="torch"))


@pytest.mark.parametrize("backend", ["tensorrt", "openvin"])
def test_says_which_backends_there_are(backend: str, copy: Path) -> None:
    with pytest.raises(BackendUnavailable, match="onnxruntime"):
        Runner.open(Order(str(copy), backend=backend))
