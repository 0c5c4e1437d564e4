"""The CPU image, really built, serving from its own root file system.

    python -m pytest -m slow tests/deploy/test_image_built.py

Root, buildah, debootstrap and bubblewrap are needed, and 20 GiB of disk for some minutes. With
FOURSTEP_IMAGE_ROOT=FOLDER the image stays there, and the next run takes it from there.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.built_image import USER, BuiltImage
from tests.deploy.container import PATIENCE, TOOLS, Container
from tests.deploy.kuberay import Object
from tests.deploy.pod_network import PodNetwork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in TOOLS),
        reason=f"apt install bubblewrap nftables iproute2: {', '.join(TOOLS)} are needed",
    ),
]
DEADLINE_S = 900  # a machine that others use; alone it takes two minutes
UNPRIVILEGED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@pytest.fixture
def container(image: BuiltImage, open_folder: Path) -> Iterator[Container]:
    """`docker run --read-only --tmpfs /tmp -v cache:/var/cache/fourstep ... --allow-anonymous`."""
    network = PodNetwork([])
    network.add("image", {"namespace": "fourstep", "labels": {}})
    mounts = {}
    for path in ("/tmp", "/var/cache/fourstep", "/dev/shm"):
        here = open_folder / "image" / path.strip("/")
        here.mkdir(parents=True)
        here.chmod(0o777)
        mounts[path] = (here, False)
    spec = {"name": "image", "securityContext": UNPRIVILEGED,
            "args": [*image.config["Cmd"], "--allow-anonymous"]}  # fmt: skip
    made = Container(
        image, spec, network=network.path("image"), host_name="image", environment=PATIENCE,
        log=open_folder / "image.log", mounts=mounts,
    )  # fmt: skip
    try:
        yield made
    finally:
        made.signal(signal.SIGKILL)
        if made.num_starts:
            made.wait(10)
        network.close()


def test_it_is_what_the_recipe_says(image: BuiltImage) -> None:
    assert image.config["User"] == f"{USER}:{USER}"
    assert image.config["Entrypoint"] == ["tini", "--"]
    assert image.config["Labels"]["org.opencontainers.image.title"] == "fourstep"
    assert image.size_bytes < 2.5e9, f"{image.size_bytes / 1e9:.2f} GB in {image.build_s:.0f} s"
    packages = image.root / "opt" / "fourstep" / "lib"
    names = {each.name.partition("-")[0].lower() for each in packages.glob("*/*/*.dist-info")}
    assert {"fourstep", "ray", "torch", "onnxruntime"} <= names
    assert not names & {"pip", "setuptools_scm", "pytest"}
    assert not list(packages.glob("*/*/nvidia")), "CUDA's libraries are the other image's"
    owned = subprocess.run(
        ["find", image.root / "opt", "-user", str(USER), "-print", "-quit"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert owned.stdout == "", "who serves may change nothing of what is served"


def test_it_serves_from_its_own_root_as_its_own_user(
    image: BuiltImage, container: Container
) -> None:
    begin = time.monotonic()
    container.start()
    check = image.config["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    while container.run(check[1:]).returncode:
        assert container.running, container.said()
        assert time.monotonic() - begin < DEADLINE_S, container.said()
        time.sleep(1)
    # From inside: its own loopback, by the Python that it has.
    ask = (
        "import json, sys, urllib.request as r;"
        "q = r.Request('http://127.0.0.1:8000/v1/images/generations',"
        "json.dumps({'prompt': 'a large red star', 'seed': 7}).encode(),"
        "{'Content-Type': 'application/json', 'Accept': 'image/png'});"
        "sys.stdout.write(r.urlopen(q, timeout=120).read(8).hex())"
    )
    assert container.run(["python", "-c", ask], timeout_s=180).stdout == "89504e470d0a1a0a"
    assert container.run(["sh", "-c", "id -u; touch /opt/x"]).stdout.split() == [str(USER)]
    container.signal(signal.SIGTERM)
    assert container.wait(60) == 0, container.said()[-3000:]
