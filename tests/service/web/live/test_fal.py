"""fal's own Python client draws here, over TLS; the page's example runs as it stands."""

from __future__ import annotations

import base64
import datetime
import io
import ipaddress
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from service.access.keys import make_key
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.engines.peers import Peer, psnr_db, recipe
from tests.service.web.live.test_client import PAGE
from tests.service.web.live.test_session import PHOTO, png

ASKED = {
    "prompt": "a red cube", "seed": 5, "num_inference_steps": 3, "guidance_scale": 3.0,
    "format": "png", "sync_mode": True, "enable_safety_checks": False,
}  # fmt: skip
CLIENT = """
import json, sys
import fal_client
from fal_client.client import RealtimeError
from websockets.exceptions import ConnectionClosed

with fal_client.SyncClient().realtime("fourstep/tiny-lcm", use_jwt=False) as drawing:
    for message in json.load(sys.stdin):
        try:
            drawing.send(message)
            print(json.dumps(drawing.recv()))
        except RealtimeError as error:
            print(json.dumps({"error": [error.error, error.reason]}))
        except ConnectionClosed as error:
            print(json.dumps({"error": ["closed", str(error)]}))
"""


# The client writes to a TLS socket while another thread of it reads, which Python's does not bear.
THEIR_RACE = "[SSL] internal error"


class Server(NamedTuple):
    host: str
    certificate: Path
    key: str


def write_certificate(file: Path) -> None:
    """For 127.0.0.1, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fourstep tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    file.write_bytes(
        certificate.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    )


@pytest.fixture(scope="module")
def server(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tls")
    write_certificate(folder / "tls.pem")
    key, line = make_key("studio")
    (folder / "keys").write_text(line)
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    app = build_app(Replica(load_settings(values | {"api_keys_file": folder / "keys"})))
    config = uvicorn.Config(app, port=0, log_level="warning", ssl_certfile=str(folder / "tls.pem"))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    host, port = server.servers[0].sockets[0].getsockname()
    yield Server(f"{host}:{port}", folder / "tls.pem", key)
    server.should_exit = True
    thread.join()


def run(script: str, server: Server, messages: object = None) -> str:
    environment = os.environ | {
        "FAL_RUN_HOST": server.host, "FAL_KEY": server.key,
        "SSL_CERT_FILE": str(server.certificate),
    }  # fmt: skip
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, input=json.dumps(messages),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if THEIR_RACE not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


def talk(server: Server, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(CLIENT, server, messages).splitlines()]


def picture_of(answer: dict[str, Any]) -> Image.Image:
    (image,) = answer["images"]
    head, _, data = image["url"].partition(",")
    assert head == f"data:{image['content_type']};base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (image["width"], image["height"])
    return picture


def test_pictures_are_diffusers(server: Server, lcm_checkpoint: Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(png(PHOTO)).decode()}"
    edit = {"image_url": url, "strength": 0.7, "request_id": "mine"}
    drawn, edited = talk(server, ASKED, ASKED | edit)
    assert (edited["request_id"], edited["seed"], edited["num_inference_steps"]) == ("mine", 5, 3)
    wanted = {"num_steps": 3, "guidance_scale": 3.0, "seed": 5}
    peer = Peer(lcm_checkpoint)
    for answer, more in ((drawn, {}), (edited, {"image": PHOTO, "strength": 0.7})):
        pixels = np.asarray(picture_of(answer))
        assert psnr_db(pixels, peer.draw(recipe(**wanted | more)).pixels) >= 50


def test_sizes_have_fals_names(server: Server) -> None:
    size = {"width": 96, "height": 64}
    asked = {"prompt": "a red cube", "num_inference_steps": 1, "image_size": size}
    (answer,) = talk(server, asked)
    picture = picture_of(answer)
    assert (picture.size, picture.format) == ((96, 64), "JPEG")


def test_what_is_wrong_is_fals_error(server: Server) -> None:
    wrong = [
        ({"prompt": ""}, "prompt"), (ASKED | {"num_images": 2}, "num_images must be 1"),
        (ASKED | {"image_size": "big"}, 'image_size is "big"; use one of square_hd'),
        (ASKED | {"image_url": "https://elsewhere.example/cat.png"}, "image_url is neither"),
        (ASKED | {"strenght": 1}, "unknown field 'strenght'"),
    ]  # fmt: skip
    answers = talk(server, *(message for message, _ in wrong), ASKED)
    for (_, said), answer in zip(wrong, answers, strict=False):
        code, reason = answer["error"]
        assert code
        assert reason.startswith(said), reason
    assert answers[-1]["images"], "the session goes on"


def test_who_has_no_key_stays_out(server: Server) -> None:
    (answer,) = talk(server._replace(key="fs-wrong"), ASKED)
    assert "this API key is not known here" in answer["error"][1]


def test_the_pages_example_runs(server: Server) -> None:
    (example,) = re.findall(r"```python\n(# FAL_RUN.*?)```", PAGE.read_text(), re.DOTALL)
    assert run(example.replace("demo-lcm", "tiny-lcm"), server).startswith("data:image/jpeg;base64")
