"""The soak's arithmetic, and the whole command on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.soak import quarters


def test_quarters_are_medians_in_order() -> None:
    assert quarters([1, 1, 9, 2, 2, 2, 3, 3, 3, 4, 0, 4]) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="3 memory samples are too few"):
        quarters([1, 2, 3])


def test_soak_reports_the_replica(lcm_checkpoint: Path, cache_dir: Path) -> None:
    options = ["soak", "--model", str(lcm_checkpoint), "--cache-dir", str(cache_dir)]
    options += ["--engine", "gpu_shaped", "--count", "600"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    found = re.fullmatch(r"\| 600 \| \d+ \| [\d.]+ \| ((?:[\d.]+, ){3}[\d.]+) \| .*x \|", last)
    assert found, last
    assert all(float(mib) > 50 for mib in found[1].split(", "))
