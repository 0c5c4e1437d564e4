"""What tests of the manifests need: a kubectl whose kustomize is new enough, the image, built."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.built_image import BuiltImage, built, what_is_missing
from tests.deploy.manifests import OVERLAYS, Object, kustomize_version, overlay


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
