"""NVIDIA's driver: whether there is one, which, and whether it is new enough for torch's CUDA.

Cheap, and without torch: it is asked before torch is imported, and when torch finds no GPU.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# Any one of them: containers and sandboxes often lack the first, WSL has the last alone.
DRIVER_SIGNS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
# By CUDA's major version, for Linux: CUDA Toolkit Release Notes, table "CUDA Toolkit and Minimum
# Required Driver Version for CUDA Minor Version Compatibility".
OLDEST_DRIVERS = {12: 525, 13: 580}
QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
QUERY_S = 15.0  # a driver that is starting up answers within seconds


def has_driver() -> bool:
    """Whether there may be an NVIDIA GPU here: cheap, so that torch is imported only then."""
    return any(sign.exists() for sign in DRIVER_SIGNS)


def driver_version() -> str:
    """`570.124.06`, as the kernel says or else nvidia-smi; empty where neither does."""
    text = ""
    if DRIVER_SIGNS[0].exists():
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 02:03:25 UTC 2025
        text = DRIVER_SIGNS[0].read_text(errors="replace").partition("\n")[0]
    else:
        try:
            done = subprocess.run(
                QUERY, capture_output=True, text=True, check=True, timeout=QUERY_S
            )
            text = done.stdout
        except (OSError, subprocess.SubprocessError):
            return ""
    found = re.search(r"(?<![\w.])\d{3,}(?:\.\d+)+(?![\w.])", text)
    return found[0] if found else ""


def why_too_old(cuda: str | None) -> str:
    """What keeps torch, built with ``cuda`` ("13.0"), from this driver; empty where nothing does.

    Asked when torch has found no GPU: with NVIDIA's compatibility package an older driver will do.
    """
    oldest = OLDEST_DRIVERS.get(int(cuda.partition(".")[0])) if cuda else None
    version = driver_version()
    if oldest is None or not version or int(version.partition(".")[0]) >= oldest:
        return ""
    return (
        f"NVIDIA's driver here is {version}, and torch is built with CUDA {cuda}, which needs "
        f"{oldest} or newer: install a newer driver (on Kubernetes: another node image, or the "
        "GPU Operator's driver version), or draw on the CPU with --device cpu"
    )
