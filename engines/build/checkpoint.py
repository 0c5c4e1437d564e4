"""Finding, hashing and loading a source model: a folder, a shipped name, or a hub id.

Only safetensors are read and no code from a checkpoint runs. Importing this module is cheap;
torch, transformers and diffusers load when `load_pipeline` is called.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from engines.facts import Facts

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEMO_MODELS = Path(__file__).parents[1] / "demo"


def resolve(model: str) -> Path | None:
    """The local folder of a model, or None when only the hub can know it.

    Raises:
        CheckpointError: it looks like a path or a shipped name, and there is nothing there.
    """
    for folder in (Path(model).expanduser(), DEMO_MODELS / model):
        if folder.is_dir():
            return folder
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
            f"model {hub_id!r} cannot be fetched from the hub: {str(error).splitlines()[0][:300]}; "
            "check the name and the network, or give a local folder"
        ) from error


def name_of(folder: Path) -> str:
    """What users call the model: the folder's name, or ``owner/name`` of a hub snapshot."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def pipeline_class(folder: Path) -> str:
    """The diffusers class named in ``model_index.json``."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} has no model_index.json: it is not a diffusers folder")
    return str(json.loads(index.read_text())["_class_name"])


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
    """The diffusers pipeline with weights in ``fp32``, ``fp16`` or ``bf16``, on the CPU."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    unsafe = [path.name for path in folder.rglob("*.bin")]
    if unsafe and not list(folder.rglob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds pickled weights ({unsafe[0]}); only safetensors are read, convert it "
            "with diffusers' save_pretrained(safe_serialization=True)"
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            dtype=getattr(torch, DTYPES[precision]),
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by diffusers: {error}") from error
    return pipeline


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
    """What the pipeline's family knows of it; its scheduler's options are checked here."""
    from engines.families import family_of
    from engines.samplers import NoiseSchedule

    facts: Facts = family_of(pipeline_class(folder)).facts(name_of(folder), pipeline)
    NoiseSchedule.from_config(facts.scheduler)
    return facts
