"""`python -m loadtests.gpu.wheels OUT`: what a bare GPU machine lacks, to be carried to it.

Bare means Python 3.12 on Linux with torch and its usual company (diffusers' needs but not
diffusers, aiohttp, onnx, pytest: `PRESENT`) and no network. Wheels come at the versions that
deploy/constraints.txt pins, into numbered folders that are small enough for one transfer each; a
wheel too large for one is split. `install.sh`, in the first folder, puts them together again.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from loadtests.report import ROOT

MIB = 2**20
PRESENT = (  # of what this project installs: the usual company of torch
    "accelerate", "aiofiles", "aiohappyeyeballs", "aiohttp", "aiosignal", "annotated-doc", "anyio",
    "attrs", "certifi", "charset-normalizer", "click", "contourpy", "cycler", "execnet", "filelock",
    "fonttools", "frozenlist", "fsspec", "grpcio", "h11", "hf-xet", "httpcore", "httpx",
    "huggingface-hub", "hypothesis", "idna", "iniconfig", "jinja2", "kiwisolver", "markdown-it-py",
    "markupsafe", "matplotlib", "mdurl", "ml-dtypes", "mpmath", "msgpack", "multidict", "networkx",
    "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "packaging", "peft", "pillow", "pip",
    "pluggy", "prometheus-client", "propcache", "protobuf", "psutil", "pygments", "pyparsing",
    "pytest", "pytest-xdist", "python-dateutil", "pyyaml", "regex", "requests", "rich",
    "safetensors", "sentencepiece", "setuptools", "shellingham", "six", "sortedcontainers", "sympy",
    "tokenizers", "torch", "tqdm", "transformers", "triton", "typer", "typing-extensions",
    "urllib3", "uvloop", "wrapt", "yarl", "zipp",
)  # fmt: skip
NEEDED = (
    "diffusers", "importlib_metadata",  # the engine; what follows is the service's
    "fastapi", "fastapi-offline", "starlette", "uvicorn", "pydantic", "pydantic_core",
    "pydantic-settings", "typing-inspection", "annotated-types", "python-dotenv",
    "python-multipart", "orjson", "opentelemetry-api", "httpx2", "httpcore2", "truststore",
    "websockets",
)  # fmt: skip
RAY = (
    "ray", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py",
    "grpcio-reflection",
)  # fmt: skip
RTX_SOURCES = ("tensorrt_rtx", "tensorrt_rtx_cu13")  # published as sources alone
RTX = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # of manylinux_2_N: pip wants each by its name
INSTALL = """\
#!/bin/bash
# bash {first}/install.sh SITE: installs into the folder SITE what the numbered folders carry.
set -euo pipefail
site=$(realpath -m "$1")
cd "$(dirname "$0")/.."
joined=$(mktemp -d)
for part in */*.part00; do
  [ -e "$part" ] || break
  name=$(basename "$part" .part00)
  cat $(ls */"$name".part* | sort -t/ -k2) > "$joined/$name"
done
cp */*.whl "$joined"
(cd "$joined" && sha256sum --check --quiet --ignore-missing "$OLDPWD/{first}/SHA256SUMS")
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$joined"/*.whl
rm -r "$joined"
"""
README = """\
# What a bare GPU machine needs to run `python -m loadtests gpu`

Made for Python 3.12 on x86-64 Linux with torch installed. Copy the repository there, and the
numbered folders side by side (in as many transfers as it takes; `01` alone will do without the
extras), then in the repository:

```sh
bash WHEELS/{first}/install.sh /tmp/site
PYTHONPATH=/tmp/site:. python3 -m loadtests gpu --minutes 8 --out /tmp/gpu
```

{folders}
"""


def wheels(
    out: Annotated[Path, typer.Argument(help="Folder, made anew or empty.")],
    ray: Annotated[bool, typer.Option("--ray", help="Ray as well.")] = False,
    tensorrt_rtx: Annotated[
        bool, typer.Option("--tensorrt-rtx", help="TensorRT-RTX as well (NVIDIA's licence).")
    ] = False,
    mib: Annotated[int, typer.Option(min=1, max=1024, help="Of a folder, at most.")] = 60,
) -> None:
    """Collect wheels into numbered folders, with a README of the commands."""
    if out.exists() and any(out.iterdir()):
        raise typer.BadParameter(f"OUT is {out}, which is not empty; name a folder of its own")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder)
        download([*NEEDED, *(RAY if ray else ()), *(RTX if tensorrt_rtx else ())], found)
        if tensorrt_rtx:
            build(RTX_SOURCES, found)
        pack(sorted(found.glob("*.whl")), out, mib * MIB)
    typer.echo((out / "README.md").read_text())


def pinned(names: Iterable[str]) -> list[str]:
    """Requirements at the versions of deploy/constraints.txt.

    Raises:
        KeyError: a name that is not pinned there.
    """
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pins = {normal(line.partition("==")[0]): line for line in lines if "==" in line}
    return [pins[normal(name)] for name in names]


def normal(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def download(names: Sequence[str], folder: Path) -> None:
    """By pip, for Python 3.12 on x86-64 Linux, whatever runs here."""
    tags = [f"manylinux_2_{version}_x86_64" for version in GLIBC] + ["manylinux2014_x86_64"]
    platforms = [option for tag in tags for option in ("--platform", tag)]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    _pip(["download", "--no-deps", *target, *platforms, "--dest", str(folder), *pinned(names)])


def build(names: Sequence[str], folder: Path) -> None:
    """Wheels of packages that are published as sources."""
    _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), *pinned(names)])


def _pip(arguments: list[str]) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *arguments, *quiet], check=True)


def pack(files: Sequence[Path], out: Path, max_bytes: int) -> None:
    """Files into ``out/01``, ``out/02`` …, none above ``max_bytes``; larger files in parts.

    The smallest come first: the first folder alone has all that is needed.

    Raises:
        ValueError: the limit leaves no room for the scripts.
    """
    sums = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    extra = {"SHA256SUMS": sums, "install.sh": INSTALL.replace("{first}", "01")}
    room = max_bytes - sum(len(text.encode()) for text in extra.values())
    if room <= 0:
        raise ValueError(f"{max_bytes} bytes a folder leave no room for the scripts")
    sizes: list[int] = []  # of the folders so far
    for file in sorted(files, key=lambda file: file.stat().st_size):
        with file.open("rb") as source:
            size = file.stat().st_size
            for index in range(-(-size // room)):
                part = source.read(room)
                name = file.name if size <= room else f"{file.name}.part{index:02}"
                number = next((i for i, n in enumerate(sizes) if n + len(part) <= room), len(sizes))
                sizes += [0] * (number == len(sizes))
                sizes[number] += len(part)
                folder = out / f"{number + 1:02}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(part)
    for name, text in extra.items():
        (out / "01" / name).write_text(text)
    listed = [f"- `{i + 1:02}`: {size / MIB:.1f} MiB" for i, size in enumerate(sizes)]
    text = README.replace("{first}", "01").replace("{folders}", "\n".join(listed))
    (out / "README.md").write_text(text)


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


if __name__ == "__main__":
    typer.run(wheels)
