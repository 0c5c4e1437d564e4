"""A model ready to run: its facts, its tokenizer and one engine for each part."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from engines.bundle import (
    TOKENIZER,
    Bundle,
    Progress,
    ensure_bundle,
    is_bundle,
    open_bundle,
)
from engines.checkpoint import download, load_facts, load_pipeline, pipeline_class, resolve
from engines.engine import Engine
from engines.errors import BackendUnavailable, BundleError
from engines.facts import Facts

BACKENDS = ("auto", "onnxruntime", "tensorrt", "torch")
PARTS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")


@dataclass(frozen=True, slots=True)
class Model:
    """What `Runner` drives."""

    facts: Facts
    tokenizer: Tokenizer
    engines: Mapping[str, Engine]
    backend: str
    precision: str
    device: str


def choose_backend(backend: str) -> str:
    """Resolve ``auto``: torch where CUDA answers, ONNX Runtime elsewhere.

    Raises:
        BackendUnavailable: the named backend cannot run here.
    """
    if backend == "auto":
        if not Path("/proc/driver/nvidia/version").exists():
            return "onnxruntime"  # torch, which takes seconds to import, need not be asked
        import torch

        return "torch" if torch.cuda.is_available() else "onnxruntime"
    if backend == "tensorrt":
        raise BackendUnavailable(
            "engine 'tensorrt' is not part of this version; use --engine torch on an NVIDIA GPU "
            "or --engine onnxruntime on a CPU"
        )
    if backend not in BACKENDS:
        raise BackendUnavailable(f"engine {backend!r} is unknown; known are {', '.join(BACKENDS)}")
    if importlib.util.find_spec(backend) is None:
        raise BackendUnavailable(f"engine {backend!r} needs the package: pip install {backend}")
    return backend


def prepare(model: str, precision: str, cache_dir: Path, progress: Progress) -> Bundle:
    """The bundle of a folder, shipped name, hub id or bundle, built where it is not yet."""
    folder = resolve(model) or download(model)
    if is_bundle(folder):
        bundle = open_bundle(folder)
        if precision not in ("auto", bundle.precision):
            raise BundleError(
                f"{folder} was built with {bundle.precision}, not {precision}; "
                f"fourstep build MODEL --precision {precision} makes another"
            )
        return bundle
    return ensure_bundle(folder, "fp32" if precision == "auto" else precision, cache_dir, progress)


def load_model(
    model: str,
    *,
    backend: str,
    precision: str,
    cache_dir: Path,
    num_threads: int | None,
    progress: Progress,
) -> Model:
    """Load every part of ``model`` on ``backend``."""
    backend = choose_backend(backend)
    if backend == "torch":
        return _load_torch(model, precision)
    from engines.onnxruntime_engine import OnnxRuntimeEngine

    bundle = prepare(model, precision, cache_dir, progress)
    engines = {name: OnnxRuntimeEngine(bundle.part(name), num_threads) for name in PARTS}
    tokenizer = Tokenizer.from_file(str(bundle.folder / TOKENIZER))
    return Model(bundle.facts, tokenizer, engines, backend, bundle.precision, "cpu")


def _load_torch(model: str, precision: str) -> Model:
    import torch

    from engines.families import family_of
    from engines.torch_engine import TorchEngine

    folder = resolve(model) or download(model)
    if is_bundle(folder):
        raise BundleError(f"{folder} is a bundle; --engine torch needs the checkpoint itself")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "fp16" if device == "cuda" else "fp32"
    pipeline = load_pipeline(folder, precision)
    facts = load_facts(folder, pipeline)
    parts = family_of(pipeline_class(folder)).parts(pipeline, facts)
    engines = {part.name: TorchEngine(part, device) for part in parts}
    tokenizer = Tokenizer.from_str(pipeline.tokenizer.backend_tokenizer.to_str())
    return Model(facts, tokenizer, engines, "torch", precision, device)
