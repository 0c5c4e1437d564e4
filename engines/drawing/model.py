"""A model ready to run: its facts, its tokenizers and one engine for each part."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engines.backends.adapters import Adapters
from engines.backends.choice import Choice, Machine, choose_backend
from engines.backends.engine import Engine
from engines.build.bundle import (
    Blueprint,
    Bundle,
    Progress,
    ensure_bundle,
    folder_of,
    is_bundle,
    open_bundle,
)
from engines.build.checkpoint import load_facts, load_pipeline, tokenizer_of, whole
from engines.build.plan import MODULES, PlanTarget, import_tensorrt
from engines.build.source import NO_OVERRIDES, Sources, find, find_loras, find_model
from engines.drawing.batching import FULL_BATCH, denoise_rows
from engines.drawing.prompts import Tokens
from engines.drawing.textual_inversion import expand
from engines.errors import BackendUnavailable, BuildError, BundleError
from engines.facts import Facts
from engines.families import family_named
from engines.families.family import Family
from engines.loras.file import read_lora
from engines.order import Order
from engines.samplers.defaults import with_defaults

logger = logging.getLogger("fourstep.model")
# A decode beside a denoise call: they run one after the other, but the GPU has always one to go on
# with while the host looks after the other.
GPU_CALLS = 2
PARTS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")


@dataclass(frozen=True, slots=True)
class Model:
    """What `Runner` drives."""

    facts: Facts
    tokenizers: Mapping[str, Tokenizer]  # by `Window.tokenizer`
    engines: Mapping[str, Engine]
    adapters: Adapters
    choice: Choice
    precision: str
    device: str
    target: PlanTarget | None = None  # what its plans take, where it runs on plans
    max_calls: int = 1  # engine calls that run side by side; on a GPU of different parts

    def batch_for(self, wanted: int | None) -> int:
        """Lanes of one denoise call: what is wanted or the default, and no more than plans take."""
        if self.target is None:
            return wanted or denoise_rows(self.device, self.facts.default_size_px)
        return min(wanted or self.target.max_batch, self.target.max_batch)

    @property
    def family(self) -> Family:
        return family_named(self.facts.family)

    def tokenize(self, text: str | None) -> tuple[Tokens | None, int]:
        """A text as the text encoder takes it, and how many tokens found no room there.

        None is no text at all: neither tokens nor any that are lost.
        """
        if text is None:
            return None, 0
        tokens, num_lost = {}, 0
        for window in self.facts.windows:
            tokenizer = self.tokenizers[window.tokenizer]
            ids = tokenizer.encode(expand(tokenizer, window.written(text))).ids
            if len(ids) > window.max_tokens:
                num_lost = max(num_lost, len(ids) - window.max_tokens)
                ids = [*ids[: window.max_tokens - 1], window.eos_token_id]
            padding = [window.pad_token_id] * (window.max_tokens - len(ids))
            tokens[window.input] = np.asarray(ids + padding, np.int64)
        return tokens, num_lost

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines.values():
            engine.close()


def prepare(order: Order, progress: Progress) -> Bundle:
    """The bundle of a folder, shipped name, hub id or bundle, built where it is not yet.

    With a TensorRT backend it holds plans for this machine's GPU.
    """
    choice, sources = choose_backend(order.backend, device=order.device), find(order)
    folder = sources.model
    if not is_bundle(folder):
        return ensure_bundle(_blueprint(order, choice, sources), order.cache_dir, progress)
    bundle = open_bundle(folder)
    if sources.overrides != NO_OVERRIDES:
        raise BundleError(
            f"{folder} is a bundle, whose parts are built in; give --unet, --vae, "
            "--scheduler and --architecture to fourstep build, or serve the checkpoint itself"
        )
    if order.precision not in ("auto", bundle.precision):
        raise BundleError(
            f"{folder} was built with {bundle.precision}, not {order.precision}; "
            f"fourstep build MODEL --precision {order.precision} makes another"
        )
    if choice.backend in MODULES:
        check_plans(bundle, choice.backend, Machine.here())
    return bundle


def must_be_built(order: Order) -> bool:
    """Whether `load_model` would have to make a bundle first."""
    choice, sources = choose_backend(order.backend, device=order.device), find(order)
    if choice.backend == "torch" or is_bundle(sources.model):
        return False
    return not is_bundle(folder_of(_blueprint(order, choice, sources), order.cache_dir))


def _blueprint(order: Order, choice: Choice, sources: Sources) -> Blueprint:
    plans = choice.backend in MODULES
    precision = ("fp16" if plans else "fp32") if order.precision == "auto" else order.precision
    target = _target(order, choice.backend) if plans else None
    return Blueprint(sources.model, precision, target, overrides=sources.overrides)


def _target(order: Order, backend: str) -> PlanTarget:
    target = PlanTarget(
        engine=backend,
        sizes_px=(),  # the model's own
        max_batch=order.max_batch or FULL_BATCH,
        refit=bool(order.loras),
    )
    return Machine.here().aim(target)


def check_plans(bundle: Bundle, backend: str, machine: Machine) -> None:
    """Raise BundleError where the bundle's plans are absent or for another package or GPU."""
    plans = bundle.manifest.get("plans")
    way_out = f"fourstep build MODEL --engine {backend} --out {bundle.folder} builds them anew"
    if plans is None:
        raise BundleError(f"{bundle.folder} has no TensorRT plans; {way_out}")
    target, version = PlanTarget.from_json(plans["target"]), import_tensorrt(backend).__version__
    if (target.engine, plans["version"]) != (backend, str(version)):
        raise BundleError(
            f"{bundle.folder} has plans of {target.engine} {plans['version']}, here is "
            f"{backend} {version}; {way_out}"
        )
    built_for = target.compute_capabilities
    if built_for and machine.compute_capability not in built_for:
        raise BundleError(
            f"{bundle.folder} has plans for compute capability {', '.join(map(str, built_for))}, "
            f"this GPU has {machine.compute_capability}; {way_out}"
        )
    if target.gpu not in ("", machine.gpu):
        raise BundleError(
            f"{bundle.folder} has plans built on {target.gpu}, which run there alone; this GPU is "
            f"{machine.gpu}; {way_out}"
        )


def load_model(order: Order, progress: Progress) -> Model:
    """Load every part of a model, and the LoRAs it may be asked for.

    Where ``auto`` chose plans and they cannot be built or loaded, torch draws, or ONNX Runtime
    where there is no checkpoint for torch.
    """
    choice = choose_backend(order.backend, device=order.device)
    if choice.backend == "torch":
        return _load_torch(order, choice)
    try:
        return load_built(order, choice, progress)
    except (BackendUnavailable, BuildError, BundleError) as error:
        if order.backend != "auto" or choice.backend not in MODULES:
            raise
        logger.warning("%s cannot draw %s: %s", choice.backend, order.model, error)
        reason = f"{choice.backend} failed: {error}"
    if is_bundle(find_model(order.model)):
        order = dataclasses.replace(order, backend="onnxruntime")
        return load_built(order, Choice("onnxruntime", reason), progress)
    return _load_torch(order, Choice("torch", reason))


def load_interim(order: Order) -> Model:
    """By torch what draws until the order's own bundle is built: same sizes, device and LoRAs."""
    choice = choose_backend(order.backend, device=order.device)
    plans = choice.backend in MODULES
    interim = Choice("torch", f"until {choice.backend} is built")
    model = _load_torch(order, interim, device="cuda" if plans else "cpu")
    if not plans:
        return model
    return dataclasses.replace(model, target=_target(order, choice.backend).settled(model.facts))


def load_built(order: Order, choice: Choice, progress: Progress) -> Model:
    """Load the order's bundle, built where it is not yet, on the backend chosen."""
    bundle = prepare(order, progress)
    engines: dict[str, Engine] = {}
    target, max_calls = None, GPU_CALLS
    if choice.backend in MODULES:
        from engines.backends.tensorrt_engine import TensorRtEngine

        target = PlanTarget.from_json(bundle.manifest["plans"]["target"])
        for name in PARTS:
            plan = bundle.part(name).with_suffix(".plan")
            engines[name] = TensorRtEngine(
                plan, choice.backend, target.batches, stripped=target.strip
            )
    else:
        from engines.backends.onnxruntime_engine import Cores, OnnxRuntimeEngine

        cores = Cores(order.num_threads)
        found = {name: OnnxRuntimeEngine(bundle.part(name), cores, order.device) for name in PARTS}
        max_calls = min(engine.max_calls for engine in found.values())
        engines |= found
    names = [window.tokenizer for window in bundle.facts.windows]
    tokenizers = {name: whole(Tokenizer.from_file(str(bundle.tokenizer(name)))) for name in names}
    device = "cuda" if choice.backend in MODULES else "cpu"
    adapters = _load_adapters(find_loras(order), engines)
    facts = with_defaults(bundle.facts, order.defaults)
    precision = bundle.precision
    return Model(facts, tokenizers, engines, adapters, choice, precision, device, target, max_calls)


def _load_adapters(loras: Mapping[str, Path], engines: Mapping[str, Engine]) -> Adapters:
    return Adapters({name: read_lora(path) for name, path in loras.items()}, engines)


def _load_torch(order: Order, choice: Choice, device: str = "") -> Model:
    import torch

    from engines.backends.fused.ops import keep_kernels
    from engines.backends.torch_engine import TorchEngine

    sources = find(order)
    source, overrides = sources.model, sources.overrides
    if is_bundle(source):
        raise BundleError(f"{source} is a bundle; --engine torch needs the checkpoint itself")
    on_gpu = order.device != "cpu" and torch.cuda.is_available()
    device = device or ("cuda" if on_gpu else "cpu")
    precision = order.precision
    if precision == "auto":
        precision = "fp16" if device == "cuda" else "fp32"
    if device != "cpu":
        keep_kernels(order.cache_dir / "kernels")
    pipeline = load_pipeline(source, precision, overrides)
    facts = with_defaults(load_facts(source, pipeline, overrides), order.defaults)
    parts = family_named(facts.family).parts(pipeline, facts)
    engines = {part.name: TorchEngine(part, device) for part in parts}
    names = [window.tokenizer for window in facts.windows]
    tokenizers = {name: tokenizer_of(pipeline, name) for name in names}
    adapters = _load_adapters(sources.loras, engines)
    max_calls = 1 if device == "cpu" else GPU_CALLS
    return Model(
        facts, tokenizers, engines, adapters, choice, precision, device, max_calls=max_calls
    )
