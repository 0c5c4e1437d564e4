"""A bundle: a model's folder of compiled parts, with a manifest that says what it is made of.

    manifest.json   format, key, source hash, precision, versions, facts, files with size and hash
    tokenizer.json  for the `tokenizers` library: serving needs neither transformers nor diffusers
    <part>.onnx, <part>.onnx.data
    <part>.plan     where it was built for TensorRT

Nothing stale or damaged is used: the key covers all that the files depend on, every file is
checked against its hash when a bundle is opened, and a folder appears under its name only whole.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from engines.build.checkpoint import (
    described_in,
    latent_scale,
    load_facts,
    load_pipeline,
    pipeline_class,
    tokenizer_of,
)
from engines.build.plan import PlanTarget, check_target, compile_plan, import_tensorrt
from engines.build.profiles import profiles_of
from engines.build.source import NO_OVERRIDES, Overrides, fingerprint, name_of
from engines.errors import BuildError, BundleError
from engines.facts import EIGHT_BITS, OWN_DEFAULTS, Defaults, Facts
from engines.families.tiles import check_tile
from engines.loras.file import ADAPTER_CONFIG
from engines.samplers.defaults import with_defaults

if TYPE_CHECKING:
    from engines.families.part import Part

FORMAT = 1
FP8_FROM = 89  # compute capability
MANIFEST = "manifest.json"
BUILT_WITH = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
# Puts the parts in a folder into 8 bits, of a kind (of plans, or none); what the manifest says of
# them. It draws: passed in.
Quantise = Callable[[Path, Facts, Progress, str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened and verified bundle."""

    folder: Path
    manifest: dict[str, Any]
    facts: Facts

    @property
    def precision(self) -> str:
        return str(self.manifest["precision"])

    def part(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    def tokenizer(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


@dataclass(frozen=True)
class Blueprint:
    """What a bundle is to be made of: equal blueprints make equal bundles."""

    source: Path  # a diffusers folder or single file
    precision: str = "fp32"
    target: PlanTarget | None = None  # compile plans for it too
    loras: tuple[tuple[Path, float], ...] = ()  # fused into the weights, each with its λ
    defaults: Defaults = OWN_DEFAULTS
    overrides: Overrides = NO_OVERRIDES

    @functools.cached_property
    def source_hash(self) -> str:
        return fingerprint(self.source)

    @functools.cached_property
    def beside(self) -> dict[str, tuple[str, str]]:
        """Name and hash of what is read beside the source, by what it is of it."""
        paths = dict(self.overrides.components)
        if self.source.is_file():
            paths["architecture"] = described_in(self.source, self.overrides)
        paths |= {f"embedding {word}": path for word, path in self.overrides.embeddings.items()}
        return {what: (name_of(path), fingerprint(path)) for what, path in paths.items()}

    @functools.cached_property
    def key(self) -> str:
        """Of all that the contents depend on, as 16 hex digits."""
        lines = [str(FORMAT), self.source_hash, self.precision, _toolchain()]
        lines += [f"{fingerprint(path)} {weight}" for path, weight in self.loras]
        beside = [path.with_name(ADAPTER_CONFIG) for path, _ in self.loras if path.is_file()]
        lines += [fingerprint(config) for config in beside if config.is_file()]
        lines += [str(self.defaults)]
        lines += [f"{name}={value!r}" for name, value in sorted(self.overrides.scheduler.items())]
        lines += ["t5_int8"] * self.overrides.t5_int8
        lines += [f"{what} {digest}" for what, (_, digest) in sorted(self.beside.items())]
        if self.target:
            lines += [str(self.target), str(import_tensorrt(self.target.engine).__version__)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _toolchain() -> str:
    """Of all code that makes the graphs, as 16 hex digits: an edit there makes other bundles."""
    here = Path(__file__).parents[1]
    names = ("explicit", "export", "int8_linear", "plan", "quantising", "structure", "t5")
    own = [*(here / "build" / f"{name}.py" for name in names), here / "drawing" / "calibrating.py"]
    rooms = [here / name for name in ("families", "loras")]
    files = [*own, *(file for room in rooms for file in sorted(room.glob("*.py")))]
    versions = [f"{name}={importlib.metadata.version(name)}".encode() for name in BUILT_WITH]
    parts = [*versions, *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def open_bundle(folder: Path) -> Bundle:
    """Read and verify a bundle.

    Raises:
        BundleError: no manifest, another format, a missing or altered file.
    """
    way_out = f"rebuild it with: fourstep build MODEL --out {folder}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} has no readable {MANIFEST} ({error}); {way_out}") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{folder / MANIFEST} is not a bundle's; {way_out}")
    if manifest.get("format") != FORMAT:
        raise BundleError(
            f"{folder} has bundle format {manifest.get('format')!r}, this version reads {FORMAT}; "
            f"{way_out}"
        )
    try:
        facts = Facts.from_json(manifest["facts"])
        files = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{folder / MANIFEST} is not a bundle's ({error!r}); {way_out}"
        ) from error
    for name, (num_bytes, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing; {way_out}")
        if path.stat().st_size != num_bytes or _sha256(path) != digest:
            raise BundleError(f"{path} is not what the manifest says it is (damaged?); {way_out}")
    return Bundle(folder, manifest, facts)


def ensure_bundle(
    blueprint: Blueprint, cache_dir: Path, progress: Progress, quantise: Quantise | None = None
) -> Bundle:
    """The bundle of a blueprint from the cache, built first where it is not there.

    Two processes asking at once build once: the second waits and opens. A damaged cache entry is
    built again. The lock is held to build alone: many that open one bundle read it side by side.
    """
    folder = folder_of(blueprint, cache_dir)
    if (found := _whole(folder)) is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (found := _whole(folder)) is not None:
            return found
        _build(blueprint, folder, progress, cache_dir / "graphs", quantise)
    return open_bundle(folder)


def _whole(folder: Path) -> Bundle | None:
    """The bundle of a folder; None where there is none, or a damaged one that is being replaced."""
    try:
        return open_bundle(folder) if is_bundle(folder) else None
    except (BundleError, OSError):
        return None


def folder_of(blueprint: Blueprint, cache_dir: Path) -> Path:
    """Where the cache has, or will have, a blueprint's bundle."""
    name = name_of(blueprint.source).rpartition("/")[2]
    return cache_dir / "bundles" / f"{name}-{blueprint.precision}-{blueprint.key}"


def build_bundle(
    blueprint: Blueprint,
    folder: Path,
    progress: Progress,
    cache_dir: Path | None = None,
    quantise: Quantise | None = None,
) -> Bundle:
    """Build into ``folder``, which must be absent, empty, or an older bundle (then replaced).

    ``cache_dir`` is where graphs are kept for other checkpoints of the same structure.
    """
    if folder.exists() and any(folder.iterdir()) and not is_bundle(folder):
        raise BundleError(f"{folder} exists and is not a bundle; choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        graphs = None if cache_dir is None else cache_dir / "graphs"
        _build(blueprint, folder, progress, graphs, quantise)
    return open_bundle(folder)


def _build(
    blueprint: Blueprint,
    folder: Path,
    progress: Progress,
    graphs: Path | None,
    quantise: Quantise | None,
) -> None:
    """Build in ``<folder>.partial`` and rename. Parts finished by a killed build are kept."""
    _refuse(blueprint, quantise)
    source, target, overrides = blueprint.source, blueprint.target, blueprint.overrides
    progress(f"loading {name_of(source)}", 0, 5)
    from engines.families import family_named
    from engines.loras.fusing import fuse

    partial = folder.with_name(f"{folder.name}.{blueprint.key}.partial")
    for older in folder.parent.glob(f"{folder.name}.*.partial"):
        if older != partial:  # of another checkpoint or other versions, and nobody holds the lock
            shutil.rmtree(older)
    partial.mkdir(exist_ok=True)
    in_8_bits = blueprint.precision in EIGHT_BITS
    precision = "fp16" if target and in_8_bits else blueprint.precision  # what is left of plans
    pipeline = load_pipeline(source, precision, overrides)
    facts = with_defaults(load_facts(source, pipeline, overrides), blueprint.defaults)
    if target:
        target = target.settled(facts)
        check_target(target, facts)
    parts = family_named(facts.family).parts(pipeline, facts)
    fuse(parts, blueprint.loras, facts.name)
    num_pieces = len(parts) * (2 if target else 1) + 1
    _export(parts, partial, graphs, lambda what, done: progress(what, done, num_pieces))
    for window in facts.windows:
        file = partial / f"{window.tokenizer}.json"
        tokenizer_of(pipeline, window.tokenizer).save(str(file))
    about: dict[str, Any] = {}  # what the manifest says of some bundles alone
    if quantise and in_8_bits:
        for mark in partial.glob("*.done"):  # a killed build exports and compiles them anew
            mark.unlink()
        kind = blueprint.precision if target else ""
        about["quantised"] = quantise(partial, facts, progress, kind)
    if target:
        about["plans"] = _compile(parts, facts, target, partial, progress)
    progress("writing the manifest", num_pieces - 1, num_pieces)
    for mark in partial.glob("*.done"):
        mark.unlink()
    manifest = _manifest(blueprint, facts, partial) | about
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    progress("done", num_pieces, num_pieces)


def _refuse(blueprint: Blueprint, quantise: Quantise | None) -> None:
    """Raise for what cannot be built, before anything heavy is imported."""
    source, target, precision = blueprint.source, blueprint.target, blueprint.precision
    pipeline_class(described_in(source, blueprint.overrides))
    if precision in EIGHT_BITS and quantise is None:
        raise BundleError(
            f"{name_of(source)} is not built in 8 bits yet, and is not while it is loaded; "
            f"fourstep build MODEL --precision {precision} --out DIR makes a bundle to serve"
        )
    if target is None:
        return
    if precision in EIGHT_BITS and (target.refit or target.strip):
        raise BuildError(
            f"precision {precision!r} leaves no weights that --refit, --strip or LoRAs could "
            "replace: leave those out, fuse LoRAs by fourstep build --lora, or build in fp16"
        )
    old = [sm for sm in target.compute_capabilities if sm < FP8_FROM]
    if precision == "fp8" and old:
        raise BuildError(
            f"compute capability {', '.join(map(str, old))} has no fp8, which begins with "
            f"{FP8_FROM}: build in int8 or fp16 for it"
        )
    if scale := target.tile_px and latent_scale(source, blueprint.overrides):
        check_tile(target.tile_px, scale)


def _export(
    parts: list[Part], folder: Path, graphs: Path | None, progress: Callable[[str, int], None]
) -> None:
    """Each part as ONNX in ``folder``, but those that are done."""
    from engines.build.export import export_onnx

    own = None if graphs is None else graphs / _toolchain()
    for index, part in enumerate(parts):
        progress(f"exporting {part.name}", index)
        done = folder / f"{part.name}.done"
        if not done.exists():
            for half_written in folder.glob(f"{part.name}.onnx*"):
                half_written.unlink()
            export_onnx(part, folder / f"{part.name}.onnx", own)
            done.touch()


def _manifest(blueprint: Blueprint, facts: Facts, folder: Path) -> dict[str, Any]:
    """What every bundle says of itself and of the files that ``folder`` has."""
    from engines.build.export import OPSET

    return {
        "format": FORMAT,
        "key": blueprint.key,
        "source": {"name": name_of(blueprint.source), "sha256": blueprint.source_hash},
        "beside": {
            what: {"name": name, "sha256": digest}
            for what, (name, digest) in blueprint.beside.items()
        },
        "loras": [{"name": path.name, "weight": weight} for path, weight in blueprint.loras],
        "precision": blueprint.precision,
        "opset": OPSET,
        "built_with": {name: importlib.metadata.version(name) for name in BUILT_WITH},
        "facts": facts.to_json(),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(folder.iterdir())
        },
    }


def _compile(
    parts: list[Part], facts: Facts, target: PlanTarget, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Compile each part's ONNX in ``folder`` to a plan; what the manifest says of them."""
    version = str(import_tensorrt(target.engine).__version__)
    # Beside the bundle, where the next build finds it too.
    cache = folder.parent / f"{target.engine}-{version}.timing-cache"
    num_pieces = 2 * len(parts) + 1
    reports = {}
    for index, part in enumerate(parts, start=len(parts)):
        done = folder / f"{part.name}.plan.done"
        if not done.exists():
            report = compile_plan(
                folder / f"{part.name}.onnx",
                folder / f"{part.name}.plan",
                profiles_of(part, target, facts),
                target,
                timing_cache=cache,
                steps=lambda step, total, part=part, index=index: progress(  # type: ignore[misc]
                    f"compiling {part.name}, phase {step} of {total}", index, num_pieces
                ),
            )
            done.write_text(json.dumps(dataclasses.asdict(report)))
        reports[part.name] = json.loads(done.read_text())
    return {"target": dataclasses.asdict(target), "version": version, "parts": reports}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
