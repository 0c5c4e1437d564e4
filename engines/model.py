"""A model ready to run: its facts, its tokenizer and one engine for each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from engines.adapters import Adapters, read_lora
from engines.bundle import (
    TOKENIZER,
    Blueprint,
    Bundle,
    Progress,
    ensure_bundle,
    is_bundle,
    open_bundle,
)
from engines.checkpoint import download, load_facts, load_pipeline, pipeline_class, resolve
from engines.choice import Choice, Machine, choose_backend
from engines.engine import Engine
from engines.errors import BundleError
from engines.facts import Facts
from engines.order import Order
from engines.plan import MODULES, PlanTarget, import_tensorrt

# Rows of one denoise call. A CPU's cost grows with the rows, so small batches keep the latency low
# and lose nothing; a GPU is not full before eight.
DEFAULT_MAX_BATCH = {"cpu": 2, "cuda": 8}
PARTS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")


@dataclass(frozen=True, slots=True)
class Model:
    """What `Runner` drives."""

    facts: Facts
    tokenizer: Tokenizer
    engines: Mapping[str, Engine]
    adapters: Adapters
    choice: Choice
    precision: str
    device: str
    target: PlanTarget | None = None  # what its plans take, where it runs on plans


def prepare(order: Order, progress: Progress) -> Bundle:
    """The bundle of a folder, shipped name, hub id or bundle, built where it is not yet.

    With a TensorRT backend it holds plans for this machine's GPU.
    """
    choice = choose_backend(order.backend)
    folder = resolve(order.model) or download(order.model)
    if is_bundle(folder):
        bundle = open_bundle(folder)
        if order.precision not in ("auto", bundle.precision):
            raise BundleError(
                f"{folder} was built with {bundle.precision}, not {order.precision}; "
                f"fourstep build MODEL --precision {order.precision} makes another"
            )
        if choice.backend in MODULES:
            check_plans(bundle, choice.backend, Machine.here())
        return bundle
    plans = choice.backend in MODULES
    precision = ("fp16" if plans else "fp32") if order.precision == "auto" else order.precision
    target = _target(order, choice.backend) if plans else None
    return ensure_bundle(Blueprint(folder, precision, target), order.cache_dir, progress)


def _target(order: Order, backend: str) -> PlanTarget:
    capability = Machine.here().compute_capability
    return PlanTarget(
        engine=backend,
        sizes_px=(),  # the model's own
        max_batch=order.max_batch or DEFAULT_MAX_BATCH["cuda"],
        compute_capabilities=(capability,) if backend == "tensorrt-rtx" and capability else (),
        refit=bool(order.loras),
    )


def check_plans(bundle: Bundle, backend: str, machine: Machine) -> None:
    """Raise BundleError where the bundle's plans are absent or for another package or GPU."""
    plans = bundle.manifest.get("plans")
    way_out = f"fourstep build MODEL --engine {backend} --out {bundle.folder} builds them anew"
    if plans is None:
        raise BundleError(f"{bundle.folder} has no TensorRT plans; {way_out}")
    target, version = plans["target"], str(import_tensorrt(backend).__version__)
    if target["engine"] != backend or (plans["version"] != version):
        raise BundleError(
            f"{bundle.folder} has plans of {target['engine']} {plans['version']}, here is "
            f"{backend} {version}; {way_out}"
        )
    built_for = target["compute_capabilities"]
    if built_for and machine.compute_capability not in built_for:
        raise BundleError(
            f"{bundle.folder} has plans for compute capability {', '.join(map(str, built_for))}, "
            f"this GPU has {machine.compute_capability}; {way_out}"
        )


def load_model(order: Order, progress: Progress) -> Model:
    """Load every part of a model, and the LoRAs it may be asked for."""
    choice = choose_backend(order.backend)
    if choice.backend == "torch":
        return _load_torch(order, choice)
    bundle = prepare(order, progress)
    engines: dict[str, Engine] = {}
    target = None
    if choice.backend in MODULES:
        from engines.tensorrt_engine import TensorRtEngine

        target = PlanTarget.from_json(bundle.manifest["plans"]["target"])
        for name in PARTS:
            plan = bundle.part(name).with_suffix(".plan")
            engines[name] = TensorRtEngine(plan, choice.backend, target.batches)
    else:
        from engines.onnxruntime_engine import OnnxRuntimeEngine

        for name in PARTS:
            engines[name] = OnnxRuntimeEngine(bundle.part(name), order.num_threads)
    tokenizer = Tokenizer.from_file(str(bundle.folder / TOKENIZER))
    device = "cuda" if choice.backend in MODULES else "cpu"
    adapters = _load_adapters(order.loras, engines)
    facts = bundle.facts.with_defaults(order.defaults)
    return Model(facts, tokenizer, engines, adapters, choice, bundle.precision, device, target)


def _load_adapters(loras: Mapping[str, Path], engines: Mapping[str, Engine]) -> Adapters:
    return Adapters({name: read_lora(path) for name, path in loras.items()}, engines)


def _load_torch(order: Order, choice: Choice) -> Model:
    import torch

    from engines.families import family_of
    from engines.torch_engine import TorchEngine

    folder = resolve(order.model) or download(order.model)
    if is_bundle(folder):
        raise BundleError(f"{folder} is a bundle; --engine torch needs the checkpoint itself")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = order.precision
    if precision == "auto":
        precision = "fp16" if device == "cuda" else "fp32"
    pipeline = load_pipeline(folder, precision)
    facts = load_facts(folder, pipeline).with_defaults(order.defaults)
    parts = family_of(pipeline_class(folder)).parts(pipeline, facts)
    engines = {part.name: TorchEngine(part, device) for part in parts}
    tokenizer = Tokenizer.from_str(pipeline.tokenizer.backend_tokenizer.to_str())
    adapters = _load_adapters(order.loras, engines)
    return Model(facts, tokenizer, engines, adapters, choice, precision, device)
