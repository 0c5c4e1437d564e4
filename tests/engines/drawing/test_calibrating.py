"""8 bits: calibrated on what is drawn, near fp32, refused where they cannot be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest

from engines.backends import onnxruntime_engine
from engines.build.bundle import MANIFEST, Blueprint, build_bundle
from engines.build.plan import PlanTarget, compile_plan
from engines.build.quantising import KEPT, MIN_CHANNELS
from engines.drawing.calibrating import quantise_parts
from engines.drawing.model import load_model, prepare
from engines.drawing.parity import MIN_IMAGE_PSNR_DB, compare, image_psnrs_db
from engines.drawing.runner import Runner
from engines.errors import BackendUnavailable, BuildError, BundleError
from engines.order import Order
from tests.engines.checkpoints import make_lora, make_pixart_checkpoint

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
    assert list(report) == ["denoiser", "vae_decoder"]
    for part, said in report.items():
        assert said["psnr_db"] >= MIN_IMAGE_PSNR_DB
        graph = onnx.load(quantised / f"{part}.onnx", load_external_data=False).graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        convs = [node for node in graph.node if node.op_type == "Conv"]
        in_float = [node.input[1] for node in convs if node.input[1] in weights]
        assert len(convs) - len(in_float) == said["num_convolutions"] > 5
        assert in_float
        assert all(
            KEPT.search(name) or min(weights[name].dims[:2]) < MIN_CHANNELS for name in in_float
        )
        products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
        assert len(products) == said["num_linears"]
        assert all(KEPT.search(name) for name in _linears_left(graph))
    assert report["denoiser"]["num_linears"] > 5


def _linears_left(graph: onnx.GraphProto) -> list[str]:
    """The weights of linear layers that are products as before."""
    weights = {tensor.name for tensor in graph.initializer}
    turned = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    products = [node.input[1] for node in graph.node if node.op_type == "MatMul"]
    return [turned[name] for name in products if name in turned]


def test_a_tiny_decoder_is_in_8_bits_with_its_relus(order: Order) -> None:
    wanted = dataclasses.replace(order, tiny_vae="demo-tiny-vae", precision="int8")
    bundle = prepare(wanted, lambda *_: None, quantise_parts)
    found = bundle.manifest["quantised"]["tiny_vae_decoder"]
    assert found["psnr_db"] >= MIN_IMAGE_PSNR_DB
    graph = onnx.load(bundle.part("tiny_vae_decoder"), load_external_data=False).graph
    made_by = {output: node for node in graph.node for output in node.output}
    behind = [made_by[n.input[0]].op_type for n in graph.node if n.op_type == "QuantizeLinear"]
    assert behind.count("Relu") > behind.count("Conv") > 0
    assert len([n for n in graph.node if n.op_type == "Conv"]) > found["num_convolutions"] > 5


def test_a_transformer_is_in_8_bits_too(tmp_path: Path) -> None:
    checkpoint = make_pixart_checkpoint(tmp_path / "tiny-pixart")
    order = Order(str(checkpoint), "onnxruntime", cache_dir=tmp_path / "cache", num_threads=1)
    bundle = prepare(dataclasses.replace(order, precision="int8"), lambda *_: None, quantise_parts)
    found = bundle.manifest["quantised"]["denoiser"]
    assert found["num_linears"] > 15
    assert found["psnr_db"] >= MIN_IMAGE_PSNR_DB
    left = _linears_left(onnx.load(bundle.part("denoiser"), load_external_data=False).graph)
    for kept in ("caption_projection.linear_1", "attn2.to_k", "attn2.to_v", "transformer.proj_out"):
        assert any(kept in name for name in left), kept
    assert not any("attn1" in name for name in left)


@pytest.mark.parametrize("has_vnni", [True, False])
def test_images_are_near(
    order: Order, quantised: Path, has_vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "sums_8_bits", lambda: has_vnni)
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


def test_openvino_draws_with_the_same_bundle(order: Order, quantised: Path) -> None:
    exact = load_model(order, lambda *_: None)
    wanted = dataclasses.replace(order, model=str(quantised), backend="openvino")
    int8 = load_model(wanted, lambda *_: None)
    assert (int8.choice.backend, int8.precision) == ("openvino", "int8")
    assert min(image_psnrs_db(exact, int8, PROMPTS)) >= MIN_IMAGE_PSNR_DB
    results = compare(exact, int8, PROMPTS)
    assert all(result.good for result in results)
    errors = {(result.part, result.output): result.relative_error for result in results}
    assert errors["denoiser", "denoised"] > 1e-4, "or nothing was quantised"
    assert errors["text_encoder", "prompt_embeds"] < 1e-5, "what is not in 8 bits is in single"
    for model in (exact, int8):
        model.close()


def test_loras_are_fused_before(
    order: Order, quantised: Path, checkpoints: Path, tmp_path: Path
) -> None:
    lora = make_lora(checkpoints / "tiny-lcm", tmp_path / "lora", ["to_q"])
    wanted = dataclasses.replace(order, model=str(quantised), loras={"odd": str(lora)})
    with pytest.raises(BundleError, match="odd: LoRAs change weights, which are in 8 bits here"):
        Runner.open(wanted)


@pytest.mark.parametrize(
    ("backend", "precision"), [("torch", "int8"), ("onnxruntime", "fp8"), ("openvino", "fp8")]
)
def test_other_backends_refuse_it(order: Order, backend: str, precision: str) -> None:
    wanted = dataclasses.replace(order, backend=backend, precision=precision)
    with pytest.raises(BackendUnavailable, match=f"precision '{precision}' is for engine"):
        Runner.open(wanted)


def _assert_explicit(file: Path, kind: int, num_convolutions: int) -> None:
    """Q and DQ of one type before as many convolutions, symmetric; none behind them."""
    graph = onnx.load(file).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    types = {each.name: each.data_type for each in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    assert not any(node.op_type == "MatMulIntegerToFloat" for node in graph.node)
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantisers) == num_convolutions > 5
    for node in quantisers:
        assert types[node.input[2]] == kind
        assert not constants[node.input[2]].astype("float32").any()
        (wide,) = (each for each in graph.node if node.output[0] in each.input)
        (reader,) = (each for each in graph.node if wide.output[0] in each.input)
        assert (wide.op_type, reader.op_type) == ("DequantizeLinear", "Conv")
        assert reader.input[0] == wide.output[0]
    for conv in (node for node in graph.node if node.op_type == "Conv"):
        weight = made_by.get(conv.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            assert types[weight.input[0]] == kind
            assert len(constants[weight.input[1]]) == len(constants[weight.input[0]])
            assert made_by[conv.input[0]].op_type == "DequantizeLinear"


def test_plans_in_8_bits(order: Order, checkpoints: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Built and compiled without a GPU; ONNX Runtime draws by the graph that was compiled."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux x86-64 only")
    target = PlanTarget("tensorrt-rtx", ((64, 64),), 1, compute_capabilities=(89,))
    blueprint = Blueprint(checkpoints / "tiny-lcm", "int8", target)
    built = build_bundle(blueprint, tmp_path / "b", lambda *_: None, cache_dir, quantise_parts)
    assert list(built.manifest["quantised"]) == ["denoiser", "vae_decoder"]
    for part, found in built.manifest["quantised"].items():
        assert found["psnr_db"] >= MIN_IMAGE_PSNR_DB
        _assert_explicit(built.part(part), onnx.TensorProto.INT8, found["num_convolutions"])
        assert built.part(part).with_suffix(".plan").stat().st_size > 10_000
    exact = load_model(order, lambda *_: None)
    int8 = load_model(dataclasses.replace(order, model=str(built.folder)), lambda *_: None)
    assert min(image_psnrs_db(exact, int8, PROMPTS)) >= MIN_IMAGE_PSNR_DB
    for model in (exact, int8):
        model.close()


def test_a_plan_in_fp8(order: Order, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux x86-64 only")
    bundle = prepare(dataclasses.replace(order, tiny_vae="demo-tiny-vae"), lambda *_: None)
    folder = tmp_path / "b"
    shutil.copytree(bundle.folder, folder)
    report = quantise_parts(folder, bundle.facts, lambda *_: None, "fp8")
    assert list(report) == ["denoiser", "vae_decoder", "tiny_vae_decoder"]
    for part, found in report.items():
        assert found["psnr_db"] >= MIN_IMAGE_PSNR_DB
        _assert_explicit(
            folder / f"{part}.onnx", onnx.TensorProto.FLOAT8E4M3FN, found["num_convolutions"]
        )
    target = PlanTarget("tensorrt-rtx", ((64, 64),), 1, compute_capabilities=(89,))
    shape = (1, bundle.facts.latent_channels, 8, 8)
    plan = folder / "vae_decoder.plan"
    profiles = [{"latents": (shape, shape, shape)}]
    compile_plan(folder / "vae_decoder.onnx", plan, profiles, target)
    assert plan.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("precision", "changes", "message"),
    [
        ("fp8", {"compute_capabilities": (86, 89)}, "compute capability 86 has no fp8"),
        ("int8", {"refit": True}, "leaves no weights that --refit"),
    ],
)
def test_plans_that_cannot_be(
    checkpoints: Path, tmp_path: Path, precision: str, changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux x86-64 only")
    target = dataclasses.replace(PlanTarget("tensorrt-rtx", (), 1), **changes)
    blueprint = Blueprint(checkpoints / "tiny-lcm", precision, target)
    with pytest.raises(BuildError, match=message):
        build_bundle(blueprint, tmp_path / "b", lambda *_: None, None, quantise_parts)


def test_loading_alone_does_not_calibrate(order: Order, tmp_path: Path) -> None:
    wanted = dataclasses.replace(order, precision="int8", cache_dir=tmp_path)
    with pytest.raises(BundleError, match="fourstep build MODEL --precision int8"):
        Runner.open(wanted)
