"""Finding, hashing and loading a source model: a folder, a shipped name, or a hub id.

Only safetensors are read and no code from a checkpoint runs. Importing this module is cheap;
torch, transformers and diffusers load when `load_pipeline` is called.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import CheckpointError, reason_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from engines.facts import Facts

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEMO_MODELS = Path(__file__).parents[1] / "demo"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # their folders may be absent
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
# `model.safetensors`, and with a variant's name or a shard's number, in either order.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?"
    r"\.safetensors"
)


def resolve(model: str) -> Path | None:
    """The local folder of a model, or None when only the hub can know it.

    Raises:
        CheckpointError: it looks like a path or a shipped name, and there is nothing there, or one
            file with everything in it.
    """
    for folder in (Path(model).expanduser(), DEMO_MODELS / model):
        if folder.is_dir():
            return folder
    if Path(model).expanduser().is_file() or model.endswith(SINGLE_FILES):
        raise CheckpointError(
            f"model {model!r} is a single file, only diffusers folders are served; make one with: "
            'python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_single_file({model!r}).save_pretrained('FOLDER')\""
        )
    if "/" not in model or model.startswith((".", "/", "~")):
        names = sorted(path.parent.name for path in DEMO_MODELS.glob("*/model_index.json"))
        shipped = ", ".join(names) or "none"
        raise CheckpointError(
            f"model {model!r} is neither a folder nor a shipped model ({shipped}); "
            "give a diffusers folder, a bundle, or a hub id like owner/name"
        )
    return None


def download(hub_id: str) -> Path:
    """Fetch a hub model's folder (safetensors and configs only) into the hub's own cache."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise CheckpointError(
            f"model {hub_id!r} cannot be fetched from the hub: {reason_of(error)}; "
            "check the name and the network, or give a local folder"
        ) from error


def name_of(folder: Path) -> str:
    """What users call the model: the folder's name, or ``owner/name`` of a hub snapshot."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def pipeline_class(folder: Path) -> str:
    """The diffusers class named in ``model_index.json``.

    Raises:
        CheckpointError: there is no such file, or it names none.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} has no model_index.json: it is not a diffusers folder")
    name = _read_json(index).get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{index} has the _class_name {name!r}; it must be the name of a diffusers pipeline"
        )
    return name


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {reason_of(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds {values!r:.40}; it must be a JSON object")
    return values


def fingerprint(source: Path) -> str:
    """SHA-256 over names and contents of every file that loading can read of a folder or file."""
    digest = hashlib.sha256()
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".txt", ".model") and path.is_file():
            digest.update(f"{path.relative_to(source)}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_pipeline(folder: Path, precision: str) -> Any:
    """The diffusers pipeline with weights in ``fp32``, ``fp16`` or ``bf16``, on the CPU.

    Raises:
        CheckpointError: a component is of a class that its family does not know, its weights are
            pickled, or diffusers cannot load it.
    """
    import diffusers
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from engines.families import family_of

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    name = pipeline_class(folder)
    known = family_of(name).COMPONENTS
    _check_components(folder, known)
    unsafe = [path.name for path in folder.rglob("*.bin")]
    if unsafe and not list(folder.rglob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds pickled weights ({unsafe[0]}); only safetensors are read, convert it "
            "with diffusers' save_pretrained(safe_serialization=True)"
        )
    try:
        foreign = _foreign_scheduler(folder)
        pipeline = getattr(diffusers, name).from_pretrained(
            folder,
            dtype=getattr(torch, DTYPES[precision]),
            use_safetensors=True,
            local_files_only=True,
            variant=_variant(folder, known),
            requires_safety_checker=False,
            **dict.fromkeys(UNUSED),
            **({"scheduler": None} if foreign else {}),
        )
    except Exception as error:  # diffusers raises many kinds; all mean the same here
        raise CheckpointError(
            f"{folder} cannot be loaded by diffusers: {reason_of(error)}"
        ) from error
    if foreign:
        scheduler = diffusers.DDIMScheduler.from_config(foreign | {"_class_name": "DDIMScheduler"})
        scheduler.register_to_config(_class_name=foreign["_class_name"])
        pipeline.register_modules(scheduler=scheduler)
    return pipeline


def _foreign_scheduler(folder: Path) -> dict[str, Any] | None:
    """The scheduler's options where its class is not in diffusers, or wants a package besides."""
    import diffusers
    from diffusers.utils.import_utils import DummyObject

    _, name = _read_json(folder / "model_index.json").get("scheduler", (None, None))
    file = folder / "scheduler" / "scheduler_config.json"
    found = getattr(diffusers, str(name), None)
    if name is None or not file.is_file() or (found and not isinstance(found, DummyObject)):
        return None
    return {**_read_json(file), "_class_name": name}


def _check_components(folder: Path, known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise CheckpointError where a component is of a class that nothing here can run.

    ``known`` has the classes of each. What diffusers would load by one class and was saved by
    another loads too, with weights of nobody.
    """
    index = _read_json(folder / "model_index.json")
    if index.get("requires_aesthetics_score"):
        raise CheckpointError(
            f"{folder} is a refiner of SDXL, which only finishes what a base model began; serve "
            "the base model, which draws without one"
        )
    for name, classes in known.items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in classes:
            raise CheckpointError(
                f"{folder} has {found!r} as its {name}; known are {', '.join(classes)}: put one of "
                "them in its place with diffusers' save_pretrained"
            )
        config = folder / name / "config.json"
        saved = _read_json(config).get("_class_name", found) if config.is_file() else found
        if saved != found:
            raise CheckpointError(
                f"{folder / 'model_index.json'} calls the {name} {found}, {config} calls it "
                f"{saved}; make the first say what the weights are"
            )


def _variant(folder: Path, components: Iterable[str]) -> str | None:
    """The variant of the weights, where a component has them in no other form.

    diffusers takes it then for each component that has it, and plain weights for the others.
    """
    alone = []
    for name in components:
        files = [path.name for path in (folder / name).glob("*.safetensors")]
        found = {match["variant"] for file in files if (match := WEIGHTS.fullmatch(file))}
        if found and None not in found:
            alone.append(found)
    if not alone:
        return None
    shared = set.intersection(*alone)
    if not shared:
        listed = ", ".join(sorted(set().union(*alone)))
        raise CheckpointError(
            f"{folder} has its components in different variants ({listed}); save them in one"
        )
    return "fp16" if "fp16" in shared else min(shared)


def whole(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that neither cuts nor fills up, as one saved after use would by itself.

    What a window has no room for is then counted, see `engines.drawing.model.Model.tokenize`.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_of(pipeline: Any, name: str = "tokenizer") -> Tokenizer:
    """A pipeline's of that name, for the `tokenizers` library."""
    from tokenizers import Tokenizer

    return whole(Tokenizer.from_str(getattr(pipeline, name).backend_tokenizer.to_str()))


def load_facts(folder: Path, pipeline: Any) -> Facts:
    """What the pipeline's family knows of it.

    Raises:
        CheckpointError: there is no such family, or no sampler for the scheduler's options.
    """
    from engines.families import family_of

    return family_of(pipeline_class(folder)).facts(name_of(folder), pipeline)
