"""LoRA files as people have them: what each layer's α, rank and name come to.

The right value is computed from the raw file, or is what diffusers makes of the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.drawing.model import load_model
from engines.errors import CheckpointError
from engines.loras.file import Lora, read_lora
from engines.order import Order
from tests.engines.checkpoints import make_lora
from tests.engines.peers import Peer, recipe

STRIPED = Path("engines/demo/demo-striped-lora")


def _file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def _kohya(layers: Mapping[str, Tensor], factor: float = 4.0) -> dict[str, Tensor]:
    """Layers under peft's names as kohya has them: `up` times the factor, α = rank / factor."""
    state = {}
    for key, down in layers.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removesuffix(".lora_A.weight")
        part, _, name = layer.partition(".")
        if part == "text_encoder" and not name.startswith("text_model."):
            name = f"text_model.{name}"
        base = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + name.replace(".", "_")
        state[f"{base}.lora_down.weight"] = down
        state[f"{base}.lora_up.weight"] = layers[f"{layer}.lora_B.weight"] * factor
        state[f"{base}.alpha"] = torch.tensor(down.shape[0] / factor)
    return state


def _assert_same(ours: Lora, theirs: Lora) -> None:
    for part, pairs in theirs.items():
        assert ours[part].keys() == pairs.keys()
        for name, pair in pairs.items():
            shape = (pair.up.shape[0], *pair.down.shape[1:])
            wanted = pair.delta(shape)
            error = (ours[part][name].delta(shape) - wanted).norm() / wanted.norm()
            assert error < 1e-5, (name, float(error))


def test_every_alpha_of_a_kohya_file_counts(tmp_path: Path) -> None:
    """Mathematically the shipped file: attention, feed-forward and convolutions alike."""
    file = tmp_path / "kohya.safetensors"
    save_file(_kohya(load_file(_file(STRIPED))), file)
    _assert_same(read_lora(file), read_lora(STRIPED))


@pytest.fixture(scope="module")
def both(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of UNet and text encoder, made by peft, with its configuration in the header."""
    folder = tmp_path_factory.mktemp("both")
    targets = ["to_q", "to_out.0", "ff.net.2", "conv1", "proj_in"]
    return make_lora(checkpoints / "tiny-sd", folder, targets, text_encoder=True)


def _assert_diffusers_agrees(checkpoint: Path, file: Path) -> None:
    peer = Peer(checkpoint, lcm=False, loras={"it": file})
    model = load_model(Order(str(checkpoint), "torch", loras={"it": file}), lambda *_: None)
    theirs = peer.fuse(recipe(loras={"it": 1.0}))
    fused = model.adapters._fuse("denoiser", model.adapters.settle({"it": 1.0}))
    assert fused
    for name, weight in fused.items():
        expected = theirs[name.removeprefix("unet.")]
        assert (weight - expected).norm() / expected.norm() <= 1e-5, name


def test_kohya_means_what_it_means_to_diffusers(
    checkpoints: Path, both: Path, tmp_path: Path
) -> None:
    file = tmp_path / "kohya.safetensors"
    layers = {k: v for k, v in load_file(_file(both)).items() if k.startswith("unet.")}
    save_file(_kohya(layers), file)
    _assert_diffusers_agrees(checkpoints / "tiny-sd", file)


def test_text_encoders_have_alphas_too(both: Path, tmp_path: Path) -> None:
    file, bare = tmp_path / "kohya.safetensors", tmp_path / "bare.safetensors"
    layers = load_file(_file(both))
    queries = {k: v for k, v in layers.items() if ".q_proj." in k}
    assert queries
    layers |= {k.replace(".q_proj.", ".out_proj."): v + 1 for k, v in queries.items()}
    save_file(_kohya(layers), file)
    save_file(layers, bare)  # without its header: α is the rank
    _assert_same(read_lora(file), read_lora(bare))
    assert any(".out_proj." in name for name in read_lora(bare)["text_encoder"])


def _save_with(source: Path, file: Path, changes: Mapping[str, object]) -> None:
    """The same layers, with other lines in peft's configuration."""
    with safe_open(_file(source), framework="pt") as opened:
        known = json.loads(opened.metadata()["lora_adapter_metadata"])
    header = {"format": "pt", "lora_adapter_metadata": json.dumps({**known, **changes})}
    save_file(load_file(_file(source)), file, metadata=header)


@pytest.mark.parametrize(
    "patterns",
    [{"to_q": 32, "ff.net.2": 1}, {r".*attn2\.to_q": 32}, {"conv1": 3, "to_out.0": 0.5}],
    ids=str,
)
def test_alpha_patterns_fit_as_peft_fits_them(
    patterns: dict[str, float], checkpoints: Path, both: Path, tmp_path: Path
) -> None:
    file = tmp_path / "patterns.safetensors"
    _save_with(both, file, {"unet.alpha_pattern": patterns})
    _assert_diffusers_agrees(checkpoints / "tiny-sd", file)
    plain, ours = read_lora(both)["denoiser"], read_lora(file)["denoiser"]
    assert {name for name in ours if ours[name].scale != plain[name].scale}


def test_what_fits_nothing_is_never_dropped(both: Path, tmp_path: Path) -> None:
    file = tmp_path / "it.safetensors"
    kohya = _kohya(load_file(_file(both)))
    save_file({**kohya, "lora_unet_nowhere.alpha": torch.tensor(1.0)}, file)
    with pytest.raises(CheckpointError, match=r"it\.safetensors holds lora_unet_nowhere\.alpha"):
        read_lora(file)
    first = next(key for key in kohya if key.endswith(".lora_down.weight"))
    for kind in ("dora_scale", "hada_w1_a", "lokr_w1", "lora_mid.weight"):
        key = first.replace("lora_down.weight", kind)
        save_file({**kohya, key: torch.ones(1)}, file)
        with pytest.raises(CheckpointError, match=rf"holds {key}: only plain pairs"):
            read_lora(file)
    _save_with(both, file, {"unet.alpha_pattern": {"to_nothing": 2}})
    with pytest.raises(CheckpointError, match="alpha to 'to_nothing', which fits none"):
        read_lora(file)
    _save_with(both, file, {"unet.use_rslora": True})
    with pytest.raises(CheckpointError, match="use_rslora"):
        read_lora(file)


def test_a_folder_holds_one_file(tmp_path: Path) -> None:
    layers = load_file(_file(STRIPED))
    save_file(layers, tmp_path / "a.safetensors")
    assert read_lora(tmp_path)["denoiser"]
    save_file(layers, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"found a\.safetensors, b\.safetensors"):
        read_lora(tmp_path)


def test_layers_that_a_model_has_not_are_counted(tmp_path: Path) -> None:
    layers = load_file(_file(STRIPED))
    strange = {key.replace("down_blocks.0", "down_blocks.7"): each for key, each in layers.items()}
    save_file(strange, tmp_path / "it.safetensors")
    order = Order("demo-base", "torch", loras={"it": tmp_path / "it.safetensors"})
    few, many = sum("down_blocks.0" in key for key in layers) // 2, len(layers) // 2
    said = rf"changes unet\.down_blocks\.7.*\({few} of its {many} weights\)"
    with pytest.raises(CheckpointError, match=said):
        load_model(order, lambda *_: None)
