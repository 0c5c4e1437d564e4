"""Every socket on which a started service listens, and who may come in there."""

from __future__ import annotations

import ipaddress
import pickle
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from service.ray_serve.environment import free_port, haproxy_available
from tests.service.processes import END_TIMEOUT_S, start, wait_until_ready
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(not haproxy_available(), reason="Ray's HAProxy is for Linux alone")

KINDS = ("raylet", "gcs_server", "haproxy", "ray::ServeReplica")


@pytest.fixture(scope="module")
def service(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[tuple[psutil.Process, int]]:
    """One that lets other machines in, whose user has told Ray to ask nobody for a token."""
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        options = ("--host", "0.0.0.0", "--allow-anonymous", "--probe-port", str(port + 1))
        process = start(lcm_checkpoint, cache_dir, port, *options)
    try:
        wait_until_ready(process, port)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.communicate(timeout=END_TIMEOUT_S)


def listeners(process: psutil.Process) -> set[tuple[str, str, int]]:
    """Who listens, on which address and port, of a process and all that it has started."""
    found = set()
    for each in (process, *process.children(recursive=True)):
        try:
            sockets = each.net_connections("inet")
            name = each.name()
        except psutil.NoSuchProcess:
            continue
        found |= {(name, *s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def test_others_reach_the_service_and_nothing_else(service: tuple[psutil.Process, int]) -> None:
    process, port = service
    found: set[tuple[str, str, int]] = set()

    def complete() -> bool:
        """A proxy that is being replaced is not seen at every moment."""
        found.update(listeners(process))
        names = [name for name, _, _ in found]
        return all(any(name.startswith(kind) for name in names) for kind in KINDS)

    wait_for(complete, "a listener of each kind")
    open_to_others = {entry for entry in found if not is_loopback(entry[1])}
    assert open_to_others == {("haproxy", "0.0.0.0", port)}
    assert httpx.get(f"http://127.0.0.1:{port + 1}/readyz").text == "ready\n"


def test_no_port_unpickles_what_anybody_sends(
    service: tuple[psutil.Process, int], tmp_path: Path
) -> None:
    process, _ = service
    trace = tmp_path / "it-ran"

    class Harmless:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(trace), "w")

    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Harmless()))
    pickle.loads(request.pickled_request_metadata).close()
    assert trace.exists(), "else nothing is shown by its absence"
    trace.unlink()
    for _, _, port in listeners(process):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = serve_pb2_grpc.ASGIServiceStub(channel)
            with pytest.raises(grpc.RpcError):
                stub.HandleRequest(request, timeout=3)
    assert not trace.exists()


def test_ray_asks_whoever_calls_for_a_token(service: tuple[psutil.Process, int]) -> None:
    process, _ = service
    (port, *_) = [port for name, _, port in listeners(process) if name == "gcs_server"]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        with pytest.raises(grpc.RpcError) as refused:
            ask(b"", timeout=60)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
