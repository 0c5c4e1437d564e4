"""Timesteps that a row names: which samplers take them, and what may be wrong with them."""

from __future__ import annotations

import itertools

from engines.errors import InvalidInput
from engines.samplers.schedule import NoiseSchedule, Sampler

SPACE_SIGMA = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
MAX_SHOWN = 8  # of them, in a message


def refusal(noise: NoiseSchedule, sampler: Sampler) -> str | None:
    """What the sampler does instead of drawing at them; None where it does, as in diffusers."""
    if not sampler.takes_timesteps:
        return "takes none"
    options = noise.options(sampler)
    spacing = [f"{name}=True" for name in SPACE_SIGMA if options[name]]
    if options["timestep_type"] == "continuous" and options["prediction_type"] == "v_prediction":
        spacing.append("timestep_type='continuous'")
    return f"takes none with the checkpoint's scheduler option {spacing[0]}" if spacing else None


def check(timesteps: tuple[int, ...], num_steps: int, num_train_timesteps: int) -> None:
    """Raises `InvalidInput` unless they are ``num_steps``, descending and of the training's."""
    last = num_train_timesteps - 1
    if not timesteps:
        wrong = "[]; name at least one, or leave it out"
    elif len(timesteps) != num_steps:
        wrong = (
            f"{shown(timesteps)} and num_inference_steps is {num_steps}; it must be "
            f"{len(timesteps)}, one step for each, or left out"
        )
    elif any(not 0 <= timestep <= last for timestep in timesteps):
        wrong = f"{shown(timesteps)}; each must be from 0 to {last}, the training's last"
    elif any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
        wrong = f"{shown(timesteps)}; each must be below the one before it, the noisiest is first"
    else:
        return
    raise InvalidInput("timesteps", timesteps, f"timesteps is {wrong}")


def shown(timesteps: tuple[int, ...]) -> str:
    """As JSON, long lists cut."""
    listed = [str(timestep) for timestep in timesteps[:MAX_SHOWN]]
    return f"[{', '.join(listed + ['...'] * (len(timesteps) > MAX_SHOWN))}]"
