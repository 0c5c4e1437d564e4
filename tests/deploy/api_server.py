"""An API server of what Ray's autoscaler asks for: pods and a RayCluster, by TLS and a token."""

from __future__ import annotations

import http.server
import json
import ssl
import subprocess
from pathlib import Path
from typing import Protocol

from tests.deploy.kuberay import CLUSTER, Object
from tests.deploy.pod_network import PodNetwork

PODS = "/api/v1/namespaces/fourstep/pods"
RAY_CLUSTER = f"/apis/ray.io/v1/namespaces/fourstep/rayclusters/{CLUSTER}"


class Plane(Protocol):
    """What it tells of and changes."""

    network: PodNetwork
    ray_cluster: Object

    def listed(self) -> Object: ...
    def patch(self, operations: list[Object]) -> Object: ...
    def allows(self, authorization: str | None) -> bool: ...


def make_certificate(folder: Path, address: str) -> tuple[Path, Path]:
    """A certificate for the name and the address that pods know, and its key."""
    certificate, key = folder / "api-server.crt", folder / "api-server.key"
    names = f"subjectAltName=DNS:kubernetes.default,IP:{address}"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=kubernetes", "-addext", names, "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def api_server(plane: Plane, certificate: Path, key: Path) -> http.server.HTTPServer:
    """Listens already; `serve_forever` answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"{PODS}/"):  # the head, for its resource version
                self._answer(200, plane.listed()["items"][0])
            elif path == PODS:
                self._answer(200, plane.listed())
            elif path == RAY_CLUSTER:
                self._answer(200, plane.ray_cluster)
            else:
                self._answer(404, {"kind": "Status", "code": 404})

        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == RAY_CLUSTER:
                self._answer(200, plane.patch(body))
            else:
                self._answer(404, {"kind": "Status", "code": 404})

        def _answer(self, status: int, body: Object) -> None:
            if not plane.allows(self.headers["Authorization"]):
                status, body = 401, {"kind": "Status", "code": 401}
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((plane.network.api_server, 443), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server
