"""One real service for every command that is pointed at one: the product over a timing double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.drawing.model import prepare
from engines.order import Order
from loadtests import serving
from loadtests.serving import Service


@pytest.fixture(scope="session")
def service(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[Service]:
    order = Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir)
    prepare(order, lambda what, done, total: None)  # the longest part of a first start
    with serving.fourstep(str(lcm_checkpoint), cache_dir, gpu_shaped=True) as running:
        yield running
