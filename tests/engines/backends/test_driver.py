"""NVIDIA's driver, as the kernel and nvidia-smi tell of it, on a machine that has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.backends import driver
from engines.backends.choice import Machine, choose_backend
from engines.backends.driver import driver_version, has_driver, why_too_old
from engines.errors import BackendUnavailable

# First lines of /proc/driver/nvidia/version: of the closed module, of the open one, and of one of
# before CUDA 13; and of nvidia-smi, where it answers and where it does not.
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 02:03:25 UTC 2025"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  "
    "(dvs-builder@U22-I3-AE18-23-3)  Sun Jul 27 06:54:38 UTC 2025"
)
GCC = "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)"
UNREACHABLE = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
    "the latest NVIDIA driver is installed and running."
)


@pytest.fixture
def signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where a driver shows, in the test's folder; none does yet, and there is no nvidia-smi."""
    found = [tmp_path / name for name in ("proc", "nvidiactl", "dxg")]
    monkeypatch.setattr(driver, "DRIVER_SIGNS", found)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return found


def nvidia_smi(folder: Path, says: str, code: int = 0) -> None:
    """A program of that name, which is asked as the real one would be."""
    file = folder / "nvidia-smi"
    file.write_text(f'#!/bin/sh\ncase "$*" in *--query-gpu=driver_version*) echo "{says}";; esac\n')
    with file.open("a") as script:
        script.write(f"exit {code}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_driver_is_known_by_any_of_its_signs(number: int, signs: list[Path]) -> None:
    """A container may have the device and not the driver's page in /proc."""
    assert not has_driver()
    signs[number].touch()
    assert has_driver()


@pytest.mark.parametrize(("line", "version"), [(CLOSED, "570.124.06"), (OPEN, "580.65.06")])
def test_its_version_stands_in_proc(line: str, version: str, signs: list[Path]) -> None:
    signs[0].write_text(f"{line}\n{GCC}\n")
    assert driver_version() == version


@pytest.mark.parametrize(
    ("says", "code", "version"),
    [("535.183.01", 0, "535.183.01"), (UNREACHABLE, 9, ""), ("[N/A]", 0, "")],
)
def test_or_nvidia_smi_knows_it(
    says: str, code: int, version: str, signs: list[Path], tmp_path: Path
) -> None:
    signs[1].touch()
    assert driver_version() == "", "no nvidia-smi"
    nvidia_smi(tmp_path, says, code)
    assert driver_version() == version


@pytest.mark.parametrize(
    ("line", "cuda", "needed"),
    [
        (CLOSED, "13.0", "580"),
        (CLOSED, "12.8", ""),
        (OPEN, "13.0", ""),
        (OPEN, "13.2", ""),
        (CLOSED.replace("570.124.06", "470.256.02"), "12.6", "525"),
        (CLOSED, None, ""),  # torch for the CPU
        ("of another form", "13.0", ""),
    ],
)
def test_cuda_13_needs_a_driver_of_580(
    line: str, cuda: str | None, needed: str, signs: list[Path]
) -> None:
    signs[0].write_text(line)
    said = why_too_old(cuda)
    assert bool(said) == bool(needed)
    if needed:
        assert f"built with CUDA {cuda}, which needs {needed} or newer" in said


def test_a_gpu_behind_an_old_driver_is_refused_and_not_replaced_by_the_cpu(
    signs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own wheel here is for the CPU: it is told that it is one for CUDA 13."""
    signs[0].write_text(CLOSED)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for backend, device in (("auto", "auto"), ("torch", "auto"), ("tensorrt-rtx", "auto"),
                            ("auto", "cuda")):  # fmt: skip
        with pytest.raises(BackendUnavailable, match=r"driver here is 570\.124\.06.*580 or newer"):
            choose_backend(backend, Machine.here(), device=device)
    assert choose_backend("auto", Machine.here(), device="cpu").backend == "onnxruntime"
    assert choose_backend("onnxruntime", Machine.here()).backend == "onnxruntime"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # Ray's, for a replica without GPUs
    assert choose_backend("auto", Machine.here()).backend == "onnxruntime"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    signs[0].write_text(OPEN)  # and a GPU that is not there
    assert choose_backend("auto", Machine.here()).reason == "no NVIDIA GPU here"
