"""What tests of the manifests need: a kubectl whose kustomize is new enough, the image, built, and
what is served from it.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.built_image import BuiltImage, built, what_is_missing
from tests.deploy.control_plane import ControlPlane
from tests.deploy.load import LINE
from tests.deploy.manifests import OVERLAYS, Object, kustomize_version, one, overlay


@pytest.fixture
def kubectl() -> None:
    if kustomize_version() < 5:
        pytest.skip("kubectl 1.27 or newer is needed (kustomize 5); Debian's 1.20 is too old")


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, kubectl: None) -> list[Object]:
    """All objects of an overlay, each in turn."""
    return overlay(request.param)


@pytest.fixture(scope="session")
def image() -> Iterator[BuiltImage]:
    """The CPU image, built once; of a folder in FOURSTEP_IMAGE_ROOT it stays there."""
    if missing := what_is_missing():
        pytest.skip(missing)
    temporary = Path(tempfile.mkdtemp(prefix="fourstep-image-", dir="/var/tmp"))
    try:
        yield built(temporary)
    finally:
        shutil.rmtree(temporary)


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A folder into which the image's user may look, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="fourstep-pods-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def local(image: BuiltImage, open_folder: Path) -> Iterator[ControlPlane]:
    """`local-cpu`, run by hand from the built image, serving: what its pods' tests share.

    As it is but for two delays that are minutes: before Serve stops a replica, before the
    autoscaler takes an idle pod away.
    """
    if kustomize_version() < 5:
        pytest.skip("kubectl 1.27 or newer is needed (kustomize 5)")
    objects = copy.deepcopy(overlay("local-cpu"))
    service = one(objects, "RayService")["spec"]
    config = yaml.safe_load(service["serveConfigV2"])
    config["applications"][0]["args"]["downscale_delay_s"] = 10
    service["serveConfigV2"] = yaml.safe_dump(config)
    service["rayClusterConfig"]["autoscalerOptions"]["idleTimeoutSeconds"] = 20
    folder = open_folder / "local-cpu"
    folder.mkdir()
    plane = ControlPlane(folder, image, objects, {"api-keys": f"{LINE}\n", "hub-token": ""})
    try:
        plane.start()
        plane.deploy()
        plane.wait(lambda: plane.workers and plane.workers[0].ready, "a worker that is ready")
        yield plane
    finally:
        plane.close()
