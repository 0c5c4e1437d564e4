"""A model ready to run: its facts, its tokenizers and one engine for each part."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from engines.backends.adapters import Adapters
from engines.backends.choice import Choice, Machine, check_precision, choose_backend
from engines.backends.engine import Engine
from engines.build.bundle import (
    Blueprint,
    Bundle,
    Progress,
    Quantise,
    ensure_bundle,
    folder_of,
    is_bundle,
    open_bundle,
)
from engines.build.checkpoint import latent_scale, load_facts, load_pipeline, tokenizer_of, whole
from engines.build.plan import MODULES, PlanTarget, import_tensorrt
from engines.build.source import NO_OVERRIDES, Sources, find, find_loras, find_model
from engines.drawing import decoding, encoding
from engines.drawing.batching import FULL_BATCH, denoise_rows
from engines.drawing.texts import Text, cut
from engines.drawing.weighting import runs_of
from engines.errors import BackendUnavailable, BuildError, BundleError
from engines.facts import EIGHT_BITS, MAX_CHUNKS, Facts
from engines.families import family_named
from engines.families.family import Family
from engines.families.tiles import check_tile
from engines.loras.file import read_lora
from engines.loras.fusing import without
from engines.order import Order
from engines.samplers.defaults import with_defaults

logger = logging.getLogger("fourstep.model")
# A decode beside a denoise call: they run one after the other, but the GPU has always one to go on
# with while the host looks after the other.
GPU_CALLS = 2


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
    tile_px: int = 0  # images of a longer side are decoded in tiles of it; 0: none are
    max_calls: int = 1  # engine calls that run side by side; on a GPU of different parts
    max_chunks: int = 1  # windows of the text encoder that a prompt may fill

    def batch_for(self, wanted: int | None) -> int:
        """Lanes of one denoise call: what is wanted or the default, and no more than plans take."""
        if self.target is None:
            return wanted or denoise_rows(self.device, self.facts.default_size_px)
        return min(wanted or self.target.max_batch, self.target.max_batch)

    @property
    def family(self) -> Family:
        return family_named(self.facts.family)

    def tokenize(self, text: str, *, weighted: bool = False) -> Text:
        """A text as the text encoder takes it; what finds no room there is counted.

        ``weighted``: brackets in it are weights.
        """
        runs = runs_of(text) if weighted else [(text, 1.0)]
        return cut(runs, self.facts.windows, self.tokenizers, self.max_chunks)

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines.values():
            engine.close()


def parts_of(facts: Facts) -> tuple[str, ...]:
    """Names of a model's parts."""
    decoders = (decoding.PARTS[decoder] for decoder in facts.decoders)
    encoders = (encoding.PARTS[encoder] for encoder in facts.encoders)
    return ("text_encoder", "denoiser", *decoders, *encoders)


def look(order: Order) -> Sources:
    """Find all that is named. What its configurations refuse is refused here, before anything is
    built or loaded.

    Raises:
        CheckpointError: something is not there.
        InvalidInput: tiles that fit no latents.
    """
    sources = find(order)
    if order.vae_tiling_px and not is_bundle(sources.model):
        scale = latent_scale(sources.model, sources.overrides)
        check_tile(order.vae_tiling_px, scale or 1)
    return sources


def prepare(order: Order, progress: Progress, quantise: Quantise | None = None) -> Bundle:
    """The bundle of a folder, shipped name, hub id or bundle, built where it is not yet, with
    ``quantise`` in 8 bits too.

    With a TensorRT backend it holds plans for this machine's GPU.
    """
    choice, sources = choose_backend(order.backend, device=order.device), look(order)
    check_precision(choice.backend, order.precision)
    folder = sources.model
    if not is_bundle(folder):
        blueprint = _blueprint(order, choice, sources)
        return ensure_bundle(blueprint, order.cache_dir, progress, quantise)
    bundle = open_bundle(folder)
    check_tile(order.vae_tiling_px, bundle.facts.vae_scale_factor)
    if sources.overrides != NO_OVERRIDES:
        raise BundleError(
            f"{folder} is a bundle, whose parts are built in; give --unet, --vae, --tiny-vae, "
            "--motion-adapter, --t5-int8, --embedding, --scheduler and --architecture to fourstep "
            "build, or serve the checkpoint itself"
        )
    if order.precision not in ("auto", bundle.precision):
        raise BundleError(
            f"{folder} was built with {bundle.precision}, not {order.precision}; "
            f"fourstep build MODEL --precision {order.precision} makes another"
        )
    if choice.backend in MODULES:
        check_plans(bundle, choice.backend, Machine.here(), order.vae_tiling_px)
    return bundle


def must_be_built(order: Order) -> bool:
    """Whether `load_model` would have to make a bundle first."""
    choice, sources = choose_backend(order.backend, device=order.device), look(order)
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
        tile_px=order.vae_tiling_px,
        max_chunks=MAX_CHUNKS if order.long_prompts else 1,
    )
    return Machine.here().aim(target)


def check_plans(bundle: Bundle, backend: str, machine: Machine, tile_px: int = 0) -> None:
    """Raise BundleError where the bundle's plans are absent, for another package or GPU, or take
    other tiles.
    """
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
    if tile_px not in (0, target.tile_px):
        raise BundleError(
            f"--vae-tiling-px is {tile_px}; {bundle.folder} has plans of decoders for "
            f"{target.tile_px or 'no'} px; {way_out} with --vae-tiling-px {tile_px}"
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


def check_lengths(bundle: Bundle, choice: Choice) -> None:
    """Raise BundleError where prompts of several windows are too long for what was built."""
    built_for, way_out = bundle.facts.max_chunks, "fourstep build MODEL"
    if choice.backend in MODULES:
        target = PlanTarget.from_json(bundle.manifest["plans"]["target"])
        built_for = min(built_for, target.max_chunks)
        way_out += f" --engine {choice.backend} --long-prompts"
    if built_for < MAX_CHUNKS:
        raise BundleError(
            f"{bundle.folder} was built for prompts that fit the text encoder's window, "
            f"long_prompt 'chunk' wants {MAX_CHUNKS} of them; {way_out} --out {bundle.folder} "
            "builds it anew, long_prompt 'truncate' serves it as it is"
        )


def load_model(order: Order, progress: Progress) -> Model:
    """Load every part of a model, and the LoRAs it may be asked for.

    Where ``auto`` chose plans and they cannot be built or loaded, torch draws, or ONNX Runtime
    where there is no checkpoint for torch.
    """
    choice = choose_backend(order.backend, device=order.device)
    check_precision(choice.backend, order.precision)
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
    if order.long_prompts:
        check_lengths(bundle, choice)
    if order.loras and bundle.precision in EIGHT_BITS:
        raise BundleError(
            f"{', '.join(order.loras)}: LoRAs change weights, which are in 8 bits here; fourstep "
            f"build MODEL --precision {bundle.precision} --lora FILE fuses them first, or serve "
            "another precision"
        )
    engines: dict[str, Engine] = {}
    target, max_calls, parts = None, GPU_CALLS, parts_of(bundle.facts)
    if choice.backend in MODULES:
        from engines.backends.tensorrt_engine import TensorRtEngine

        target = PlanTarget.from_json(bundle.manifest["plans"]["target"])
        for name in parts:
            plan = bundle.part(name).with_suffix(".plan")
            engines[name] = TensorRtEngine(
                plan, choice.backend, target.batches, stripped=target.strip
            )
    elif choice.backend == "openvino":
        from engines.backends.openvino_engine import OpenVinoEngine

        check_precision(choice.backend, bundle.precision)
        for name in parts:
            found = bundle.manifest.get("quantised", {}).get(name, {})
            in_8_bits = bool(found.get("num_convolutions") or found.get("num_linears"))
            engines[name] = OpenVinoEngine(
                bundle.part(name), order.num_threads, in_8_bits=in_8_bits
            )
        max_calls = 1
    else:
        from engines.backends.onnxruntime_engine import Cores, OnnxRuntimeEngine

        cores = Cores(order.num_threads)
        # No GPU's kernels run ONNX Runtime's products in 8 bits.
        place = "cpu" if bundle.precision in EIGHT_BITS else order.device
        found = {
            name: OnnxRuntimeEngine(
                bundle.part(name), cores, place, for_plans="plans" in bundle.manifest
            )
            for name in parts
        }
        max_calls = min(engine.max_calls for engine in found.values())
        engines |= found
    names = [window.tokenizer for window in bundle.facts.windows]
    tokenizers = {name: whole(Tokenizer.from_file(str(bundle.tokenizer(name)))) for name in names}
    device = "cuda" if choice.backend in MODULES else "cpu"
    facts = with_defaults(bundle.facts, order.defaults)
    adapters = _load_adapters(find_loras(order), engines, facts)
    precision, tile_px = bundle.precision, target.tile_px if target else order.vae_tiling_px
    _check_tiles(tile_px, facts)
    return Model(
        facts, tokenizers, engines, adapters, choice, precision, device, target, tile_px, max_calls,
        max_chunks=facts.max_chunks if order.long_prompts else 1,
    )  # fmt: skip


def _check_tiles(tile_px: int, facts: Facts) -> None:
    check_tile(tile_px, facts.vae_scale_factor)
    if tile_px and not facts.gives_image:
        raise BundleError(
            f"--vae-tiling-px is {tile_px}, which the bundle of {facts.name} was built too early "
            "for; fourstep build MODEL --out DIR makes another"
        )


def _load_adapters(
    loras: Mapping[str, Path], engines: Mapping[str, Engine], facts: Facts
) -> Adapters:
    read = {name: without(read_lora(path), facts.idle_weights) for name, path in loras.items()}
    return Adapters(read, engines, loras, facts.name)


def _load_torch(order: Order, choice: Choice, device: str = "") -> Model:
    import torch

    from engines.backends.fused.ops import keep_kernels
    from engines.backends.torch_engine import TorchEngine

    sources = look(order)
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
    adapters = _load_adapters(sources.loras, engines, facts)
    max_calls = 1 if device == "cpu" else GPU_CALLS
    _check_tiles(order.vae_tiling_px, facts)
    return Model(
        facts, tokenizers, engines, adapters, choice, precision, device,
        tile_px=order.vae_tiling_px, max_calls=max_calls,
        max_chunks=facts.max_chunks if order.long_prompts else 1,
    )  # fmt: skip
