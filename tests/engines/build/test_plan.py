"""Plans, compiled for real by TensorRT-RTX, which needs no GPU for that. None is run here."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from engines.backends.choice import Machine
from engines.build.bundle import Blueprint, Bundle, build_bundle, open_bundle
from engines.build.checkpoint import load_facts, load_pipeline
from engines.build.plan import (
    RTX_CAPABILITY_BITS,
    PlanTarget,
    RtxHeader,
    check_target,
    compile_plan,
    import_tensorrt,
    make_logger,
    parse,
)
from engines.build.profiles import profiles_of
from engines.drawing.runner import Runner
from engines.errors import BackendUnavailable, BuildError, BundleError, InvalidInput
from engines.facts import Facts
from engines.families import family_named
from engines.families.part import Part
from engines.order import Order

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux x86-64 only")

SIZES = ((128, 128), (96, 160))
TARGET = PlanTarget("tensorrt-rtx", SIZES, 4, compute_capabilities=(80, 89), max_chunks=3)
DEMO = Path("engines/demo/demo-lcm")
TYPES = {  # ONNX element types to TensorRT's
    onnx.TensorProto.FLOAT: trt.DataType.FLOAT,
    onnx.TensorProto.INT64: trt.DataType.INT64,
    onnx.TensorProto.UINT8: trt.DataType.UINT8,
}


def _no_progress(what: str, done: int, total: int) -> None:
    pass


def _read(folder: Path) -> tuple[dict[str, Part], Facts]:
    pipeline = load_pipeline(folder, "fp16")
    facts = load_facts(folder, pipeline)
    return {part.name: part for part in family_named(facts.family).parts(pipeline, facts)}, facts


@pytest.fixture(scope="module")
def demo() -> tuple[dict[str, Part], Facts]:
    return _read(DEMO)


@pytest.fixture
def parts(demo: tuple[dict[str, Part], Facts]) -> dict[str, Part]:
    return demo[0]


@pytest.fixture
def facts(demo: tuple[dict[str, Part], Facts]) -> Facts:
    return demo[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Bundle:
    """The shipped demo model in fp16, exported and compiled."""
    blueprint = Blueprint(DEMO, "fp16", TARGET)
    folder = tmp_path_factory.mktemp("plans") / "b"
    return build_bundle(blueprint, folder, _no_progress, cache_dir)


def _network(onnx_file: Path) -> tuple[Any, ...]:
    log = make_logger(trt)
    builder = trt.Builder(log)
    return builder, log, parse(trt, builder, log, onnx_file)  # all three must stay alive


PARTS = ("text_encoder", "vae_decoder", "vae_encoder", "denoiser")


@pytest.mark.parametrize("name", PARTS)
def test_a_plan_is_whole_and_for_the_gpus_asked(name: str, built: Bundle) -> None:
    plan = built.folder / f"{name}.plan"
    header = RtxHeader.read(plan)
    assert header.num_bytes == plan.stat().st_size == built.manifest["files"][plan.name]["bytes"]
    assert header.version == trt.__version__ == built.manifest["plans"]["version"]
    assert header.compute_capabilities == TARGET.compute_capabilities


@pytest.mark.parametrize("name", PARTS)
def test_the_network_is_the_graph(name: str, built: Bundle, parts: dict[str, Part]) -> None:
    _builder, _log, network = _network(built.part(name))
    graph = onnx.load(built.part(name), load_external_data=False).graph
    inputs = {(t := network.get_input(i)).name: t.dtype for i in range(network.num_inputs)}
    outputs = {(t := network.get_output(i)).name: t.dtype for i in range(network.num_outputs)}
    assert inputs == {v.name: TYPES[v.type.tensor_type.elem_type] for v in graph.input}
    assert outputs == {v.name: TYPES[v.type.tensor_type.elem_type] for v in graph.output}
    assert set(inputs) == set(parts[name].example)
    assert network.num_layers == built.manifest["plans"]["parts"][name]["num_layers"] > 0
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    assert kinds.count(trt.LayerType.CONVOLUTION) == convolutions


@pytest.mark.parametrize("name", PARTS)
def test_every_weight_can_be_refitted_by_its_own_name(
    name: str, built: Bundle, parts: dict[str, Part]
) -> None:
    _builder, _log, network = _network(built.part(name))
    graph = onnx.load(built.part(name), load_external_data=False).graph
    named = {name for name, _ in parts[name].module.named_parameters()}
    weights = {initializer.name for initializer in graph.initializer} & named
    assert all(network.mark_weights_refittable(name) for name in weights)
    assert not network.mark_weights_refittable("nobody.weight")
    if name == "denoiser":
        assert weights == named


def test_the_network_runs_in_half_precision(built: Bundle, parts: dict[str, Part]) -> None:
    _builder, _log, network = _network(built.part("denoiser"))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = {
        layer.get_output(0).dtype
        for layer in layers
        if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
        and layer.name.startswith("node_conv")
    }
    assert kinds == {trt.DataType.HALF}


def test_profiles(parts: dict[str, Part], facts: Facts) -> None:
    (wide,) = profiles_of(parts["vae_encoder"], TARGET, facts)
    assert wide == {"pixels": ((1, 128, 96, 3), (4, 128, 128, 3), (4, 160, 128, 3))}
    fixed = dataclasses.replace(TARGET, engine="tensorrt", max_batch=3, compute_capabilities=())
    assert fixed.batches == (1, 2, 3)
    shapes = [profile["latents"] for profile in profiles_of(parts["vae_decoder"], fixed, facts)]
    sizes = [(rows, columns) for rows, columns in ((16, 16), (20, 12)) for _ in range(3)]
    assert [low[2:] for low, _, _ in shapes] == sizes
    assert [low[0] for low, _, _ in shapes] == [1, 2, 3, 1, 2, 3]
    assert all(low == best == high for low, best, high in shapes)
    assert len(profiles_of(parts["text_encoder"], fixed, facts)) == 3  # sizes are nothing to it
    window = parts["text_encoder"].example["input_ids"].shape[1]
    for target, lengths in ((TARGET, [(1, 1, 3)]), (fixed, [(n, n, n) for n in (1, 2, 3)])):
        profiles = profiles_of(parts["denoiser"], target, facts)
        found = [tuple(shape[1] for shape in profile["prompt_embeds"]) for profile in profiles]
        expected = [tuple(n * window for n in each) for each in lengths]
        assert found == [each for each in expected for _ in range(len(profiles) // len(lengths))]
    plain = dataclasses.replace(fixed, max_chunks=1)
    assert len(profiles_of(parts["denoiser"], plain, facts)) == len(SIZES) * 3


def test_profiles_of_tiles(parts: dict[str, Part], facts: Facts) -> None:
    """Of 16 latents 8, 8 and 4 are left, of 20 also 2, of 12 6; encoders see whole pictures."""
    tiled = dataclasses.replace(TARGET, tile_px=64)
    (wide,) = profiles_of(parts["vae_decoder"], tiled, facts)
    assert wide == {"latents": ((1, 4, 1, 1), (4, 4, 8, 8), (4, 4, 8, 8))}
    for name in ("vae_encoder", "denoiser"):
        assert profiles_of(parts[name], tiled, facts) == profiles_of(parts[name], TARGET, facts)
    fixed = dataclasses.replace(tiled, engine="tensorrt", max_batch=1, compute_capabilities=())
    shapes = [
        profile["latents"][0][2:] for profile in profiles_of(parts["vae_decoder"], fixed, facts)
    ]
    assert set(shapes) == {(8, 8), (8, 4), (4, 8), (4, 4), (8, 6), (2, 8), (2, 6)}
    assert len(shapes) == 7


def test_clips(tiny_clips: Path, tmp_path: Path, cache_dir: Path) -> None:
    """One clip of any number of frames up to the motion modules' own, tuned for the default; more
    of as many as the batch has room for.
    """
    target = PlanTarget("tensorrt-rtx", ((64, 64), (64, 96)), 6, compute_capabilities=(89,))
    blueprint = Blueprint(tiny_clips, "fp16", target)
    bundle = build_bundle(blueprint, tmp_path / "clips", _no_progress, cache_dir)
    parts, facts = _read(tiny_clips)
    frames = facts.default_num_frames, facts.max_num_frames
    assert 1 < frames[0] <= frames[1]
    one, more = profiles_of(parts["denoiser"], target, facts)
    assert one["noise"] == ((1, 4, 1, 8, 8), (2, 4, frames[0], 8, 8), (2, 4, frames[1], 12, 8))
    assert more["noise"] == ((3, 4, 1, 8, 8), (6, 4, 2, 8, 8), (6, 4, 2, 12, 8))
    (pictures,) = profiles_of(parts["vae_decoder"], target, facts)
    assert pictures["latents"] == ((1, 4, 8, 8), (6, 4, 8, 8), (6, 4, 12, 8))
    for part in parts:
        assert RtxHeader.read(bundle.part(part).with_suffix(".plan")).compute_capabilities == (89,)
    fixed = dataclasses.replace(target, engine="tensorrt", compute_capabilities=())
    shapes = [profile["noise"] for profile in profiles_of(parts["denoiser"], fixed, facts)]
    of_batches = [[1, *frames], [1, *frames], [1, 2, 2], [1, 1, 1]]  # 1, 2, 3 to 4, 5 to 6
    assert [[shape[2] for shape in each] for each in shapes] == of_batches * 2
    assert all({shape[:2] + shape[3:] for shape in each} == {each[0][:2] + each[0][3:]}
               for each in shapes)  # fmt: skip


def test_manifest_says_the_same_twice(built: Bundle, cache_dir: Path, tmp_path: Path) -> None:
    blueprint = Blueprint(DEMO, "fp16", TARGET)
    again = build_bundle(blueprint, tmp_path / "again", _no_progress, cache_dir)
    assert _steady(again.manifest) == _steady(built.manifest)
    other = dataclasses.replace(TARGET, max_batch=2)
    assert again.manifest["key"] == Blueprint(DEMO, "fp16", TARGET).key
    assert again.manifest["key"] != Blueprint(DEMO, "fp16", other).key


def _steady(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what differs from build to build: costs, and TensorRT's own bytes."""
    plans = {
        name: {k: v for k, v in report.items() if k not in ("seconds", "peak_process_bytes")}
        for name, report in manifest["plans"]["parts"].items()
    }
    files = {k: v for k, v in manifest["files"].items() if not k.endswith(".plan")}
    return manifest | {"files": files, "plans": manifest["plans"] | {"parts": plans}}


def test_a_damaged_plan_is_refused(built: Bundle) -> None:
    plan = built.folder / "text_encoder.plan"
    whole = plan.read_bytes()
    try:
        plan.write_bytes(whole[:-1])
        with pytest.raises(BundleError, match=r"text_encoder\.plan.*fourstep build"):
            open_bundle(built.folder)
        plan.write_bytes(b"none" + whole[4:])
        with pytest.raises(BuildError, match="no TensorRT-RTX plan"):
            RtxHeader.read(plan)
    finally:
        plan.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_capabilities": (90,)}, r"capability 90 .*75, 80, 86, 89, 120, 121"),
        ({"compute_capabilities": (89, 12)}, "capability 12 "),
    ],
)
def test_a_gpu_it_cannot_compile_for(
    change: dict[str, Any], message: str, built: Bundle, tmp_path: Path
) -> None:
    target = dataclasses.replace(TARGET, **change)
    with pytest.raises(BuildError, match=message):
        compile_plan(built.part("text_encoder"), tmp_path / "x.plan", [], target)
    assert list(tmp_path.iterdir()) == []


def test_the_capabilities_known_are_those_of_the_package() -> None:
    """Without one more that a newer package runs on, and with none that it has dropped."""
    named = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert {f"SM{capability}" for capability in RTX_CAPABILITY_BITS} == named


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU it asks for")
@pytest.mark.parametrize("change", [{"refit": True}, {"compute_capabilities": ()}])
def test_what_needs_a_gpu_says_so(change: dict[str, Any], built: Bundle, tmp_path: Path) -> None:
    target = dataclasses.replace(TARGET, **change)
    profile = {"input_ids": ((1, 32), (4, 32), (4, 32))}
    with pytest.raises(BuildError, match="wants a GPU"):
        compile_plan(built.part("text_encoder"), tmp_path / "x.plan", [profile], target)
    assert list(tmp_path.iterdir()) == []


def test_auto_falls_back_where_plans_do_not_load(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for a GPU that is said to be here and is not."""
    machine = Machine(89, frozenset({"torch", "onnxruntime", "tensorrt_rtx"}), "NVIDIA L4")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: machine))
    with pytest.raises(BackendUnavailable, match=r"cannot load .*build the bundle again here"):
        Runner.open(Order(str(built.folder), backend="tensorrt-rtx"))
    runner = Runner.open(Order(str(built.folder), num_threads=1))
    assert runner.info.backend == "onnxruntime"  # a bundle has no checkpoint for torch
    assert runner.info.backend_reason.startswith("tensorrt-rtx failed: tensorrt_rtx")
    (drawing,) = runner.draw([runner.default_recipe(0)])
    assert drawing.pixels is not None
    runner.close()


def test_an_operator_it_does_not_take(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    value = [helper.make_tensor_value_info(n, kind, [2]) for n in ("x", "y")]
    node = helper.make_node("Unknown", ["x"], ["y"], domain="nobody")
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    file = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph), file)
    with pytest.raises(BuildError, match=r"odd\.onnx: .*Unknown.*--engine torch"):
        _network(file)


@pytest.mark.parametrize("size", [(130, 128), (128, 8), (4096, 128)])
def test_a_size_the_model_does_not_draw(size: tuple[int, int], built: Bundle) -> None:
    target = dataclasses.replace(TARGET, sizes_px=(size,))
    with pytest.raises(InvalidInput, match=f"{size[0]}x{size[1]}; demo-lcm draws .* 8 from"):
        check_target(target, built.facts)


def test_a_missing_package_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r"pip install tensorrt .*--engine torch"):
        import_tensorrt("tensorrt")
