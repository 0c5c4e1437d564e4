"""Which backend is chosen, on machines that are not this one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from engines.backends.adapters import Adapters
from engines.backends.choice import Choice, Machine, choose_backend
from engines.build.bundle import Bundle
from engines.build.plan import PlanTarget
from engines.drawing.model import Model, check_lengths, check_plans
from engines.errors import BackendUnavailable, BundleError
from engines.facts import Facts, Window

EVERYTHING = frozenset({"onnxruntime", "openvino", "torch", "tensorrt", "tensorrt_rtx"})
WITHOUT_TENSORRT = frozenset({"onnxruntime", "torch"})
RTX_ALONE = WITHOUT_TENSORRT | {"tensorrt_rtx"}


@pytest.mark.parametrize(
    ("machine", "backend", "reason"),
    [
        (Machine(None, EVERYTHING), "onnxruntime", "no NVIDIA GPU here"),
        (Machine(90, EVERYTHING), "tensorrt", "an NVIDIA GPU and the package"),
        (Machine(89, RTX_ALONE), "tensorrt-rtx", "tensorrt needs a package; an NVIDIA GPU"),
        (
            Machine(90, RTX_ALONE),
            "torch",
            "tensorrt-rtx does not run on compute capability 90 (it does on 75, 80",
        ),
        (Machine(89, WITHOUT_TENSORRT), "torch", "tensorrt-rtx needs a package"),
    ],
)
def test_auto_takes_the_best_there_is(machine: Machine, backend: str, reason: str) -> None:
    choice = choose_backend("auto", machine)
    assert choice.backend == backend
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("backend", "machine", "message"),
    [
        ("tensorrt", Machine(89, RTX_ALONE), "pip install tensorrt"),
        ("tensorrt", Machine(None, EVERYTHING), "an NVIDIA GPU and its driver.*onnxruntime"),
        (
            "tensorrt-rtx",
            Machine(90, WITHOUT_TENSORRT),  # where installing the package would help nothing
            r"not run on compute capability 90 \(it does on 75,.*--engine torch, or tensorrt",
        ),
        ("onnxruntime", Machine(None, frozenset()), "pip install onnxruntime"),
        ("openvino", Machine(None, WITHOUT_TENSORRT), "pip install openvino, or choose among auto"),
        (
            "tensort",
            Machine(89, EVERYTHING),
            "unknown; known are auto, onnxruntime, openvino, tensorrt",
        ),
    ],
)
def test_what_cannot_run_says_why(backend: str, machine: Machine, message: str) -> None:
    with pytest.raises(BackendUnavailable, match=message):
        choose_backend(backend, machine)


def test_a_device_that_is_asked_for_is_the_one_that_draws() -> None:
    gpu, none = Machine(89, EVERYTHING), Machine(None, EVERYTHING)
    cpu = choose_backend("auto", gpu, device="cpu")
    assert cpu == Choice("onnxruntime", "device 'cpu' was asked for")
    assert choose_backend("torch", gpu, device="cpu").backend == "torch"
    assert choose_backend("auto", gpu, device="cuda").backend == "tensorrt"
    for backend, machine, device, message in (
        ("tensorrt", gpu, "cpu", "needs an NVIDIA GPU"),
        ("torch", none, "cuda", "device 'cuda' needs an NVIDIA GPU.*--device cpu"),
        ("onnxruntime", gpu, "cuda", "draws on the CPU: choose --engine torch"),
        ("openvino", gpu, "cuda", "draws on the CPU: choose --engine torch"),
        ("auto", gpu, "mps", "'mps' is unknown; known are auto, cpu, cuda"),
    ):
        with pytest.raises(BackendUnavailable, match=message):
            choose_backend(backend, machine, device=device)


def test_what_was_asked_for_is_kept() -> None:
    assert choose_backend("torch", Machine(None, EVERYTHING)) == Choice("torch", "asked for")
    assert choose_backend("tensorrt-rtx", Machine(89, EVERYTHING)).reason == "asked for"


def _bundle(target: PlanTarget | None, version: str) -> Bundle:
    plans = {"plans": {"target": json.loads(json.dumps(_values(target))), "version": version}}
    windows = (Window("input_ids", "tokenizer", 16, 0, 1),)
    facts = Facts("m", "stable_diffusion", 4, 8, 64, 8, 64, 128, windows, 0, "lcm", 4, 1.0, {})
    return Bundle(Path("bundle"), plans if target else {}, facts)


def _values(target: PlanTarget | None) -> dict[str, object] | None:
    return None if target is None else {k: getattr(target, k) for k in target.__slots__}


def test_plans_for_another_gpu_or_version_are_refused() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="wheels for Linux x86-64 only")
    target = PlanTarget("tensorrt-rtx", ((64, 64),), 4, (80, 89))
    here = Machine(89, EVERYTHING)
    check_plans(_bundle(target, trt.__version__), "tensorrt-rtx", here)
    for bundle, machine, message in (
        (_bundle(None, ""), here, "no TensorRT plans"),
        (_bundle(target, "1.2.0"), here, "plans of tensorrt-rtx 1.2.0, here is tensorrt-rtx"),
        (_bundle(target, trt.__version__), Machine(86, EVERYTHING), "80, 89, this GPU has 86"),
    ):
        with pytest.raises(BundleError, match=rf"{message}.*fourstep build"):
            check_plans(bundle, "tensorrt-rtx", machine)


def test_long_prompts_want_plans_that_take_them() -> None:
    plain = PlanTarget("tensorrt-rtx", ((64, 64),), 4, (89,))
    for target, graph, taken in ((plain, 3, 1), (plain, 3, 3), (plain, 1, 3)):
        bundle = _bundle(dataclasses.replace(target, max_chunks=taken), "")
        bundle = dataclasses.replace(
            bundle, facts=dataclasses.replace(bundle.facts, max_chunks=graph)
        )
        if min(graph, taken) == 3:
            check_lengths(bundle, Choice("tensorrt-rtx", "asked for"))
            continue
        way_out = "--engine tensorrt-rtx --long-prompts --out bundle builds it anew"
        with pytest.raises(BundleError, match=way_out):
            check_lengths(bundle, Choice("tensorrt-rtx", "asked for"))


def test_plans_that_one_gpu_runs_alone_are_refused_on_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.0"))
    small, large = Machine(90, EVERYTHING, "NVIDIA H100"), Machine(90, EVERYTHING, "NVIDIA H200")
    own = small.aim(PlanTarget("tensorrt", ((64, 64),), 4))
    check_plans(_bundle(own, "11.0"), "tensorrt", small)
    with pytest.raises(BundleError, match=r"built on NVIDIA H100, .*this GPU is NVIDIA H200"):
        check_plans(_bundle(own, "11.0"), "tensorrt", large)
    for portable in (
        PlanTarget("tensorrt-rtx", ((64, 64),), 4, (89,)),
        PlanTarget("tensorrt", ((64, 64),), 4, hardware_compatibility="ampere_plus"),
    ):
        assert small.aim(portable) == portable


def test_plans_are_aimed_by_compute_capability_or_by_the_name_of_the_gpu() -> None:
    plain = PlanTarget("tensorrt-rtx", ((64, 64),), 4)
    known = Machine(89, EVERYTHING, "NVIDIA L4").aim(plain)
    assert (known.compute_capabilities, known.gpu) == ((89,), "")
    own = Machine(89, EVERYTHING, "NVIDIA L4").aim(dataclasses.replace(plain, engine="tensorrt"))
    assert (own.compute_capabilities, own.gpu) == ((), "NVIDIA L4")


def test_plans_that_take_other_tiles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.0"))
    small = Machine(89, EVERYTHING, "NVIDIA L4")
    bundle = _bundle(small.aim(PlanTarget("tensorrt", ((64, 64),), 4, tile_px=512)), "11.0")
    for tile_px in (0, 512):  # 0: as they were built
        check_plans(bundle, "tensorrt", small, tile_px)
    with pytest.raises(BundleError, match=r"--vae-tiling-px is 256; .* decoders for 512 px"):
        check_plans(bundle, "tensorrt", small, 256)


def test_batches_are_no_larger_than_plans_take() -> None:
    def model(device: str, target: PlanTarget | None) -> Model:
        facts = _bundle(None, "").facts
        return Model(
            facts, Tokenizer(BPE()), {}, Adapters({}, {}), Choice("x", "y"), "fp16", device, target
        )

    small = PlanTarget("tensorrt", ((64, 64),), 4)
    assert model("cuda", small).batch_for(None) == model("cuda", small).batch_for(8) == 4
    assert model("cuda", small).batch_for(2) == 2
    assert model("cuda", None).batch_for(None) == 8
    assert model("cpu", None).batch_for(16) == 16


def test_a_target_survives_its_manifest() -> None:
    target = PlanTarget("tensorrt-rtx", ((64, 64), (96, 128)), 4, (80, 89), refit=True)
    assert PlanTarget.from_json(json.loads(json.dumps(_values(target)))) == target


def test_sizes_a_target_takes() -> None:
    wide = PlanTarget("tensorrt-rtx", ((512, 512), (768, 640)), 4)
    assert wide.takes(600, 520)
    assert not wide.takes(800, 512)
    exact = PlanTarget("tensorrt", ((512, 512), (768, 640)), 4)
    assert exact.takes(768, 640)
    assert not exact.takes(600, 520)
