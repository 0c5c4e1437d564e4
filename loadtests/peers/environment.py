"""The Python that runs the peers: an environment of its own, over the project's.

BentoML pins versions of OpenTelemetry that Ray's exclude, so what the extra ``peers`` names is
installed beside the project's packages, not among them; all the rest is found there.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

import typer

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def pins(extra: str = "peers") -> list[str]:
    """An extra of pyproject.toml."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    return list(extras[extra])


def pin_of(extra: str, package: str) -> str:
    """One package's line of it."""
    return next(pin for pin in pins(extra) if pin.partition("==")[0] == package)


def ensure_python(cache_dir: Path, wanted: Sequence[str] = ()) -> Path:
    """The interpreter of the environment with pins, those of ``peers`` or what is wanted, made
    first where it is missing.

    Raises:
        RuntimeError: pip could not install them; its last line is in the message.
    """
    wanted = wanted or pins()
    key = hashlib.sha256("\n".join([sys.prefix, *wanted]).encode()).hexdigest()[:12]
    folder = cache_dir / f"peers-{key}"
    python, mark = folder / "bin" / "python", folder / "complete"
    if mark.exists():
        return python
    typer.echo(f"Installing {', '.join(wanted)} into {folder} ...", err=True)
    venv.create(folder, with_pip=True, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    beside = folder / "lib" / version / "site-packages" / "zz-project.pth"  # after its own
    beside.write_text(sysconfig.get_path("purelib") + "\n")
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"the peers could not be installed: {last}")
    mark.touch()
    return python
