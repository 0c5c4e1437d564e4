"""Fixtures that several test packages share: a tiny checkpoint, bundles, replicas, a Prometheus.

What they need is imported when they are asked for, so that the GPU's tests can be collected where
there is torch and diffusers and no more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from engines.order import Order

if TYPE_CHECKING:
    from tests.monitoring import Prometheus
    from tests.replicas import ReplicaProcess


LONGEST = (  # by the seconds that they took, 2026-11-27
    "test_serve.py",
    "test_on_ray.py",
    "test_parity.py",
    "test_meanwhile.py",
    "test_chaos.py",
    "test_commands.py",
    "test_gpu_command.py",
    "test_embeddings.py",
    "test_animatediff.py",
    "test_stable_diffusion_xl.py",
    "test_shipped.py",
    "test_plan.py",
    "test_long_prompts.py",
    "test_older_bundles.py",
    "test_model_cache.py",
    "test_agreement.py",
    "test_kernels.py",
    "test_bundle.py",
    "test_pixart.py",
)


def pytest_configure() -> None:
    """Tests see in `/metrics` what they have just done, those of processes that they start too."""
    os.environ["FOURSTEP_METRICS_MAX_AGE_S"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one that is left to the end would be run by one worker alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else 99)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without a test that wants the GPU none is there: `auto` would draw by it, and in halves.

    The processes that tests start inherit it. Nothing has asked CUDA for its devices by then.
    """
    if not any(item.get_closest_marker("gpu") for item in session.items):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same for all of its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def lcm_checkpoint(shared: Path) -> Path:
    """A tiny random LCM with a guidance embedding, 64 px."""
    from tests.engines.checkpoints import make_checkpoint

    with FileLock(shared / "tiny-lcm.lock"):
        folder = shared / "models" / "tiny-lcm"
        return folder if folder.exists() else make_checkpoint(folder, lcm=True)


@pytest.fixture(scope="session")
def cache_dir(shared: Path) -> Path:
    """Where the run's bundles are built, once."""
    folder = shared / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def fresh_cache(cache_dir: Path, tmp_path: Path) -> Path:
    """A cache without bundles; graphs are the run's, so that a build takes no export."""
    folder, graphs = tmp_path / "cache", cache_dir / "graphs"
    folder.mkdir()
    graphs.mkdir(exist_ok=True)
    (folder / "graphs").symlink_to(graphs)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _their_cache(cache_dir: Path) -> Iterator[None]:
    """Commands that are told no other cache use the run's, never that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOURSTEP_CACHE_DIR", str(cache_dir))
        yield


@pytest.fixture(scope="session")
def replica_settings(lcm_checkpoint: Path, cache_dir: Path) -> dict[str, object]:
    """For replicas that shed after a few images and draw for long where asked to."""
    from engines.drawing.model import prepare

    prepare(Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir), lambda *_: None)
    return {
        "model": lcm_checkpoint,
        "cache_dir": cache_dir,
        "engine": "onnxruntime",
        "num_threads": 2,
        "max_waiting": 8,
        "max_steps": 1000,
        "request_timeout_s": 3600,  # a busy machine would call a long one hopeless
    }


@pytest.fixture(scope="session")
def two_nodes(
    tmp_path_factory: pytest.TempPathFactory, replica_settings: dict[str, object]
) -> Iterator[list[ReplicaProcess]]:
    """Two nodes of one replica each, serving."""
    from tests.replicas import replica_process, wait_until_ready

    with contextlib.ExitStack() as stack:
        folders = [tmp_path_factory.mktemp("node") for _ in range(2)]
        nodes = [
            stack.enter_context(replica_process(folder, **replica_settings)) for folder in folders
        ]
        for node in nodes:
            wait_until_ready(node)
        yield nodes


@pytest.fixture(scope="module")  # it costs a little of the machine while it runs
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, two_nodes: list[ReplicaProcess]
) -> Iterator[Prometheus]:
    """It watches two nodes that have had traffic of every kind."""
    from tests.monitoring import run_prometheus, send_traffic
    from tests.waiting import wait_for

    folder = tmp_path_factory.mktemp("prometheus")
    targets = [node.url.removeprefix("http://") for node in two_nodes]
    with run_prometheus(folder, targets) as prometheus:
        wait_for(lambda: len(prometheus.query("up == 1")) == 2, "both nodes are scraped")
        for node in two_nodes:
            send_traffic(node)
        # A rate needs two scrapes, and so do the rules over it.
        rated = "model:fourstep_request_errors:ratio_rate5m > 0"
        wait_for(lambda: bool(prometheus.query(rated)), "the traffic shows in a recorded ratio")
        yield prometheus
