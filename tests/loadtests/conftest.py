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
    patient = {"FOURSTEP_REQUEST_TIMEOUT_S": "3600"}  # a busy machine would call many hopeless
    with serving.fourstep(
        str(lcm_checkpoint), cache_dir, gpu_shaped=True, environment=patient
    ) as running:
        yield running
