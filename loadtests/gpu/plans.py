"""Do TensorRT's two packages build and run on this card, and for which way of naming it?

`try_ways` exports the decoder of a small model on the spot and gives each way a process of its own,
which builds a plan, loads it, runs it and compares it with torch: a library may well abort. No way
goes through `engines.build.plan.compile_plan`, which refuses what it does not know; here that is
the question. Then the same decoder in 8 bits, by explicit Q and DQ.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from engines.build.checkpoint import load_facts, load_pipeline, pipeline_class
from engines.build.explicit import TYPES
from engines.build.export import export_onnx
from engines.build.plan import INSTALL, MODULES, import_tensorrt, make_logger, parse
from engines.build.quantising import WATCHED, quantise, ranges_of, watch
from engines.build.source import resolve
from engines.errors import EngineError
from engines.families import family_of
from loadtests.gpu.clocks import wall_ms
from loadtests.gpu.models import TINY, make_pipeline, parts_of
from loadtests.gpu.section import Section
from loadtests.report import ROOT

MASK_OFFSET = 32  # of the compute capabilities in a TensorRT-RTX plan's header
WAY_S = 40.0  # at most, of one way
EXPORT_S = 15.0
ROWS = (1, 2, 4)  # min, opt and max of the profile


def try_ways(section: Section) -> None:
    """A row for each package and way, or what is missing."""
    present = []
    for engine in MODULES:
        try:
            version = import_tensorrt(engine).__version__
        except EngineError:
            section.row("package", name=engine, version=f"absent: {INSTALL[engine]}")
        else:
            present.append(engine)
            section.row("package", name=engine, version=version)
    if not present or not section.has_time("exporting a decoder", EXPORT_S):
        return
    with tempfile.TemporaryDirectory() as folder, section.attempt("exporting a decoder"):
        onnx = _export(Path(folder), section.device)
        for engine in present:
            for way in ways(engine, section.device):
                if section.has_time(f"{engine}, {way}", 5):
                    section.row("way of naming the GPU", way=way, engine=engine,
                                **_try(engine, way, onnx, section))  # fmt: skip
        for kind in TYPES:
            with section.attempt(f"plans in {kind}"):
                small = _quantised(onnx, kind)
                for engine in present:
                    way = ways(engine, section.device)[-1]
                    if section.has_time(f"{engine}, {kind}", 5):
                        section.row("plan in 8 bits", precision=kind, engine=engine, way=way,
                                    **_try(engine, way, small, section))  # fmt: skip


def ways(engine: str, device: str) -> list[str]:
    """`none`: no capability is named; `CURRENT`; and the card's own, as `SM90`."""
    if engine == "tensorrt" or device != "cuda":
        return ["none"]
    return ["none", "CURRENT", "SM{}{}".format(*torch.cuda.get_device_capability())]


def _export(folder: Path, device: str) -> Path:
    """The decoder's graph, an input, and what torch makes of it in fp32."""
    if device == "cuda":
        checkpoint = resolve("demo-lcm")
        assert checkpoint is not None, "it is shipped"
        pipeline = load_pipeline(checkpoint, "fp32")
        parts = family_of(pipeline_class(checkpoint)).parts(
            pipeline, load_facts(checkpoint, pipeline)
        )
    else:
        parts = parts_of(make_pipeline(TINY, "cpu"), TINY)
    (decoder,) = (part for part in parts if part.name == "vae_decoder")
    export_onnx(decoder, folder / "decoder.onnx")
    latents = torch.randn(2, *decoder.example["latents"].shape[1:])
    with torch.inference_mode():
        outputs = dict(zip(decoder.outputs, decoder.module(latents), strict=True))
        np.savez(folder / "decoder.npz", latents=latents, **outputs)
    return folder / "decoder.onnx"


def _quantised(onnx: Path, kind: str) -> Path:
    """A copy of the decoder in 8 bits, of the ranges that the known latents show."""
    import onnxruntime  # here: the ways above do without

    folder = onnx.parent / kind
    folder.mkdir()
    for file in onnx.parent.glob(f"{onnx.stem}.*"):
        shutil.copyfile(file, folder / file.name)
    copy, watched = folder / onnx.name, folder / "watched.onnx"
    watch(copy, watched)
    session = onnxruntime.InferenceSession(watched, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    latents = {"latents": np.load(copy.with_suffix(".npz"))["latents"]}
    found = dict(zip(names, session.run(names, latents), strict=True))
    seen = {
        name: (float(value.min()), float(value.max()))
        for name, value in found.items() if name.startswith(WATCHED)
    }  # fmt: skip
    quantise(copy, ranges_of(seen), kind)
    return copy


def _try(engine: str, way: str, onnx: Path, section: Section) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtests.gpu.plans", engine, way, str(onnx)]
    limit = min(WAY_S, section.seconds_left)
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=limit, stdout=subprocess.PIPE, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return {"outcome": f"no end within {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if done.returncode:
        found["outcome"] = f"ended with exit code {done.returncode}"
    return found


def try_one(engine: str, way: str, onnx: Annotated[Path, typer.Argument()]) -> None:
    """One way, in this process: the last line of the output says as JSON how far it went."""
    found: dict[str, Any] = {}
    try:
        found["outcome"] = _go(engine, way, onnx, found)
    except EngineError as error:
        found["outcome"] = str(error)[:300]
    print(json.dumps(found), flush=True)


def _go(engine: str, way: str, onnx: Path, found: dict[str, Any]) -> str:
    trt = import_tensorrt(engine)
    log = make_logger(trt)
    builder = trt.Builder(log)
    if builder is None:
        return f"no builder: {log.last_error}"
    network = parse(trt, builder, log, onnx)
    config = builder.create_builder_config()
    if way != "none":
        known = trt.ComputeCapability.__members__
        if way not in known:
            return f"not known to the package, which knows {', '.join(known)}"
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(known[way], 0):
            return f"refused: {log.last_error}"
    known_input = np.load(onnx.with_suffix(".npz"))
    latents = torch.from_numpy(known_input["latents"])
    profile = builder.create_optimization_profile()
    profile.set_shape("latents", *((rows, *latents.shape[1:]) for rows in ROWS))
    config.add_optimization_profile(profile)
    begun = time.perf_counter()
    built = builder.build_serialized_network(network, config)
    if built is None:
        return f"not built: {log.last_error}"
    plan = bytes(built)
    found |= {"build_s": time.perf_counter() - begun, "bytes": len(plan)}
    if engine == "tensorrt-rtx":
        found["mask"] = hex(struct.unpack_from("<I", plan, MASK_OFFSET)[0])
    if not torch.cuda.is_available():
        return "built; no GPU to run it on"
    return _run(trt, log, plan, latents, known_input, found)


def _run(
    trt: Any, log: Any, plan: bytes, latents: torch.Tensor, truth: Any, found: dict[str, Any]
) -> str:
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return f"not loaded: {log.last_error}"
    context = engine.create_execution_context()
    if context is None:
        return f"no context: {log.last_error}"
    stream = torch.cuda.Stream()
    given = latents.cuda()
    context.set_optimization_profile_async(0, stream.cuda_stream)
    context.set_input_shape("latents", tuple(given.shape))
    outputs = {
        name: torch.zeros_like(torch.from_numpy(truth[name]), device="cuda")
        for name in ("pixels", "pixel_sums", "image")
    }
    for name, tensor in {"latents": given, **outputs}.items():
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()
    if not context.execute_async_v3(stream.cuda_stream):
        return f"did not run: {log.last_error}"
    torch.cuda.synchronize()
    difference = np.abs(outputs["pixels"].cpu().numpy().astype(int) - truth["pixels"].astype(int))
    found["largest_difference"] = int(difference.max())  # of 255, to torch in fp32
    found["run_ms"] = wall_ms(lambda: context.execute_async_v3(stream.cuda_stream), "cuda", 0.2)
    return "ran"


if __name__ == "__main__":
    typer.run(try_one)
