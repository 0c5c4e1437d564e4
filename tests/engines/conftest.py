"""Tiny checkpoints, their bundles and runners, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from engines.drawing.runner import Runner
from engines.order import Order

BACKENDS = ("torch", "onnxruntime")
COMBINATIONS = [
    *((name, backend) for name in ("tiny-lcm", "tiny-sd", "tiny-demo") for backend in BACKENDS),
    ("tiny-v", "torch"),  # its graphs are those of tiny-sd; only the tables differ
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread only costs


@pytest.fixture(scope="session")
def checkpoints(shared: Path) -> Path:
    """A folder with ``tiny-lcm`` (guidance embedding), ``tiny-sd`` and ``tiny-v`` (none).

    ``tiny-demo`` is built as the demo model is: three levels, guidance embedding, v prediction.
    """
    from tests.engines.checkpoints import make_checkpoint

    folder = shared / "checkpoints"
    with FileLock(shared / "checkpoints.lock"):
        if folder.exists():
            return folder
        make_checkpoint(folder / "tiny-lcm", lcm=True)
        make_checkpoint(folder / "tiny-sd", lcm=False)
        make_checkpoint(folder / "tiny-v", lcm=False, prediction_type="v_prediction")
        make_checkpoint(
            folder / "tiny-demo", lcm=True, prediction_type="v_prediction", three_levels=True
        )
    return folder


@pytest.fixture(scope="session")
def tiny_motion(shared: Path) -> Path:
    """A motion adapter for ``tiny-sd``."""
    from tests.engines.checkpoints import make_motion_adapter

    with FileLock(shared / "tiny-motion.lock"):
        folder = shared / "tiny-motion"
        return folder if folder.exists() else make_motion_adapter(folder)


@pytest.fixture(scope="session")
def tiny_clips(shared: Path, checkpoints: Path, tiny_motion: Path) -> Path:
    """The folder ``tiny-animatediff`` of both."""
    from tests.engines.checkpoints import make_animatediff_checkpoint

    with FileLock(shared / "tiny-animatediff.lock"):
        folder = shared / "tiny-animatediff"
        if not folder.exists():
            make_animatediff_checkpoint(folder, checkpoints / "tiny-sd", tiny_motion)
        return folder


@pytest.fixture(scope="session")
def runners(checkpoints: Path, cache_dir: Path) -> Iterator[dict[tuple[str, str], Runner]]:
    """Runners by (checkpoint, backend)."""
    opened = {
        (name, backend): Runner.open(
            Order(
                str(checkpoints / name),
                backend=backend,
                cache_dir=cache_dir,
                max_batch=8,
                num_threads=1,
            )
        )
        for name, backend in COMBINATIONS
    }
    yield opened
    for runner in opened.values():
        runner.close()
