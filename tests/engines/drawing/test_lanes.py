"""What the host does between engine calls: little, and the same whatever came before."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from engines.drawing.runner import Runner
from tests.engines.peers import recipe

Runners = dict[tuple[str, str], Runner]


SHARING = ("aten.detach", "aten.lift_fresh")  # with numpy: no data moves


class _Operations(TorchDispatchMode):
    """Names of torch's operations on data; ONNX Runtime's own work is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(SHARING):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_of_the_same_rows_gathers_only_their_noise(runners: Runners) -> None:
    """Each operation hands the interpreter to the HTTP threads; under load that is what costs."""
    runner = runners["tiny-lcm", "onnxruntime"]
    rows = [runner.start(recipe(seed=seed, num_steps=4)) for seed in range(8)]
    runner.encode_text(rows)
    runner.denoise(rows)
    with _Operations() as operations:
        runner.denoise(rows)
    # A draw for each row, one stack of them, and each of the two outputs taken apart.
    assert len(operations.names) <= len(rows) + 3, operations.names


def test_the_engine_runs_next_after_what_is_to_happen_before(runners: Runners) -> None:
    """Between the two is no operation that would hand the interpreter to a thread just woken."""
    runner = runners["tiny-lcm", "onnxruntime"]
    rows = [runner.start(recipe(seed=seed, num_steps=2)) for seed in range(2)]
    runner.encode_text(rows)
    with _Operations() as operations:
        runner.denoise(rows, lambda: operations.names.append("before"))
    before = operations.names.index("before")
    assert "aten.stack.default" in operations.names[:before]  # the inputs are laid out by then
    assert not [name for name in operations.names[before:] if "stack" in name]


def test_latents_do_not_depend_on_who_joined_and_left(runners: Runners) -> None:
    """Continued in the same call's layout, or laid out anew before every step: the same numbers."""
    runner = runners["tiny-sd", "onnxruntime"]
    wanted = [
        recipe(sampler="euler_ancestral", num_steps=4, seed=1),
        recipe(sampler="lcm", num_steps=4, seed=2, guidance_scale=5.0, negative_prompt="dark"),
    ]
    together, apart = ([runner.start(each) for each in wanted] for _ in range(2))
    guest = runner.start(recipe(num_steps=4, seed=3))
    runner.encode_text([*together, *apart, guest])
    for step in range(3):
        runner.denoise(together)
        runner.denoise([*apart, guest] if step % 2 else apart[::-1])
    for one, other in zip(together, apart, strict=True):
        assert one.latents is not None
        assert other.latents is not None
        assert np.abs((one.latents - other.latents).numpy()).max() <= 1e-5


def test_rows_that_were_elsewhere_meanwhile_are_laid_out_anew(runners: Runners) -> None:
    """A layout is kept for each call that may run: an old one must not be taken for the present."""
    runner = runners["tiny-lcm", "onnxruntime"]
    wanted = [recipe(num_steps=4, seed=seed) for seed in (1, 2)]
    together, apart = ([runner.start(each) for each in wanted] for _ in range(2))
    runner.encode_text([*together, *apart])
    runner.info = dataclasses.replace(runner.info, max_calls=4)  # so many layouts are kept
    for _ in range(4):
        runner.denoise(together)
    runner.denoise(apart)
    for row in apart:
        runner.denoise([row])
    for _ in range(2):
        runner.denoise(apart)
    runner.info = dataclasses.replace(runner.info, max_calls=1)
    for one, other in zip(together, apart, strict=True):
        assert one.latents is not None
        assert other.latents is not None
        assert np.abs((one.latents - other.latents).numpy()).max() <= 1e-5
