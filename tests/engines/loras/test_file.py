"""LoRA files as people have them: what each layer's α, rank and name come to.

The right value is computed from the raw file, or is what diffusers makes of the same file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.drawing.model import load_model
from engines.errors import CheckpointError
from engines.loras.file import Lora, read_lora
from engines.order import Order
from tests.engines.checkpoints import as_kohya, make_lora
from tests.engines.peers import Peer, recipe

pytestmark = pytest.mark.filterwarnings(
    # peft asks transformers by a name that it deprecates.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
STRIPED = Path("engines/demo/demo-striped-lora")


def _file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


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
    save_file(as_kohya(load_file(_file(STRIPED))), file)
    _assert_same(read_lora(file), read_lora(STRIPED))


@pytest.fixture(scope="module")
def both(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of UNet and text encoder, made by peft, with its configuration in the header."""
    folder = tmp_path_factory.mktemp("both")
    targets = ["to_q", "to_out.0", "ff.net.2", "conv1", "proj_in"]
    return make_lora(checkpoints / "tiny-sd", folder, targets, text_encoder=True)


def _assert_diffusers_agrees(checkpoint: Path, file: Path) -> None:
    peer = Peer(checkpoint, loras={"it": file})
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
    save_file(as_kohya(layers), file)
    _assert_diffusers_agrees(checkpoints / "tiny-sd", file)


def test_text_encoders_have_alphas_too(both: Path, tmp_path: Path) -> None:
    file, bare = tmp_path / "kohya.safetensors", tmp_path / "bare.safetensors"
    layers = load_file(_file(both))
    queries = {k: v for k, v in layers.items() if ".q_proj." in k}
    assert queries
    layers |= {k.replace(".q_proj.", ".out_proj."): v + 1 for k, v in queries.items()}
    save_file(as_kohya(layers), file)
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


def test_an_alpha_that_fits_nothing_is_never_dropped(both: Path, tmp_path: Path) -> None:
    file = tmp_path / "it.safetensors"
    kohya = as_kohya(load_file(_file(both)))
    save_file({**kohya, "lora_unet_nowhere.alpha": torch.tensor(1.0)}, file)
    with pytest.raises(CheckpointError, match=r"it\.safetensors holds lora_unet_nowhere\.alpha"):
        read_lora(file)
    _save_with(both, file, {"unet.alpha_pattern": {"to_nothing": 2}})
    with pytest.raises(CheckpointError, match="alpha to 'to_nothing', which fits none"):
        read_lora(file)
    _save_with(both, file, {"unet.use_dora": True})
    with pytest.raises(CheckpointError, match="use_dora"):
        read_lora(file)


@pytest.mark.parametrize("began", ["pissa", "pissa_niter_4", "olora", "gaussian", True])
def test_a_lora_for_weights_that_peft_changed_is_refused(
    began: str | bool, checkpoints: Path, attention: Path, tmp_path: Path
) -> None:
    """Wherever diffusers, by peft, changes the model's own weights as it loads the file."""
    file = tmp_path / "it.safetensors"
    _save_with(attention, file, {"unet.init_lora_weights": began})
    pipeline = DiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    built = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(file, low_cpu_mem_usage=False)  # with it, diffusers fails at these
    loaded = pipeline.unet.state_dict()
    changed = [
        name for name in loaded
        if ".base_layer." in name and not loaded[name].equal(built[name.replace(".base_layer", "")])
    ]  # fmt: skip
    if not changed:
        assert read_lora(file)["denoiser"]
        return
    with pytest.raises(
        CheckpointError, match=f"init_lora_weights='{began}', for a model whose own"
    ):
        read_lora(file)


OTHER_KINDS = (
    "dora_scale", "lora_magnitude_vector.weight", "hada_w1_a", "hada_t1", "lokr_w1", "lokr_t2",
    "lora_mid.weight", "on_input", "oft_blocks", "lora_up.bias", "diff", "diff_b", "a1.weight",
    "w_norm", "lora_A.default.weight", "lora_embedding_A",
)  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("layout", ["beside", "alone", "diffusers"])
def test_another_kind_is_refused_by_its_key(
    kind: str, layout: str, both: Path, tmp_path: Path
) -> None:
    """Beside a layer's plain pair, as the layer's all, and under names of diffusers' own."""
    plain = load_file(_file(both))
    layers = plain if layout == "diffusers" else as_kohya(plain)
    half = "lora_A.weight" if layout == "diffusers" else "lora_down.weight"
    layer = next(key for key in layers if key.endswith(half)).removesuffix(half)
    layers[f"{layer}{kind}"] = torch.ones(2, 2)
    if layout == "alone":
        layers = {key: matrix for key, matrix in layers.items() if "lora_down" not in key}
        layers = {key: matrix for key, matrix in layers.items() if "lora_up.weight" not in key}
    save_file(layers, tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=rf"holds {re.escape(layer + kind)}: only plain pair"):
        read_lora(tmp_path / "it.safetensors")


def test_a_half_without_the_other_is_named(both: Path, tmp_path: Path) -> None:
    file, peft = tmp_path / "it.safetensors", load_file(_file(both))
    for layers in (peft, as_kohya(peft)):
        for key in (next(iter(layers)), next(reversed(layers))):
            if not key.endswith(".alpha"):
                save_file({name: half for name, half in layers.items() if name != key}, file)
                with pytest.raises(CheckpointError, match=rf"but no {re.escape(key)} that goes"):
                    read_lora(file)
    key = next(key for key in peft if "lora_A" in key)
    save_file(peft | {key: peft[key][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} as .*they have no rank in comm"):
        read_lora(file)


@pytest.mark.parametrize(
    "layer",
    [
        "prior.layers.0.ff",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",  # is there already
    ],
)
def test_a_matrix_that_a_conversion_loses_is_named(layer: str, both: Path, tmp_path: Path) -> None:
    layers = load_file(_file(both))
    down, up = (f"{layer}.{end}" for end in ("lora.down.weight", "lora.up.weight"))
    layers |= {down: torch.ones(2, 32), up: torch.ones(32, 2)}
    save_file(layers, tmp_path / "it.safetensors")
    said = rf"holds {re.escape(layer)}\.lora.*no layer of such a model \(2 of its \d+ matrices\)"
    with pytest.raises(CheckpointError, match=said):
        read_lora(tmp_path / "it.safetensors")


def test_kohya_without_an_alpha_has_its_rank_for_one(both: Path, tmp_path: Path) -> None:
    file, bare = tmp_path / "kohya.safetensors", tmp_path / "bare.safetensors"
    layers = load_file(_file(both))  # of the text encoder queries and values alone
    kohya = {k: v for k, v in as_kohya(layers, 1.0).items() if not k.endswith(".alpha")}
    save_file(kohya, file)
    save_file(layers, bare)
    _assert_same(read_lora(file), read_lora(bare))
    assert read_lora(bare)["text_encoder"]


CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out", "proj_out"]


@pytest.mark.parametrize("checkpoint", ["tiny-sd", "tiny-demo"])
def test_convolutions_of_a_locon(checkpoint: str, checkpoints: Path, tmp_path: Path) -> None:
    """Down and up of each, kernels of 3 x 3 too, multiplied by hand from the raw file."""
    targets = [*CONVOLUTIONS, "time_emb_proj", "linear_1", "linear_2"]
    layers = load_file(_file(make_lora(checkpoints / checkpoint, tmp_path / "made", targets)))
    file = tmp_path / "locon.safetensors"
    save_file(as_kohya(layers), file)
    order = Order(str(checkpoints / checkpoint), "torch", loras={"it": file})
    adapters = load_model(order, lambda *_: None).adapters
    fused = adapters._fuse("denoiser", adapters.settle({"it": 0.5}))
    unet = UNet2DConditionModel.from_pretrained(checkpoints / checkpoint / "unet")
    built = {f"unet.{name}": weight.detach() for name, weight in unet.named_parameters()}
    names = {key.removesuffix(".lora_A.weight") for key in layers if "lora_A" in key}
    assert fused.keys() == {f"{name}.weight" for name in names}
    assert {weight.shape[2:] for weight in fused.values() if weight.ndim == 4} == {(3, 3), (1, 1)}
    for name in names:
        down, up = layers[f"{name}.lora_A.weight"], layers[f"{name}.lora_B.weight"]
        product = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        wanted = built[f"{name}.weight"] + 0.5 * product
        torch.testing.assert_close(fused[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def attention(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    return make_lora(checkpoints / "tiny-sd", folder, ["to_q", "to_k", "to_v", "to_out.0"])


def _processors(layers: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Attention layers under the names that diffusers had before peft's."""
    state = {}
    for key, half in layers.items():
        name = key.removeprefix("unet.").replace(".to_out.0.", ".to_out.")
        name = re.sub(r"\.(to_\w+)\.lora_A", r".processor.\1_lora.down", name)
        name = re.sub(r"\.(to_\w+)\.lora_B", r".processor.\1_lora.up", name)
        state[prefix + name] = half
    return state


def test_processors_of_older_diffusers(attention: Path, checkpoints: Path, tmp_path: Path) -> None:
    """`save_lora_weights` wrote the part's name before the layer's, `save_attn_procs` did not."""
    layers = load_file(_file(attention))
    old, older = tmp_path / "old.safetensors", tmp_path / "older.safetensors"
    save_file(_processors(layers, "unet."), old)
    save_file(_processors(layers, ""), older)
    assert any(k.endswith("attn1.processor.to_out_lora.up.weight") for k in load_file(older))
    _assert_diffusers_agrees(checkpoints / "tiny-sd", old)
    _assert_same(read_lora(older), read_lora(old))


def _assert_fused(checkpoint: Path, file: Path, part: str, theirs: torch.nn.Module) -> None:
    """Every weight that the file changes is their module's, and another than it was."""
    weights = {k.replace(".base_layer", ""): v for k, v in theirs.named_parameters()}
    model = load_model(Order(str(checkpoint), "torch", loras={"it": file}), lambda *_: None)
    fused = model.adapters._fuse(part, model.adapters.settle({"it": 1.0}))
    assert fused
    for name, weight in fused.items():
        wanted = weights[name.partition(".")[2]].detach()
        assert (weight - wanted).norm() / wanted.norm() <= 1e-5, name
        built = model.engines[part].weight(name)
        assert (weight - built).norm() / wanted.norm() > 1e-3, name


PEFT_CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8},
}
PATTERNS = {
    "denoiser": {"rank_pattern": {"to_q": 6, "conv1": 3}, "alpha_pattern": {"attn1.to_k": 24}},
    "text_encoder": {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"q_proj": 32}},
}
PEFT_TARGETS = {
    "denoiser": ["to_q", "to_k", "ff.net.2", "conv1", "time_emb_proj"],
    "text_encoder": ["q_proj", "fc1"],
}


@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("config", PEFT_CONFIGS)
@pytest.mark.parametrize("part", PEFT_TARGETS)
def test_adapters_as_peft_itself_saves_them(
    part: str, config: str, as_file: bool, checkpoints: Path, tmp_path: Path
) -> None:
    patterns = PATTERNS[part] if config == "patterns" else {}
    adapted = _adapt(checkpoints / "tiny-sd", part, **PEFT_CONFIGS[config], **patterns)
    adapted.save_pretrained(tmp_path)
    source = tmp_path / "adapter_model.safetensors" if as_file else tmp_path
    if config == "plain":
        (tmp_path / "optimizer.safetensors").write_bytes(b"")  # other files may lie there
    _assert_fused(checkpoints / "tiny-sd", source, part, adapted.merge_and_unload())


def _adapt(checkpoint: Path, part: str, **config: Any) -> PeftModel:
    """A model of its own with a random adapter."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    model = pipeline.unet if part == "denoiser" else pipeline.text_encoder
    return get_peft_model(
        model, LoraConfig(**config, target_modules=PEFT_TARGETS[part], init_lora_weights=False)
    )


def test_what_peft_says_decides(checkpoints: Path, tmp_path: Path) -> None:
    """Its configuration: without it no α is known, and of another model no layer would fit."""
    _adapt(checkpoints / "tiny-sd", "text_encoder").save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    values["auto_mapping"]["base_model_class"] = "LlamaForCausalLM"
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="made for a LlamaForCausalLM; known are UNet2DCond"):
        read_lora(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"base_model\.model\..*no adapter_config\.json with"):
        read_lora(tmp_path)


def test_rslora_is_what_it_is_to_diffusers(checkpoints: Path, both: Path, tmp_path: Path) -> None:
    file = tmp_path / "rslora.safetensors"
    _save_with(both, file, {"unet.use_rslora": True, "unet.lora_alpha": 3})
    _assert_diffusers_agrees(checkpoints / "tiny-sd", file)
    scales = {pair.scale for pair in read_lora(file)["denoiser"].values()}
    assert scales == {1.5}  # 3 / √4


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
