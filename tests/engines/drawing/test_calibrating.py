"""Convolutions in 8 bits: calibrated on what is drawn, near fp32, refused where they cannot be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import onnx
import pytest

from engines.build.bundle import MANIFEST
from engines.build.quantising import KEPT
from engines.drawing.calibrating import PARTS, quantise_parts
from engines.drawing.model import load_model, prepare
from engines.drawing.parity import MIN_IMAGE_PSNR_DB, compare, image_psnrs_db
from engines.drawing.runner import Runner
from engines.errors import BackendUnavailable, BundleError
from engines.order import Order
from tests.engines.checkpoints import make_lora

PROMPTS = ("a red cube", "two cats, at night")


@pytest.fixture(scope="module")
def order(checkpoints: Path, cache_dir: Path) -> Order:
    return Order(str(checkpoints / "tiny-lcm"), "onnxruntime", cache_dir=cache_dir, num_threads=1)


@pytest.fixture(scope="module")
def quantised(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in fp32 that others use too, its parts put into 8 bits as a build would do it."""
    bundle = prepare(order, lambda *_: None)
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    shutil.copytree(bundle.folder, folder)
    report = quantise_parts(folder, bundle.facts, lambda *_: None)
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {
        path.name: {
            "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }
        for path in folder.iterdir() if path.name != MANIFEST
    }  # fmt: skip
    manifest |= {"precision": "int8", "quantised": report, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_only_what_dampens_its_errors_is_in_8_bits(quantised: Path) -> None:
    report = json.loads((quantised / MANIFEST).read_text())["quantised"]
    assert set(report) == set(PARTS)
    for part, said in report.items():
        assert said["psnr_db"] >= MIN_IMAGE_PSNR_DB
        graph = onnx.load(quantised / f"{part}.onnx", load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        convs = [node for node in graph.node if node.op_type == "Conv"]
        in_float = [node.input[1] for node in convs if node.input[1] in weights]
        assert len(convs) - len(in_float) == said["num_convolutions"] > 5
        assert in_float
        assert all(KEPT.search(name) for name in in_float)


def test_images_are_near(order: Order, quantised: Path) -> None:
    exact = load_model(order, lambda *_: None)
    int8 = load_model(dataclasses.replace(order, model=str(quantised)), lambda *_: None)
    assert int8.precision == "int8"
    assert min(image_psnrs_db(exact, int8, PROMPTS)) >= MIN_IMAGE_PSNR_DB
    results = compare(exact, int8, PROMPTS)
    assert all(result.good for result in results)
    denoised = next(r for r in results if (r.part, r.output) == ("denoiser", "denoised"))
    assert denoised.relative_error > 1e-4, "or nothing was quantised"
    for model in (exact, int8):
        model.close()


def test_loras_are_fused_before(
    order: Order, quantised: Path, checkpoints: Path, tmp_path: Path
) -> None:
    lora = make_lora(checkpoints / "tiny-lcm", tmp_path / "lora", ["to_q"])
    wanted = dataclasses.replace(order, model=str(quantised), loras={"odd": str(lora)})
    with pytest.raises(BundleError, match="odd: LoRAs change weights, which are in 8 bits here"):
        Runner.open(wanted)


@pytest.mark.parametrize("backend", ["torch", "tensorrt-rtx"])
def test_other_backends_refuse_it(order: Order, backend: str) -> None:
    wanted = dataclasses.replace(order, backend=backend, precision="int8")
    with pytest.raises(BackendUnavailable, match="engine"):
        Runner.open(wanted)


def test_loading_alone_does_not_calibrate(order: Order, tmp_path: Path) -> None:
    wanted = dataclasses.replace(order, precision="int8", cache_dir=tmp_path)
    with pytest.raises(BundleError, match="fourstep build MODEL --precision int8"):
        Runner.open(wanted)
