"""Textual inversions by file: as diffusers loads them, in the bundle's name, refused by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from engines.build.bundle import Blueprint
from engines.build.checkpoint import load_pipeline
from engines.build.source import find_overrides
from engines.cli import app
from engines.drawing.runner import Runner
from engines.errors import BundleError, CheckpointError
from engines.order import Order
from tests.engines.checkpoints import make_lora, make_xl_checkpoint
from tests.engines.conftest import BACKENDS
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

WORDS = {"<cat>": 3, "dogstyle": 1}  # and of how many vectors each is


def vectors(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + width))


def _as_a1111(state: Tensor, file: Path) -> None:
    whole = {"string_to_token": {"*": 265}, "string_to_param": {"*": state}, "name": "other"}
    torch.save(whole | {"step": 9, "sd_checkpoint": None}, file)


FILES: dict[str, Callable[[Tensor, Path], None]] = {
    "learned_embeds.safetensors": lambda state, file: save_file({"<other>": state}, file),
    "learned_embeds.bin": lambda state, file: torch.save({"<other>": state}, file),
    "tensor.pt": torch.save,
    "a1111.pt": _as_a1111,
    "a1111.safetensors": lambda state, file: save_file({"emp_params": state}, file),
    "flat.safetensors": lambda state, file: save_file(
        {"string_to_param": state, "step": torch.tensor(9)}, file
    ),
}
READ_BY_DIFFUSERS = ("learned_embeds.safetensors", "learned_embeds.bin", "a1111.pt")


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_xl_checkpoint(tmp_path_factory.mktemp("xl") / "tiny-xl")


@pytest.fixture(scope="module", params=["tiny-sd", "tiny-xl"])
def taught(
    request: pytest.FixtureRequest,
    checkpoints: Path,
    xl: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Path], Path]:
    """A base, files of words for it, and what diffusers makes of both, saved beside a LoRA."""
    folder = tmp_path_factory.mktemp("words")
    base = xl if request.param == "tiny-xl" else checkpoints / request.param
    pipeline, files = DiffusionPipeline.from_pretrained(base), {}
    for word, count in WORDS.items():
        files[word] = file = folder / f"{count}.safetensors"
        both = {"clip_l": vectors(count, 32), "clip_g": vectors(count, 40)}
        if request.param == "tiny-sd":
            save_file({"<other>": both["clip_l"]}, file)
            pipeline.load_textual_inversion(file, token=word)
            continue
        save_file(both, file)  # each read out by hand, as diffusers' guide has it
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            encoder = getattr(pipeline, f"text_encoder{end}")
            tokenizer = getattr(pipeline, f"tokenizer{end}")
            pipeline.load_textual_inversion(
                both[key], token=word, text_encoder=encoder, tokenizer=tokenizer
            )
    pipeline.save_pretrained(folder / "taught")
    make_lora(base, folder / "lora", ["to_q", "to_v"], text_encoder=True)
    return base, files, folder / "taught"


@pytest.fixture(scope="module", params=BACKENDS)
def runner(
    request: pytest.FixtureRequest, taught: tuple[Path, dict[str, Path], Path], cache_dir: Path
) -> Iterator[Runner]:
    base, files, _ = taught
    order = Order(
        str(base), request.param, cache_dir=cache_dir, num_threads=1, embeddings=dict(files),
        loras={"it": taught[2].with_name("lora")},
    )  # fmt: skip
    opened = Runner.open(order)
    yield opened
    opened.close()


PROMPTS = ("a <cat>", "my<cat>, dogstyle and a <cat>", "DOGSTYLE", "a cat")


def test_pictures_are_those_of_diffusers(
    runner: Runner, taught: tuple[Path, dict[str, Path], Path]
) -> None:
    peer = Peer(taught[2], loras={"it": taught[2].with_name("lora")})
    recipes = [
        recipe(prompt=prompt, negative_prompt="a dogstyle", guidance_scale=3.0, sampler="ddim")
        for prompt in PROMPTS
    ]
    recipes.append(recipe(prompt="a <cat>", sampler="ddim", loras={"it": 0.7}))
    for ours, wanted in zip(draw_together(runner, recipes), recipes, strict=True):
        assert_agree(ours, peer.draw(wanted), (wanted.prompt, wanted.loras))
    assert runner.info.embeddings == {"<cat>": "3", "dogstyle": "1"}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, checkpoints: Path, tmp_path: Path) -> None:
    base, file = checkpoints / "tiny-sd", tmp_path / name
    FILES[name](vectors(2, 32), file)
    ours = load_pipeline(base, "fp32", find_overrides(None, None, None, embeddings={"<cat>": file}))
    theirs = DiffusionPipeline.from_pretrained(base)
    by_itself = {"weight_name": name, "pretrained_model_name_or_path": tmp_path}
    given = by_itself if name in READ_BY_DIFFUSERS else {}
    theirs.load_textual_inversion(**given or {_FIRST: vectors(2, 32)}, token="<cat>")
    found, expected = (each.text_encoder.get_input_embeddings().weight for each in (ours, theirs))
    assert torch.equal(found, expected)
    for text in ("a <cat>", "<cat>_1"):
        assert ours.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids
    if name.startswith("learned"):  # the name that a folder is looked for
        overrides = find_overrides(None, None, None, embeddings={"<cat>": tmp_path})
        assert overrides.embeddings == {"<cat>": file}


_FIRST = "pretrained_model_name_or_path"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_take_them_in_their_own_type(
    precision: str, checkpoints: Path, tmp_path: Path
) -> None:
    save_file({"x": vectors(2, 32)}, tmp_path / "x.safetensors")
    overrides = find_overrides(None, None, None, embeddings={"<cat>": tmp_path / "x.safetensors"})
    weight = load_pipeline(checkpoints / "tiny-sd", precision, overrides).text_encoder
    found = weight.get_input_embeddings().weight
    assert torch.equal(found[-2:], vectors(2, 32).to(found.dtype))


def test_a_bundle_says_what_is_in_it(checkpoints: Path, tmp_path: Path) -> None:
    base = checkpoints / "tiny-sd"
    files = [tmp_path / name for name in ("one.pt", "two.pt", "again.pt")]
    for file, count in zip(files, (1, 2, 1), strict=True):
        torch.save({"x": vectors(count, 32)}, file)
    given: list[dict[str, Any]] = [{"<cat>": files[0]}, {"<cat>": files[1]}, {"<dog>": files[0]}]
    keys = [
        Blueprint(base, overrides=find_overrides(None, None, None, embeddings=each)).key
        for each in (*given, {})
    ]
    assert len(set(keys)) == len(keys)
    options = ["--embedding", f"<cat>={files[1]}"]
    done = CliRunner().invoke(app, ["build", str(base), "--out", str(tmp_path / "b"), *options])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "b")])
    assert f"{'embedding <cat>':<24}two.pt (" in done.output
    with pytest.raises(
        BundleError, match="--vae, --tiny-vae, --motion-adapter, --t5-int8, --embedding"
    ):
        Runner.open(Order(str(tmp_path / "b"), embeddings={"<cat>": files[0]}))
    runner = Runner.open(Order(str(tmp_path / "b"), num_threads=1))
    assert runner.info.embeddings == {"<cat>": "two.pt"}
    (tokens,) = runner.start(recipe(prompt="<cat>")).texts.tokens
    assert len(set(tokens["input_ids"][:4])) == 4  # begin, two vectors, end
    runner.close()


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("never",))


def _refusal(base: Path, file: Path, word: str = "<cat>") -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(base, "fp32", find_overrides(None, None, None, embeddings={word: str(file)}))
    (line,) = str(caught.value).splitlines()
    return line


def test_what_does_not_fit_is_refused_by_name(
    checkpoints: Path, xl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = checkpoints / "tiny-sd"

    def saved(name: str, state: Any) -> Path:
        torch.save(state, tmp_path / name)
        return tmp_path / name

    plain = saved("plain.pt", {"x": vectors(1, 32)})
    both = saved("both.pt", {"clip_l": vectors(1, 32), "clip_g": vectors(1, 40)})
    wide = saved("wide.pt", {"x": vectors(1, 40)})
    turned = saved("turned.pt", {"clip_l": vectors(1, 40), "clip_g": vectors(1, 32)})
    assert _refusal(base, wide) == (
        f"embedding '<cat>' ({wide}) has vectors of 40 numbers, this base's text_encoder takes 32: "
        "use one that was trained on such a model"
    )
    assert "of 40 numbers, this base's text_encoder takes 32" in _refusal(xl, turned)
    assert _refusal(xl, plain) == (
        f"embedding '<cat>' ({plain}) is for text_encoder (clip_l), this base has text_encoder "
        "(clip_l) and text_encoder_2 (clip_g): use one that was trained on such a model"
    )
    assert "this base has text_encoder (clip_l): use" in _refusal(base, both)
    uneven = saved("uneven.pt", {"clip_l": vectors(1, 32), "clip_g": vectors(2, 40)})
    assert "(1 for clip_l, 2 for clip_g); it must be as many for both" in _refusal(xl, uneven)
    assert "already in tokenizer vocabulary" in _refusal(base, plain, "x")
    holds = "an embedding holds one tensor, or string_to_param, or clip_l and clip_g"
    for state in ({"a": vectors(1, 32), "b": vectors(1, 32)}, {"a": 3}, {}, {"a": torch.zeros(0)}):
        assert holds in _refusal(base, saved("odd.pt", state))
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"x": Evil()}))
    torch.save({"x": Evil()}, tmp_path / "evil.bin")
    for name in ("evil.pt", "evil.bin"):
        assert "cannot be read" in _refusal(base, tmp_path / name)
    assert "never" not in capsys.readouterr().out
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    assert "cannot be read" in _refusal(base, tmp_path / "broken.safetensors")
    assert "'<cat>' (absent.pt) is not there; give its file" in _refusal(base, Path("absent.pt"))
    (tmp_path / "empty").mkdir()
    assert "has no learned_embeds.safetensors or" in _refusal(base, tmp_path / "empty")
    assert "one word without spaces" in _refusal(base, plain, "my cat")
