"""What the machine is and what it can do at best: figures that all others are held against."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable

import torch

from loadtests.gpu.clocks import device_ms, wall_ms
from loadtests.gpu.models import shape_for
from loadtests.gpu.section import Section
from loadtests.peak import DTYPES, matrix_peak, plain_fp32
from service.telemetry.versions import version_of

PACKAGES = ("torch", "triton", "diffusers", "transformers", "onnx", "numpy", "fourstep", "ray")
DRIVER = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
ROWS = 8  # of what goes to the device and comes back
TINY_SIDE = 256


def measure(section: Section) -> None:
    """Identity, matrix peaks, copies, and the noise that the host draws."""
    plain_fp32()
    facts(section)
    for precision in DTYPES:
        with section.attempt(f"matrix peak, {precision}"):
            side = None if section.device == "cuda" else TINY_SIDE
            peak = matrix_peak(precision, section.device, side) / 1e12
            section.row("matrix peak", precision=precision, tflops=peak)
    with section.attempt("copies"):
        copies(section)


def facts(section: Section) -> None:
    found: dict[str, object] = {name: version_of(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    found["fp32 products and convolutions"] = "without TF32, as in `speed`"
    if section.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "GPU": properties.name,
            "GPU memory, GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "compute capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            **driver_facts(),
        }
    for name, value in found.items():
        section.row("fact", name=name, value=value)


def driver_facts() -> dict[str, str]:
    """What nvidia-smi says, idle; nothing where it is not installed."""
    command = ["nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(DRIVER.replace(".", " ").replace("_", " ").split(","), values, strict=False))


def copies(section: Section) -> None:
    """Within the device, to it and back, pageable and pinned; and a row's noise on the host."""
    device, cuda = section.device, section.device == "cuda"
    block = torch.randn(2**28 if cuda else 2**20, device=device)  # 1 GiB
    other = torch.empty_like(block)
    ms = device_ms(lambda: other.copy_(block), device, 0.1)
    num_bytes = 2 * block.numel() * block.element_size()  # read and written
    section.row("copies", what="within the device", ms=ms, gb_per_s=num_bytes / ms / 1e6)
    shape = shape_for(device)
    noise = torch.randn(ROWS, 4, shape.side, shape.side)
    pixels = torch.zeros(ROWS, shape.size_px, shape.size_px, 3, dtype=torch.uint8, device=device)
    ways: dict[str, Callable[[], object]] = {
        f"noise of {ROWS} rows to it, pageable": lambda: noise.to(device),
        f"pixels of {ROWS} rows back, pageable": pixels.cpu,
        "one row's noise drawn on the host": lambda: torch.randn(4, shape.side, shape.side),
    }
    if cuda:
        pinned, home = noise.pin_memory(), torch.empty_like(pixels, device="cpu").pin_memory()
        ways |= {
            f"noise of {ROWS} rows to it, pinned": lambda: pinned.to(device, non_blocking=True),
            f"pixels of {ROWS} rows back, pinned": lambda: home.copy_(pixels, non_blocking=True),
        }
    for what, way in ways.items():
        section.row("copies", what=what, ms=wall_ms(way, device, 0.05))
