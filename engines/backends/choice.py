"""Which backend draws: what was asked for, or the best this machine has, and why.

tensorrt  ◀ an NVIDIA GPU and the package      otherwise ▶ tensorrt-rtx ▶ torch ▶ onnxruntime
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from dataclasses import dataclass

from engines.backends.driver import has_driver, why_too_old
from engines.build.plan import INSTALL, MODULES, RTX_CAPABILITY_BITS, PlanTarget
from engines.errors import BackendUnavailable
from engines.facts import EIGHT_BITS

DEVICES = ("auto", "cpu", "cuda")
ON_A_CPU = ("onnxruntime", "openvino")  # alone
BACKENDS = ("auto", *ON_A_CPU, "tensorrt", "tensorrt-rtx", "torch")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choice depends on. ``compute_capability`` (89 for 8.9) is None without a GPU."""

    compute_capability: int | None
    packages: frozenset[str]  # of those that backends need
    gpu: str = ""  # the first one's name, "NVIDIA L4" say
    num_gpus: int = 0
    driver_fault: str = ""  # why a GPU that may be here is of no use

    @classmethod
    def here(cls) -> Machine:
        """Look; torch, which takes seconds to import, is asked only where there is a driver."""
        needed = (*ON_A_CPU, "torch", *MODULES.values())
        packages = frozenset(name for name in needed if importlib.util.find_spec(name))
        if not has_driver():
            return cls(None, packages)
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a driver that is too old: told in full below
            available = torch.cuda.is_available()
        if not available:
            hidden = not torch.cuda._parse_visible_devices()  # by CUDA_VISIBLE_DEVICES, as Ray does
            fault = "" if hidden else why_too_old(torch.version.cuda)
            return cls(None, packages, driver_fault=fault)
        major, minor = torch.cuda.get_device_capability()
        name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
        return cls(10 * major + minor, packages, name, count)

    def only(self, device: str) -> Machine:
        """What is left of it for drawing on ``device``, one of `DEVICES`.

        Raises:
            BackendUnavailable: there is none of that name, or no GPU.
        """
        if device not in DEVICES:
            raise BackendUnavailable(
                f"device {device!r} is unknown; known are {', '.join(DEVICES)}"
            )
        if device == "cuda" and self.compute_capability is None:
            raise BackendUnavailable(
                self.driver_fault
                or "device 'cuda' needs an NVIDIA GPU and its driver, none is here: choose "
                "--device cpu, or auto"
            )
        return Machine(None, self.packages) if device == "cpu" else self

    def aim(self, target: PlanTarget) -> PlanTarget:
        """The target of plans that are built here, named after this GPU if no other runs them.

        `tensorrt-rtx` is asked for this GPU's compute capability.
        """
        capability = self.compute_capability
        if target.engine == "tensorrt-rtx" and not target.compute_capabilities and capability:
            target = dataclasses.replace(target, compute_capabilities=(capability,))
        portable = target.compute_capabilities or target.hardware_compatibility != "none"
        return target if portable else dataclasses.replace(target, gpu=self.gpu)


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend and the reason, for the log and for ``/v1/models``."""

    backend: str
    reason: str


def choose_backend(backend: str, machine: Machine | None = None, *, device: str = "auto") -> Choice:
    """Resolve ``auto``, or check that the named backend can run here, on that device.

    Raises:
        BackendUnavailable: it cannot; the message says what is missing.
    """
    if backend not in BACKENDS:
        raise BackendUnavailable(f"engine {backend!r} is unknown; known are {', '.join(BACKENDS)}")
    machine = (machine or Machine.here()).only(device)
    if backend in ON_A_CPU and device == "cuda":
        raise BackendUnavailable(
            f"engine {backend!r} draws on the CPU: choose --engine torch, or --device cpu"
        )
    if machine.driver_fault and backend not in ON_A_CPU:
        # Not drawn on the CPU unasked: a GPU is paid for, and it would be a hundred times slower.
        raise BackendUnavailable(machine.driver_fault)
    if backend != "auto":
        missing = _missing(backend, machine)
        if missing:
            raise BackendUnavailable(f"engine {backend!r} {missing}")
        return Choice(backend, "asked for")
    if machine.compute_capability is None:
        reason = "device 'cpu' was asked for" if device == "cpu" else "no NVIDIA GPU here"
        return Choice("onnxruntime", reason)
    passed_over: list[str] = []
    for candidate in ("tensorrt", "tensorrt-rtx"):
        missing = _missing(candidate, machine)
        if not missing:
            return Choice(candidate, "; ".join([*passed_over, "an NVIDIA GPU and the package"]))
        passed_over.append(f"{candidate} {missing.split(':')[0]}")
    return Choice("torch", "; ".join(passed_over))


def check_precision(backend: str, precision: str) -> None:
    """Raise BackendUnavailable for weights in 8 bits on a backend that has no such kernels."""
    takers = tuple(MODULES) if precision == "fp8" else (*ON_A_CPU, *MODULES)
    if precision in EIGHT_BITS and backend not in takers:
        way_out = "" if precision == "fp8" else " (onnxruntime with --device cpu)"
        raise BackendUnavailable(
            f"precision {precision!r} is for engine {', '.join(takers)}, not {backend!r}: choose "
            f"one of them{way_out}, or another precision"
        )


def draws_on_gpu(backend: str, machine: Machine, device: str = "auto") -> bool:
    """Whether a backend that was chosen takes a GPU: plans do, and torch where there is one."""
    on_gpu = machine.only(device).compute_capability is not None
    return backend in MODULES or (backend == "torch" and on_gpu)


def _missing(backend: str, machine: Machine) -> str:
    """What keeps a backend from running here; empty if nothing does."""
    capability = machine.compute_capability
    if backend == "tensorrt-rtx" and capability not in (None, *RTX_CAPABILITY_BITS):
        known = ", ".join(map(str, RTX_CAPABILITY_BITS))
        return (  # before the package: installing it would help nothing
            f"does not run on compute capability {capability} (it does on {known}): choose "
            "--engine torch, or tensorrt"
        )
    package = MODULES.get(backend, backend)
    if package not in machine.packages:
        others = ", ".join(name for name in BACKENDS if name != backend)
        way_out = INSTALL.get(backend, f"pip install {backend}")
        return f"needs a package: {way_out}, or choose among {others}"
    if backend not in MODULES:
        return ""
    if capability is None:
        return (
            "needs an NVIDIA GPU and its driver, none is here: choose --engine onnxruntime (plans "
            "can be built without one: fourstep build)"
        )
    return ""
