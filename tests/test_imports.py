"""The import graph: dependencies run one way, and each heavy library has one home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {  # top-level package → the only modules that may import it
    "ray": {"service/deployment.py", "service/serve.py", "service/serve_config.py"},
    "prometheus_client": {"service/metrics.py"},
    "opentelemetry": {"service/tracing.py"},
    "onnxruntime": {"engines/backends/onnxruntime_engine.py"},
}
FORBIDDEN = {  # module prefix → what it must not import
    "engines/": {"service", "ray", "fastapi", "prometheus_client"},
    "service/scheduler.py": {"torch", "numpy", "asyncio", "time", "threading"},
    "engines/stage.py": {"torch"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    "path", [*ROOT.glob("engines/**/*.py"), *ROOT.glob("service/**/*.py")], ids=str
)
def test_imports(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = imported(path)
    for prefix, forbidden in FORBIDDEN.items():
        if name.startswith(prefix):
            assert not found & forbidden
    for library, homes in HOMES.items():
        assert library not in found or name in homes
    if name != "service/settings.py":
        source = path.read_text()
        assert "os.environ.get" not in source
        assert "os.getenv" not in source


def test_files_stay_small() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): count
        for path in [*ROOT.glob("engines/**/*.py"), *ROOT.glob("service/**/*.py")]
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}
