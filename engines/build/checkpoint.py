"""Loading a source model: a diffusers folder or a single file, with what stands in for its parts.

Only safetensors are read and no code from a checkpoint runs. Importing this module is cheap;
torch, transformers and diffusers load when `load_pipeline` is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.build import motion
from engines.build.component import TINY_CLASS, check_tiny_vae, load_component
from engines.build.embeddings import load_embeddings
from engines.build.folder import read_json, variant_of
from engines.build.single_file import architecture_of, load_checkpoint, read_header, strange_input
from engines.build.source import COMPONENTS, NO_OVERRIDES, Overrides, name_of
from engines.errors import CheckpointError, reason_of
from engines.facts import MOTION_ADAPTER, TINY_VAE, Facts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# By precision, of the weights as they are exported; those in 8 bits are made of them (of plans of
# fp16's, whatever this says).
DTYPES = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float32", "fp8": "float16",
}  # fmt: skip
PUT_ONE = "put one of them in its place with diffusers' save_pretrained"
T5 = "text_encoder"  # where a pipeline has one
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # their folders may be absent


def pipeline_class(folder: Path) -> str:
    """The diffusers class named in ``model_index.json``.

    Raises:
        CheckpointError: there is no such file, or it names none.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} has no model_index.json: it is not a diffusers folder")
    name = read_json(index).get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{index} has the _class_name {name!r}; it must be the name of a diffusers pipeline"
        )
    return name


def described_in(source: Path, overrides: Overrides = NO_OVERRIDES) -> Path:
    """The diffusers folder with a checkpoint's configurations: itself, or one that fits a file.

    Raises:
        CheckpointError: none fits the file, or one is given for a folder.
    """
    if source.is_file():
        return overrides.architecture or architecture_of(read_header(source))
    if overrides.architecture:
        raise CheckpointError(
            f"{source} is a folder with configurations of its own, --architecture is for a single "
            "file: leave it out"
        )
    return source


def latent_scale(source: Path, overrides: Overrides = NO_OVERRIDES) -> int | None:
    """Pixels a side of a latent, as the VAE's configuration says; None where it is not at hand.

    Cheap: what depends on it is refused before weights are read or anything is built.
    """
    places = [described_in(source, overrides) / "vae"]
    if vae := overrides.components.get("vae"):
        places = [vae, vae / "vae", *(places if vae.is_file() else ())]
    file = next((each / "config.json" for each in places if (each / "config.json").is_file()), None)
    channels = read_json(file).get("block_out_channels") if file else None
    return 2 ** (len(channels) - 1) if isinstance(channels, list) and channels else None


def load_pipeline(source: Path, precision: str, overrides: Overrides = NO_OVERRIDES) -> Any:
    """The diffusers pipeline with weights in a precision of `DTYPES`, on the CPU.

    Raises:
        CheckpointError: a component is of a class that its family does not know, its weights are
            pickled, diffusers cannot load it, or an embedding is for another base.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from engines.families import animatediff, family_of

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder, dtype = described_in(source, overrides), getattr(torch, DTYPES[precision])
    name = pipeline_class(folder)
    known = family_of(name).COMPONENTS
    described = read_json(folder / "model_index.json")
    own = {each: known[each] for each in known if each not in overrides.components}
    if "unet" in own and motion.has_motion(described):
        own.pop(MOTION_ADAPTER, None)  # its UNet has the weights of one
    known = {**known, TINY_VAE: (TINY_CLASS,)}  # beside those that the pipeline has
    if motion.takes_adapter(name):
        known[MOTION_ADAPTER] = animatediff.COMPONENTS[MOTION_ADAPTER]
    for each in overrides.components:
        if each not in known:
            raise CheckpointError(
                f"{source} is a {name}, which has no {each} but {', '.join(known)}: leave "
                f"--{each.replace('_', '-')} out"
            )
    _check_components(folder, own)
    if overrides.t5_int8:
        _check_t5(source, own)
        own.pop(T5)
    halves = motion.apart(folder, own) if source.is_dir() else {}
    own = {each: own[each] for each in own if each not in halves}
    put = {
        each: load_component(each, path, known[each], folder, dtype)
        for each, path in {**halves, **overrides.components}.items()
    }
    unread = [each for each in COMPONENTS if each not in own]
    absent = {each: None for each in (*UNUSED, *unread) if each in described}
    if overrides.t5_int8:
        from engines.build.t5 import load_t5_int8  # here: its operator costs 0.3 s of a start

        put[T5], absent[T5] = load_t5_int8(folder / T5, dtype), None
    if source.is_file():
        pipeline = load_checkpoint(source, name, folder, absent, dtype)
    else:
        pipeline = _of_folder(folder, name, own, absent, dtype)
    adapter = put.pop(MOTION_ADAPTER, None)
    if "unet" in put:
        pipeline.register_modules(unet=put.pop("unet"))
    pipeline = motion.with_motion(
        pipeline, adapter, overrides.components.get(MOTION_ADAPTER, source)
    )
    pipeline.register_modules(**put)
    if TINY_VAE in put:
        check_tiny_vae(pipeline, overrides.components[TINY_VAE])
    load_embeddings(pipeline, overrides.embeddings)
    if "unet" in known:
        channels, latents = (pipeline.unet.config[f"{way}_channels"] for way in ("in", "out"))
        if channels not in (latents, 2 * latents + 1):  # the latter: with a mask, see families
            raise CheckpointError(
                f"{overrides.components.get('unet', source)} {strange_input(channels)}"
            )
    return pipeline


def _of_folder(
    folder: Path, name: str, own: Mapping[str, Any], absent: Mapping[str, None], dtype: Any
) -> Any:
    """The pipeline of a folder, in which ``own`` components are read and others ``absent``."""
    import diffusers

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
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=variant_of(folder, [folder / each for each in own]),
            **absent,
            **({"requires_safety_checker": False} if "safety_checker" in absent else {}),
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

    _, name = read_json(folder / "model_index.json").get("scheduler", (None, None))
    file = folder / "scheduler" / "scheduler_config.json"
    found = getattr(diffusers, str(name), None)
    if name is None or not file.is_file() or (found and not isinstance(found, DummyObject)):
        return None
    return {**read_json(file), "_class_name": name}


def _check_components(folder: Path, known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise CheckpointError where a component is of a class that nothing here can run.

    ``known`` has the classes of each. What diffusers would load by one class and was saved by
    another loads too, with weights of nobody.
    """
    index = read_json(folder / "model_index.json")
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
                f"{folder} has {found!r} as its {name}; known are {', '.join(classes)}: "
                + ("give one by --motion-adapter" if name == MOTION_ADAPTER else PUT_ONE)
            )
        config = folder / name / "config.json"
        saved = read_json(config).get("_class_name", found) if config.is_file() else found
        if saved != found:
            raise CheckpointError(
                f"{folder / 'model_index.json'} calls the {name} {found}, {config} calls it "
                f"{saved}; make the first say what the weights are"
            )


def _check_t5(source: Path, known: Mapping[str, tuple[str, ...]]) -> None:
    if "T5EncoderModel" not in known.get(T5, ()):
        raise CheckpointError(
            f"{source} has no T5 encoder, the only one that --t5-int8 is for: leave it out"
        )


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


def load_facts(source: Path, pipeline: Any, overrides: Overrides = NO_OVERRIDES) -> Facts:
    """What the pipeline's family knows of it, and the names of what was put into it.

    Raises:
        CheckpointError: there is no such family, or no sampler for the scheduler's options.
    """
    from engines.families import family_of

    family = family_of(type(pipeline).__name__)
    facts = family.facts(name_of(source), pipeline, overrides.scheduler)
    components = {name: name_of(path) for name, path in overrides.components.items()}
    embeddings = {word: name_of(path) for word, path in overrides.embeddings.items()}
    return dataclasses.replace(
        facts, components=components, embeddings=embeddings, t5_int8=overrides.t5_int8
    )
