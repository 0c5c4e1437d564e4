"""A plan: one part's ONNX compiled by TensorRT, for shapes and GPUs that are named beforehand.

Owns targets, the builder and the plan's header; which shapes it takes: `engines.build.profiles`.
Serves both NVIDIA packages, which share an API; what only one of them can do is gated on it. Runs
no plan: see `engines.backends.tensorrt_engine`.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import resource
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import BackendUnavailable, BuildError, InvalidInput
from engines.facts import Facts
from engines.families.tiles import check_tile

if TYPE_CHECKING:  # it imports torch, which reading a bundle must not wait for
    pass

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # engine → Python package
INSTALL = {
    "tensorrt": "pip install tensorrt (its library comes from NVIDIA's package index)",
    "tensorrt-rtx": "pip install 'fourstep[tensorrt-rtx]'",
}
HARDWARE_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")
RTX_MAGIC = b"vtrt"
# The compute capabilities that TensorRT-RTX 1.7 runs on, and the bit that each sets in the mask of
# a plan's header. An H200 (9.0) refused a plan for which none was named (mask 0x7e, its last bit:
# above 12.0) and one for the current GPU (0x0): loadtests/results/gpu.md, 2026-11-26.
RTX_CAPABILITY_BITS = {75: 0x01, 80: 0x02, 86: 0x04, 89: 0x08, 120: 0x10, 121: 0x20}

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input → min, opt, max
Steps = Callable[[int, int], None]  # of the builder's own phases: done, in all


@dataclass(frozen=True, slots=True)
class PlanTarget:
    """What a plan is compiled for; part of a bundle's key.

    ``compute_capabilities`` empty means the GPU of the building machine. The two compatibility
    options belong to `tensorrt` alone; `tensorrt-rtx` plans run on every capability named.
    """

    engine: str
    sizes_px: tuple[tuple[int, int], ...]  # width, height; empty: the model's own size
    max_batch: int
    compute_capabilities: tuple[int, ...] = ()
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    strip: bool = False
    tile_px: int = 0  # decoders of larger sizes take tiles of it; 0: whole latents
    max_chunks: int = 1  # windows of text that a prompt may fill
    gpu: str = ""  # the name of the one it is built on, where its plans run on no other

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PlanTarget:
        """As a manifest has it."""
        sizes = tuple((width, height) for width, height in values["sizes_px"])
        capabilities = tuple(values["compute_capabilities"])
        return cls(**{**values, "sizes_px": sizes, "compute_capabilities": capabilities})

    def settled(self, facts: Facts) -> PlanTarget:
        """With the model's own size where none was named."""
        own = (facts.default_size_px, facts.default_size_px)
        return dataclasses.replace(self, sizes_px=self.sizes_px or (own,))

    def takes(self, width_px: int, height_px: int) -> bool:
        """Whether plans for this target have a profile for the size."""
        if self.engine == "tensorrt":
            return (width_px, height_px) in self.sizes_px
        sides = zip((width_px, height_px), zip(*self.sizes_px, strict=True), strict=True)
        return all(min(built) <= side <= max(built) for side, built in sides)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes plans are tuned for and runs are padded to: 1, 2, 4 … the largest."""
        doubling = itertools.takewhile(lambda n: n < self.max_batch, (2**k for k in range(16)))
        return (*doubling, self.max_batch)


def check_target(target: PlanTarget, facts: Facts) -> None:
    """Raise InvalidInput for a size that the model does not draw, or tiles that fit no latents."""
    check_tile(target.tile_px, facts.vae_scale_factor)
    multiple, low, high = facts.size_multiple_px, facts.min_size_px, facts.max_size_px
    for size in target.sizes_px:
        text = f"{size[0]}x{size[1]}"
        if any(side % multiple or not low <= side <= high for side in size):
            raise InvalidInput(
                "size",
                text,
                f"--size is {text}; {facts.name} draws sides in multiples of {multiple} from {low} "
                f"to {high}",
            )
        drawn = facts.drawn_size(*size)
        if drawn != size:
            at = "{}x{}".format(*drawn)
            raise InvalidInput(
                "size",
                text,
                f"--size is {text}, which {facts.name} draws at {at} and resizes; build for "
                f"--size {at}",
            )


def import_tensorrt(engine: str) -> Any:
    """The package behind ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        BackendUnavailable: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(MODULES[engine])
    except ImportError as error:
        way_out = f"{INSTALL[engine]}, or choose --engine torch or onnxruntime"
        raise BackendUnavailable(
            f"engine {engine!r} needs a package ({error}): {way_out}"
        ) from error


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a build cost and what came of it; stands in the manifest."""

    seconds: float
    peak_process_bytes: int  # of the building process, up to then
    num_layers: int  # of the parsed network; the builder fuses many
    profiles: list[Profile]


def compile_plan(
    onnx: Path,
    plan: Path,
    profiles: list[Profile],
    target: PlanTarget,
    *,
    timing_cache: Path | None = None,
    steps: Steps = lambda done, total: None,
) -> PlanReport:
    """Compile ``onnx`` (its weights beside it) and write ``plan``, whole or not at all.

    Raises:
        BackendUnavailable: the package is missing, or this machine has no GPU and needs one.
        BuildError: an operator, a shape or a GPU that this TensorRT does not take, or no memory.
    """
    trt = import_tensorrt(target.engine)
    begun = time.monotonic()
    log = make_logger(trt)
    builder = trt.Builder(log)
    if builder is None:  # the binding's answer to a constructor that failed
        raise BackendUnavailable(f"{target.engine} cannot build here: {log.last_error}")
    network = parse(trt, builder, log, onnx)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, steps)
    _aim(trt, config, target)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{onnx.name}: TensorRT refuses the shapes {dict(shapes)}")
    cache = _TimingCache(trt, config, timing_cache)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise BuildError(_why_not_built(onnx.stem, target, log.last_error))
    cache.keep()
    partial = plan.with_suffix(".plan.partial")
    partial.write_bytes(built)
    if target.engine == "tensorrt-rtx":
        RtxHeader.read(partial).check(target)
    partial.replace(plan)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return PlanReport(time.monotonic() - begun, peak, network.num_layers, profiles)


def parse(trt: Any, builder: Any, log: Any, onnx: Path) -> Any:
    """The strongly typed network of an ONNX file: its types alone decide the precision.

    Raises:
        BuildError: naming the first operator that TensorRT does not take.
    """
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        first = "no reason given"
        if errors:
            reason = " ".join(errors[0].desc().splitlines()[:2])
            first = f"operator {errors[0].node_operator() or 'unknown'}: {reason}"
        raise BuildError(
            f"{trt.__name__} {trt.__version__} does not take {onnx.name}: {first}; "
            "serve this model with --engine torch or onnxruntime"
        )
    return network


def _aim(trt: Any, config: Any, target: PlanTarget) -> None:
    """Set GPUs, compatibility and refitting, each where the package has it."""
    if target.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if target.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if hasattr(trt, "ComputeCapability"):
        asked = target.compute_capabilities
        names = [f"SM{capability}" for capability in asked] or ["CURRENT"]
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            value = trt.ComputeCapability.__members__.get(name)
            if value is None or not config.set_compute_capability(value, index):
                raise BuildError(
                    f"compute capability {asked[index] if asked else 'of this GPU'} is none that "
                    f"{trt.__name__} {trt.__version__} compiles for "
                    f"({_listed(RTX_CAPABILITY_BITS)}); for other GPUs build with --engine "
                    "tensorrt on such a machine"
                )
        return
    if target.compute_capabilities:
        raise BuildError(
            "--compute-capability belongs to --engine tensorrt-rtx; a tensorrt plan is built on "
            "the GPU that runs it (--hardware-compatibility widens that)"
        )
    level = target.hardware_compatibility.upper()
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if target.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _why_not_built(part: str, target: PlanTarget, error: str) -> str:
    way_out = "the log above has more; serve with --engine torch meanwhile"
    if "memory" in error.lower():
        way_out = (
            f"give it more memory, fewer --size, or a smaller --max-batch than {target.max_batch}"
        )
    elif "cuda" in error.lower() or target.refit or target.strip:
        way_out = (
            "this build wants a GPU: refittable and stripped plans, and plans without "
            "--compute-capability, are built on one"
        )
    return f"TensorRT did not build {part}: {error or 'no reason given'}; {way_out}"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def make_logger(trt: Any) -> Any:
    """A logger of the package that keeps what went wrong in ``last_error``."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error, for the exception that will be raised."""

        last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last_error = message.strip()

    return Log()


def _monitor(trt: Any, steps: Steps) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes on the steps of the outermost phase."""

        def __init__(self) -> None:
            super().__init__()
            self._totals: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            if parent is None:
                self._totals[name] = num_steps

        def step_complete(self, name: str, step: int) -> bool:
            if name in self._totals:
                steps(step + 1, self._totals[name])
            return True  # go on

        def phase_finish(self, name: str) -> None:
            self._totals.pop(name, None)

    return Monitor()


class _TimingCache:
    """Measured tactics, kept between builds in ``file``; `tensorrt` alone has them."""

    def __init__(self, trt: Any, config: Any, file: Path | None) -> None:
        self._config, self._file = config, None if hasattr(trt, "ComputeCapability") else file
        if self._file:
            known = self._file.read_bytes() if self._file.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(known), False)

    def keep(self) -> None:
        if self._file:
            partial = self._file.with_suffix(".partial")
            partial.write_bytes(self._config.get_timing_cache().serialize())
            partial.replace(self._file)


@dataclass(frozen=True, slots=True)
class RtxHeader:
    """The first 64 bytes of a TensorRT-RTX plan, which can be read without a GPU."""

    num_bytes: int
    version: str
    compute_capabilities: tuple[int, ...]

    @classmethod
    def read(cls, plan: Path) -> RtxHeader:
        """Raises BuildError where the file does not begin as such a plan."""
        with plan.open("rb") as file:
            head = file.read(64)
        if len(head) < 64 or head[:4] != RTX_MAGIC:
            raise BuildError(f"{plan} is no TensorRT-RTX plan; build it again")
        (num_bytes,) = struct.unpack_from("<Q", head, 16)
        (mask,) = struct.unpack_from("<I", head, 32)
        found = tuple(sm for sm, bit in RTX_CAPABILITY_BITS.items() if mask & bit)
        return cls(num_bytes, ".".join(str(byte) for byte in head[24:28]), found)

    def check(self, target: PlanTarget) -> None:
        """Raise BuildError where the plan was not made for every GPU that was asked for."""
        left_out = set(target.compute_capabilities) - set(self.compute_capabilities)
        if left_out:
            raise BuildError(
                f"TensorRT-RTX {self.version} made a plan for compute capability "
                f"{_listed(self.compute_capabilities)}, without {_listed(left_out)}"
            )
