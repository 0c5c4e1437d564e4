"""A process that builds a bundle with an exporter of the test's making: instant files, no torch.

    python -m tests.engines.build_slowly CHECKPOINT CACHE SECONDS_PER_PART

Each exported part's name goes to stdout; the last line is the bundle's folder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import engines.build.export
from engines.build.bundle import Blueprint, ensure_bundle
from engines.families.part import Part


def main(checkpoint: str, cache: str, delay_s: str) -> None:
    def export_onnx(part: Part, path: Path, graphs: Path | None) -> None:
        path.write_bytes(b"half")
        print(part.name, flush=True)
        time.sleep(float(delay_s))
        path.write_bytes(part.name.encode())

    engines.build.export.export_onnx = export_onnx
    bundle = ensure_bundle(Blueprint(Path(checkpoint)), Path(cache), lambda *_: None)
    print(bundle.folder, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
