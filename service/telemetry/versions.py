"""The version of an installed package; one that runs from its source folder has none."""

from __future__ import annotations

import importlib.metadata


def version_of(package: str) -> str:
    """``absent`` where no metadata of ``package`` are installed here."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
