"""`fourstep live` and the protocol's page: its examples run as they stand, over a real socket."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from service.cli import app
from service.web.live.client import address_of
from tests.replicas import ReplicaProcess, replica_process, wait_until_ready

PAGE = Path(__file__).parents[4] / "service" / "web" / "live" / "README.md"
HERE = "http://127.0.0.1:8000"  # as the page has it


@pytest.fixture(scope="module")
def node(
    replica_settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReplicaProcess]:
    with replica_process(tmp_path_factory.mktemp("metrics"), **replica_settings) as node:
        wait_until_ready(node)
        yield node


def example(language: str, node: ReplicaProcess) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    text = found.replace(HERE, node.url).replace(HERE.replace("http", "ws"), f"ws{node.url[4:]}")
    return text.replace("128x128", "64x64")


def test_frames_of_a_folder_are_drawn(node: ReplicaProcess, tmp_path: Path) -> None:
    frames, out = tmp_path / "frames", tmp_path / "out"
    frames.mkdir()
    for index in range(3):
        grey = np.full((64, 64, 3), 80 * index, np.uint8)
        Image.fromarray(grey).save(frames / f"{index}.png")
    options = ["--url", node.url, "--frames", str(frames), "--out", str(out), "--fps", "5"]
    done = CliRunner().invoke(app, ["live", "a red cube", *options, "--seconds", "2"])
    assert done.exit_code == 0, done.output
    found = re.match(r"10 frames sent, (\d+) drawn", done.output)
    assert found is not None, done.output
    pictures = sorted(out.glob("*.jpg"))
    assert len(pictures) == int(found[1]) > 0
    with Image.open(pictures[0]) as image:
        assert image.size == (64, 64)


def test_a_replica_that_ends_says_come_back(
    replica_settings: dict[str, object], tmp_path: Path
) -> None:
    with replica_process(tmp_path, **replica_settings) as node:
        wait_until_ready(node)
        with connect(address_of(node.url)) as socket:
            socket.send(msgpack.packb({"type": "session.update", "prompt": "a cube"}))
            assert msgpack.unpackb(socket.recv())["type"] == "session"
            node.process.terminate()
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        node.process.wait(timeout=30)


def test_what_the_service_refuses_is_said(node: ReplicaProcess) -> None:
    done = CliRunner().invoke(app, ["live", "a cube", "--url", node.url, "--size", "63x64"])
    assert done.exit_code == 2
    assert "size is 63x64" in " ".join(done.output.replace("│", " ").split())


def test_the_python_example_runs(node: ReplicaProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-c", example("python", node)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "picture.jpg") as image:
        assert image.size == (64, 64)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node: apt-get install nodejs")
def test_the_javascript_example_runs(node: ReplicaProcess, tmp_path: Path) -> None:
    program = tmp_path / "draw.mjs"
    program.write_text(example("javascript", node))
    command = ["node", "--experimental-websocket", str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^a picture of \d+ bytes after \d+ ms$", done.stdout, re.MULTILINE)
