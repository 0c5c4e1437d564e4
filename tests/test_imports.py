"""The import graph: rooms stand on floors, nothing looks up, each heavy library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = [*ROOT.glob("engines/**/*.py"), *ROOT.glob("service/**/*.py")]
FLOORS = (  # from the top: a room imports from its own floor's room and from those below
    "service/cli",
    "service/ray_serve",
    "service/web",
    "service/replica",
    "service/telemetry",
    "service/batching",
    "service/access",
    "service/settings",
    "service/errors",
    "engines/cli",
    "engines/options",
    "engines/drawing",
    "engines/backends",
    "engines/build",
    "engines/loras",
    "engines/families",
    "engines/samplers",
    "engines/distill",
    "engines/motion_unet",
    "engines/order",
    "engines/facts",
    "engines/errors",
)
HOMES = {  # top-level package → the only modules that may import it
    "ray": {
        f"service/ray_serve/{name}.py"
        for name in ("deployment", "node", "output", "serve", "serve_config", "stop")
    },
    "prometheus_client": {"service/telemetry/metrics.py"},
    "opentelemetry": {"service/telemetry/tracing.py"},
    "onnxruntime": {"engines/backends/onnxruntime_engine.py"},
    "openvino": {"engines/backends/openvino_engine.py"},
}
FORBIDDEN = {  # path prefix → what it must not import
    "engines/": {"service", "ray", "fastapi", "prometheus_client"},
    "service/batching/scheduler.py": {"torch", "numpy", "asyncio", "time", "threading"},
    "engines/drawing/stage.py": {"torch"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in names if file_of(name)] or [node.module]


def imports_at_runtime(path: Path) -> set[str]:
    """Files of ours that it imports, those inside functions too, those for types alone not."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return set(ours(imported(tree)))


def file_of(module: str) -> Path | None:
    """Of ours, a package's or a module's."""
    path = ROOT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next(
        (f for f in files if module.startswith(("engines", "service")) and f.is_file()), None
    )


def ours(modules: Iterator[str]) -> Iterator[str]:
    yield from (name_of(file) for module in modules if (file := file_of(module)))


def room_of(name: str) -> str:
    """The first two parts: a folder, or a file at a package's root."""
    return "/".join(name.removesuffix(".py").split("/")[:2])


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_imports(path: Path) -> None:
    name, source = name_of(path), path.read_text()
    found = {module.split(".")[0] for module in imported(ast.parse(source))}
    for prefix, forbidden in FORBIDDEN.items():
        if name.startswith(prefix):
            assert not found & forbidden
    for library, homes in HOMES.items():
        assert library not in found or name in homes
    if name != "service/settings.py":
        assert "os.environ.get" not in source
        assert "os.getenv" not in source


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_nothing_is_imported_from_a_room_above(path: Path) -> None:
    floor = {room: index for index, room in enumerate(FLOORS)}
    room = room_of(name_of(path))
    if room.endswith("__init__"):
        assert not list(ours(imported(ast.parse(path.read_text()))))
        return
    others = {room_of(name) for name in ours(imported(ast.parse(path.read_text())))}
    above = {other for other in others if floor.get(other, len(FLOORS)) < floor[room]}
    assert not above


def test_no_import_runs_in_a_circle() -> None:
    graph = {name_of(path): imports_at_runtime(path) for path in PATHS}
    while leaves := [name for name, others in graph.items() if not others & graph.keys() - {name}]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_every_room_says_what_it_owns() -> None:
    for file in (path for path in PATHS if path.name == "__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), name_of(file)


def test_files_stay_small() -> None:
    counts = {name_of(path): len(path.read_text().splitlines()) for path in PATHS}
    assert {name: count for name, count in counts.items() if count > 400} == {}
