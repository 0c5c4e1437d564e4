"""Where a model, a component, an embedding or a LoRA is: a path, a shipped name, or on the hub.

Knows names, files and folders, and nothing of what is in them. From the hub come safetensors and
configurations alone, into its own cache.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.build.folder import WEIGHTS as USUAL_WEIGHTS
from engines.errors import CheckpointError, reason_of
from engines.facts import MOTION_ADAPTER, TINY_VAE
from engines.loras.file import ADAPTER_CONFIG, USUAL_FILES

if TYPE_CHECKING:
    from engines.order import Order

DEMO_MODELS = Path(__file__).parents[1] / "demo"
SHIPPED_TINY_VAE = "demo-tiny-vae"
ARCHITECTURES = Path(__file__).parent / "architectures"
SINGLE_FILE = ".safetensors"
OTHER_FILES = (".ckpt", ".pt", ".pth", ".bin", ".gguf")
HUB_URL = re.compile(r"https?://(?:huggingface\.co|hf\.co)/")
# As diffusers' own links have it, or without what a browser puts between name and file.
HUB_FILE = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)/(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?"
    r"(?P<file>[^?]+\.safetensors)(?:\?.*)?"
)
SNAPSHOT = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+(?P<rest>.*)")
# Of a component that is a repository of its own, or a folder in a pipeline's: plain weights, whole
# or in shards, and where there are none, those in halves.
WEIGHTS = (
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*[0-9].safetensors"),
    ("diffusion_pytorch_model.fp16*.safetensors", "diffusion_pytorch_model-*.fp16.safetensors"),
)
USUAL_EMBEDDINGS = ("learned_embeds.safetensors", "learned_embeds.bin")  # as diffusers has them
PICKLED_EMBEDDINGS = (".bin", ".pt")  # read as tensors and plain values alone
CONFIGURATIONS = ("config.json", "diffusion_pytorch_model.*index*.json")


@dataclass(frozen=True, slots=True)
class Overrides:
    """What stands in for a checkpoint's own, or beside it: local files or folders."""

    components: Mapping[str, Path] = field(default_factory=dict)  # by name; of `COMPONENTS`
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # options, by name
    architecture: Path | None = None  # diffusers folder of configurations that fit a single file
    embeddings: Mapping[str, Path] = field(default_factory=dict)  # by word, besides its own
    t5_int8: bool = False  # the linear layers of its T5 encoder in 8 bits


NO_OVERRIDES = Overrides()
COMPONENTS = ("unet", "vae", TINY_VAE, MOTION_ADAPTER)


@dataclass(frozen=True, slots=True)
class Sources:
    """All that an order names, on this machine."""

    model: Path  # bundle, diffusers folder or single file
    overrides: Overrides
    loras: Mapping[str, Path]


def find(order: Order) -> Sources:
    """Look for all that an order names, and fetch what is on the hub.

    Raises:
        CheckpointError: something is not there, cannot be fetched, or is no kind of file for it.
    """
    model = find_model(order.model)
    tiny_vae = order.tiny_vae or (None if order.vae else shipped_tiny_vae(model))
    overrides = find_overrides(
        order.unet, order.vae, order.architecture, order.scheduler, tiny_vae, order.embeddings,
        order.motion_adapter, t5_int8=order.t5_int8,
    )  # fmt: skip
    return Sources(model, overrides, find_loras(order))


def find_model(model: str) -> Path:
    """The diffusers folder, bundle or single file that a model's name means."""
    return resolve(model) or download(model)


def resolve(model: str) -> Path | None:
    """The folder or single file of a model that is here, or None when only the hub can know it.

    Raises:
        CheckpointError: it looks like a path or a shipped name, and there is nothing there, or a
            file of another kind than safetensors.
    """
    if found := _local("model", model, DEMO_MODELS):
        return found
    if _hub_id(model) or _file_on_hub(model):
        return None
    names = sorted(path.parent.name for path in DEMO_MODELS.glob("*/model_index.json"))
    shipped = ", ".join(names) or "none"
    raise CheckpointError(
        f"model {model!r} is neither a folder, a safetensors file nor a shipped model ({shipped}); "
        "give a diffusers folder, a single file, a bundle, or a hub id like owner/name"
    )


def download(model: str) -> Path:
    """Fetch a hub model's folder (safetensors and configs only), or a single file of one."""
    from diffusers import DiffusionPipeline

    if match := _file_on_hub(model):
        return _fetch("model", model, lambda: _hub_file(match))
    hub_id = HUB_URL.sub("", model)
    return _fetch("model", model, lambda: DiffusionPipeline.download(hub_id, use_safetensors=True))


def find_overrides(
    unet: str | None,
    vae: str | None,
    architecture: str | None,
    scheduler: Mapping[str, Any] | None = None,
    tiny_vae: str | None = None,
    embeddings: Mapping[str, str | Path] | None = None,
    motion_adapter: str | None = None,
    *,
    t5_int8: bool = False,
) -> Overrides:
    """Where the components and embeddings are that change a checkpoint, and scheduler options too;
    ``tiny_vae`` stands beside the VAE.

    Raises:
        CheckpointError: as `find`, or an option is not known or has a value that it cannot have.
    """
    from engines.samplers.options import check_options

    check_options(scheduler or {})
    given = dict(zip(COMPONENTS, (unet, vae, tiny_vae, motion_adapter), strict=True))
    components = {
        name: _find(name, text, functools.partial(_hub_component, name))
        for name, text in given.items()
        if text
    }
    found = _find_architecture(architecture) if architecture else None
    words = {word: _find_embedding(word, str(text)) for word, text in (embeddings or {}).items()}
    return Overrides(components, dict(scheduler or {}), found, words, t5_int8)


def shipped_tiny_vae(model: Path) -> str | None:
    """The tiny VAE that is shipped for a model: the demo models have one."""
    return SHIPPED_TINY_VAE if model.resolve().parent == DEMO_MODELS else None


def find_lora(text: str) -> Path:
    """The file or folder of a LoRA, which may be a shipped one, or one file on the hub."""
    return _find("LoRA", text, _hub_lora)


def find_loras(order: Order) -> dict[str, Path]:
    return {name: find_lora(str(lora)) for name, lora in order.loras.items()}


def _find_embedding(word: str, text: str) -> Path:
    """The file of a textual inversion, which alone may be a pickle too."""
    if not word or len(word.split()) != 1 or word.strip() != word:
        raise CheckpointError(
            f"embedding {text!r} has the name {word!r}; it is what prompts say, one word without "
            "spaces"
        )
    path = Path(text).expanduser()
    if path.suffix in PICKLED_EMBEDDINGS:
        if path.is_file():
            return path
        raise CheckpointError(f"embedding {word!r} ({text}) is not there; give its file")
    found = _find(f"embedding {word}", text, functools.partial(_hub_embedding, word))
    if found.is_file():
        return found
    usual = [found / name for name in USUAL_EMBEDDINGS if (found / name).is_file()]
    if not usual:
        raise CheckpointError(
            f"embedding {word!r} ({found}) has no {' or '.join(USUAL_EMBEDDINGS)}: name the file "
            "itself"
        )
    return usual[0]


def _find(what: str, text: str, fetch_of: Callable[[str], str]) -> Path:
    """What is here or shipped, one file on the hub, or what ``fetch_of`` takes of a hub id."""
    if found := _local(what, text, DEMO_MODELS):
        return found
    if match := _file_on_hub(text):
        return _fetch(what, text, lambda: _hub_file(match))
    return _fetch(what, text, lambda: fetch_of(_existing_or_hub(what, text)))


def _find_architecture(text: str) -> Path:
    found = _local("architecture", text, ARCHITECTURES)
    if found is None or not found.is_dir():
        raise CheckpointError(
            f"architecture {text!r} is no folder; give a diffusers folder whose configurations fit "
            f"the file (its weights are not read), or one of {shipped_architectures()}"
        )
    return found


def shipped_architectures() -> str:
    """Their names, for messages."""
    return ", ".join(sorted(path.parent.name for path in ARCHITECTURES.glob("*/unet")))


def _local(what: str, text: str, shipped: Path | None = None) -> Path | None:
    """What is at a path, or of that name in a folder of shipped ones."""
    path = Path(text).expanduser()
    if path.suffix in OTHER_FILES or (path.is_file() and path.suffix != SINGLE_FILE):
        raise CheckpointError(
            f"{what} {text!r} is a {path.suffix or 'nameless'} file, and only safetensors are read "
            "(a pickle can run code): use the .safetensors file of the same weights, or make it "
            "with diffusers' save_pretrained"
        )
    paths = (path, shipped / text) if shipped else (path,)
    return next((each for each in paths if each.is_dir() or each.is_file()), None)


def _hub_id(text: str) -> str | None:
    """``owner/name``, without a browser's address before it."""
    found = HUB_URL.sub("", text).rstrip("/")
    looks_local = text.startswith((".", "/", "~")) or text.endswith(SINGLE_FILE)
    return found if re.fullmatch(r"[\w.-]+/[\w.-]+", found) and not looks_local else None


def _file_on_hub(text: str) -> re.Match[str] | None:
    return HUB_FILE.fullmatch(HUB_URL.sub("", text))


def _existing_or_hub(what: str, text: str) -> str:
    if hub_id := _hub_id(text):
        return hub_id
    raise CheckpointError(
        f"{what} {text!r} is neither a file nor a folder; give one, a hub id like owner/name, or a "
        "file on the hub like owner/name/file.safetensors"
    )


def _fetch(what: str, text: str, get: Callable[[], str]) -> Path:
    try:
        return Path(get())
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        cause = error.__cause__  # what it says itself is that it found nothing in its cache either
        reason = reason_of(cause if isinstance(cause, Exception) else error).rstrip(".")
        raise CheckpointError(
            f"{what} {text!r} cannot be fetched from the hub: {reason}; "
            "check the name, the network and HF_HUB_OFFLINE, or give a local path"
        ) from error


def _hub_file(match: re.Match[str]) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(match["repo"], match["file"], revision=match["revision"])


def _hub_component(name: str, hub_id: str) -> str:
    """A snapshot with the component's configuration and weights, and nothing else."""
    from huggingface_hub import snapshot_download

    folder = "vae" if name == TINY_VAE else name  # in a pipeline's repository
    for weights in WEIGHTS:
        files, configs = (
            [prefix + each for prefix in ("", f"{folder}/") for each in patterns]
            for patterns in (weights, CONFIGURATIONS)
        )
        snapshot = snapshot_download(hub_id, allow_patterns=[*configs, *files])
        if any(next(Path(snapshot).glob(each), None) for each in files):
            return snapshot
    raise CheckpointError(
        f"{name} {hub_id!r} has no {WEIGHTS[0][0]} on the hub; name the file itself: "
        f"{hub_id}/FILE{SINGLE_FILE}"
    )


def _hub_lora(hub_id: str) -> str:
    """A snapshot with the LoRA of a usual name."""
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(hub_id, allow_patterns=[*USUAL_FILES, ADAPTER_CONFIG])
    if not any((Path(snapshot) / name).is_file() for name in USUAL_FILES):
        raise CheckpointError(
            f"LoRA {hub_id!r} has no {' or '.join(USUAL_FILES)} on the hub; name the file itself: "
            f"{hub_id}/FILE{SINGLE_FILE}"
        )
    return snapshot


def _hub_embedding(word: str, hub_id: str) -> str:
    """A snapshot with the embedding of the usual name."""
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(hub_id, allow_patterns=[USUAL_EMBEDDINGS[0]])
    if not (Path(snapshot) / USUAL_EMBEDDINGS[0]).is_file():
        raise CheckpointError(
            f"embedding {word!r}: {hub_id!r} has no {USUAL_EMBEDDINGS[0]} on the hub; name the "
            f"file itself: {hub_id}/FILE{SINGLE_FILE}"
        )
    return snapshot


def name_of(source: Path) -> str:
    """What users call it: the name of a folder or file, or ``owner/name`` of a hub snapshot.

    A file of the name that all have is called by its folder.
    """
    own = source.with_suffix("") if source.suffix == SINGLE_FILE else source
    if USUAL_WEIGHTS.fullmatch(source.name):
        own = source.parent
    if match := SNAPSHOT.fullmatch(own.as_posix()):
        return f"{match['owner']}/{match['name']}{match['rest']}"
    return own.name


def fingerprint(source: Path) -> str:
    """SHA-256 over names and contents of every file that loading can read of a folder or file."""
    digest = hashlib.sha256()
    readable = (".json", ".safetensors", ".txt", ".model")
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        if path == source or (path.suffix in readable and path.is_file()):
            digest.update(f"{path.relative_to(source)}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
