"""What a test of the manifests needs: a kubectl whose kustomize is new enough."""

from __future__ import annotations

import pytest

from tests.deploy.manifests import OVERLAYS, Object, kustomize_version, overlay


@pytest.fixture
def kubectl() -> None:
    if kustomize_version() < 5:
        pytest.skip("kubectl 1.27 or newer is needed (kustomize 5); Debian's 1.20 is too old")


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, kubectl: None) -> list[Object]:
    """All objects of an overlay, each in turn."""
    return overlay(request.param)
