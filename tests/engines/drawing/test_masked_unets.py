"""UNets that take a mask (9 channels) agree with diffusers' inpainting pipelines, in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionInpaintPipeline
from safetensors.torch import save_file

from engines.build.checkpoint import load_facts, load_pipeline
from engines.build.single_file import Header, architecture_of
from engines.build.source import Overrides
from engines.drawing.runner import Runner
from engines.order import Order
from tests.engines.checkpoints import make_checkpoint, make_tiny_vae, make_xl_checkpoint
from tests.engines.drawing.test_agreement import _image
from tests.engines.drawing.test_inpainting import WAYS, _mask, masked
from tests.engines.ldm import checkpoint_state
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
KINDS = [("sd", "torch"), ("sd", "onnxruntime"), ("sdxl", "torch")]
SAMPLERS = ("ddim", "lcm", "euler", "euler_ancestral", "tcd", "dpmpp_2m")
MASKED = [masked(*WAYS[k % 4], sampler=sampler) for k, sampler in enumerate(SAMPLERS)]
OTHERS = [
    recipe(num_steps=4, guidance_scale=5.0, sampler="ddim"),
    recipe(num_steps=2, seed=8),
    recipe(image=_image(2), strength=0.6, num_steps=5, sampler="euler"),
    recipe(image=_image(3), strength=1.0, num_steps=3, guidance_scale=3.0),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inpainting")
    return {
        "sd": make_checkpoint(folder / "sd", lcm=False, inpainting=True),
        "sdxl": make_xl_checkpoint(folder / "sdxl", inpainting=True),
    }


@pytest.fixture(scope="module")
def runners(folders: dict[str, Path], cache_dir: Path) -> Iterator[dict[tuple[str, str], Runner]]:
    opened = {
        (name, backend): Runner.open(
            Order(
                str(folders[name]), backend=backend, cache_dir=cache_dir, max_batch=8,
                num_threads=1,
            )
        )
        for name, backend in KINDS
    }  # fmt: skip
    yield opened
    for runner in opened.values():
        runner.close()


@pytest.fixture(scope="module")
def peers(folders: dict[str, Path]) -> dict[str, Peer]:
    return {name: Peer(folder) for name, folder in folders.items()}


@pytest.mark.parametrize(("name", "backend"), KINDS)
def test_alone(
    name: str, backend: str, runners: dict[tuple[str, str], Runner], peers: dict[str, Peer]
) -> None:
    """With a mask; without one, and without an image, all is masked."""
    for wanted in [*MASKED, *OTHERS]:
        (ours,) = draw_together(runners[name, backend], [wanted])
        assert_agree(ours, peers[name].draw(wanted), wanted)


@pytest.mark.parametrize(("name", "backend"), KINDS)
def test_among_others(
    name: str, backend: str, runners: dict[tuple[str, str], Runner], peers: dict[str, Peer]
) -> None:
    mixed = [each for pair in zip(MASKED, OTHERS, strict=False) for each in pair]
    for wanted, ours in zip(mixed, draw_together(runners[name, backend], mixed), strict=True):
        assert_agree(ours, peers[name].draw(wanted), wanted)


def test_sides_that_halve_to_odd_ones(
    runners: dict[tuple[str, str], Runner], peers: dict[str, Peer]
) -> None:
    wanted = recipe(
        width_px=72, height_px=104, image=_image(1, 144, 128)[:104, :72], mask=_mask(72, 104),
        strength=0.9, num_steps=3, guidance_scale=2.0,
    )  # fmt: skip
    (ours,) = draw_together(runners["sd", "onnxruntime"], [wanted])
    assert_agree(ours, peers["sd"].draw(wanted))


def test_what_the_mask_leaves_decides(runners: dict[tuple[str, str], Runner]) -> None:
    """At strength 1 the UNet alone sees the image, and only where it stays."""
    runner, image, mask = runners["sd", "torch"], _image(4), _mask()
    hidden, seen = image.copy(), image.copy()
    hidden[mask], seen[~mask] = 0, 0
    drawn = [
        draw_together(runner, [recipe(image=each, mask=mask)])[0].latents
        for each in (image, hidden, seen)
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2], atol=1e-3)


def test_an_lcm_and_a_tiny_vae(tmp_path: Path) -> None:
    """A guidance embedding beside the mask, and a VAE beside the model's own."""
    folder = make_checkpoint(tmp_path / "lcm", lcm=True, inpainting=True)
    tiny_vae = make_tiny_vae(tmp_path / "tiny-vae")
    order = Order(str(folder), "torch", tiny_vae=str(tiny_vae), max_batch=4, num_threads=1)
    runner, peer = Runner.open(order), Peer(folder)
    tiny_peer = Peer(folder, vae=AutoencoderTiny.from_pretrained(tiny_vae))
    wanted = [masked(4, 8.5, 1.0), masked(3, 1.0, 0.7, decoder="tiny")]
    first, second = draw_together(runner, wanted)
    runner.close()
    assert_agree(first, peer.draw(wanted[0]))
    assert_agree(second, tiny_peer.draw(wanted[1]))


def test_warming_up_draws_every_part(runners: dict[tuple[str, str], Runner]) -> None:
    for runner in runners.values():
        runner.warm_up()


def test_single_files(folders: dict[str, Path], checkpoints: Path, tmp_path: Path) -> None:
    """Whole ones too, where the configurations say 4 channels."""
    theirs = StableDiffusionInpaintPipeline.from_pretrained(folders["sd"])
    file = tmp_path / "it.safetensors"
    save_file({key: w.contiguous() for key, w in checkpoint_state(theirs).items()}, file)
    ours = load_pipeline(file, "fp32", Overrides(architecture=checkpoints / "tiny-sd"))
    expected = theirs.unet.state_dict()
    for key, weight in ours.unet.state_dict().items():
        assert torch.equal(weight, expected[key])


def test_configurations_of_published_inpainting_checkpoints() -> None:
    first = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
        "first_stage_model.decoder.conv_in.bias": (512,),
    }
    found = architecture_of(Header(Path("it.safetensors"), first, {}))
    assert found.name == "stable-diffusion-v1-5"


def test_a_unet_of_nine_channels_on_a_base_of_four(
    folders: dict[str, Path], checkpoints: Path
) -> None:
    """By its folder, and by its file alone."""
    folder = folders["sd"] / "unet"
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        overrides = Overrides(components={"unet": path})
        pipeline = load_pipeline(checkpoints / "tiny-sd", "fp32", overrides)
        facts = load_facts(checkpoints / "tiny-sd", pipeline, overrides)
        assert facts.takes_mask
        assert facts.latent_channels == 4
