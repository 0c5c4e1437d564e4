"""Which tests are collected: all; the GPU's on a machine that has torch and diffusers alone too."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the service, the builds and the other tests need; None in sys.modules fails their import.
ABSENT = ("fastapi", "httpx", "onnx", "onnxruntime", "openai", "peft", "prometheus_client", "ray")
COLLECT = (
    f"import sys, pytest, loadtests.gpu.proofs; sys.modules.update(dict.fromkeys({ABSENT!r})); "
    "sys.exit(pytest.main(['-q', '-m', 'gpu', '--collect-only', '-p', 'no:schemathesis', "
    "*loadtests.gpu.proofs.FILES]))"
)


def test_the_gpu_tests_need_no_service() -> None:
    found = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "test_gpu.py" in found.stdout
    assert "test_gpu_families.py" in found.stdout


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """As one named `build` would be, by pytest's own list."""
    passed_over = pytestconfig.getini("norecursedirs")
    for file in (ROOT / "tests").rglob("test_*.py"):
        for part in file.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch.fnmatch(part, pattern) for pattern in passed_over), file


def test_where_no_test_wants_a_gpu_none_is_seen() -> None:
    import torch

    assert not torch.cuda.is_available()
