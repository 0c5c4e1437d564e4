"""Stages 5 and 7: the teacher in a few steps. A whole student (LCM), or a LoRA on the teacher.

One loss for both: the student at t_{n+k} must say what the target says at t_n, one guided solver
step further (arXiv 2310.04378, algorithm 1; arXiv 2311.05556 for the LoRA).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engines.distill.base import Batch, LatentData, compiled_at_native
from engines.distill.consistency import (
    TARGET_DECAY,
    Solver,
    draw_guidance,
    guidance_embedding,
    pseudo_huber,
)
from engines.distill.lora import add_lora
from engines.distill.networks import (
    GUIDANCE_WIDTH,
    build_unet,
    noise_schedule,
    prepare_for_training,
)
from engines.distill.samples import tokenize
from engines.distill.training import Course, Draws, Place, train

# Four times this rate wears down what the teacher knew of low noise, and more steps then make worse
# pictures, not better ones.
COURSE = Course(num_steps=800, batch_size=64, learning_rate=1.5e-4, warmup_steps=50, average=0.995)
LORA_COURSE = dataclasses.replace(COURSE, num_steps=500, average=0.99)
LORA_RANK = 16
LORA_GUIDANCE = 2.0  # w that the LoRA builds in, having no guidance embedding to be told another

Network = Callable[..., Tensor]


def train_lcm(
    course: Course, place: Place, data: LatentData, tokenizer: Any, encoder: Any, teacher: Any
) -> Any:
    """Distil and return the student's UNet, which takes w as `timestep_cond`."""
    torch.manual_seed(place.seed)
    student = build_unet(guidance_embedding=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)  # begin as the teacher
    _distil("lcm", course, place, data, tokenizer, encoder, teacher, student)
    return student.requires_grad_(False)


def train_lcm_lora(
    course: Course, place: Place, data: LatentData, tokenizer: Any, encoder: Any, teacher: Any
) -> Any:
    """Distil the same acceleration into a LoRA; returns the teacher's copy that carries it.

    With an EMA target as the whole student has. Against the student itself as target, which
    diffusers' LoRA script takes, the pictures lost their contrast within 300 steps.
    """
    torch.manual_seed(place.seed)
    student = copy.deepcopy(teacher)
    add_lora(student, LORA_RANK)
    _distil("lcm-lora", course, place, data, tokenizer, encoder, teacher, student)
    return student


def _distil(
    stage: str,
    course: Course,
    place: Place,
    data: LatentData,
    tokenizer: Any,
    encoder: Any,
    teacher: Any,
    student: Any,
) -> None:
    """Train what the student leaves trainable, in place."""
    for unet in (teacher, student):
        prepare_for_training(unet, place.device)
    target = copy.deepcopy(student)
    pairs = zip(student.parameters(), target.parameters(), strict=True)
    live, held = map(list, zip(*((p, q) for p, q in pairs if p.requires_grad), strict=True))
    target.requires_grad_(False)

    @torch.no_grad()
    def follow() -> None:
        torch._foreach_lerp_(held, [p.detach() for p in live], 1 - TARGET_DECAY)

    loss_of = _consistency_loss(course, place, data, tokenizer, encoder, teacher, student, target)
    train(stage, course, place, live, loss_of, lambda: held, follow)
    student.eval()


def _consistency_loss(
    course: Course,
    place: Place,
    data: LatentData,
    tokenizer: Any,
    encoder: Any,
    *unets: Any,  # teacher, student, target
) -> Callable[[Draws], Tensor]:
    schedule = noise_schedule()
    solver = Solver(schedule.alphas_cumprod.to(place.device))
    embedded = unets[1].config.time_cond_proj_dim is not None
    teacher, student, target = (compiled_at_native(unet, place) for unet in unets)
    with torch.no_grad():
        empty = encoder(tokenize(tokenizer, [""]).to(place.device))[0]  # [1, 32, 96]

    def predict(
        network: Network, batch: Batch, latents: Tensor, t: Tensor, w: Tensor, embeds: Tensor
    ) -> Tensor:
        cond = {"timestep_cond": guidance_embedding(w, GUIDANCE_WIDTH)} if embedded else {}
        velocity = network(latents, t, embeds, native=batch.native, **cond)
        return solver.consistency(latents, velocity, t)

    def loss_of(draws: Draws) -> Tensor:
        batch = data.draw(draws, course.batch_size)
        rows = len(batch.latents)
        t = solver.draw_timesteps(rows, draws.torch)
        w = draw_guidance(rows, draws.torch).to(place.device)
        if not embedded:
            w = torch.full_like(w, LORA_GUIDANCE)
        noisy = schedule.add_noise(batch.latents, batch.noise, t)
        with torch.no_grad():
            embeds = encoder(batch.token_ids)[0]  # [B, 32, 96]
            both = torch.cat([embeds, empty.expand(rows, -1, -1)])
            velocity = teacher(noisy.repeat(2, 1, 1, 1), t.repeat(2), both, native=batch.native)
            said, unsaid = velocity.chunk(2)
            guided = said + w[:, None, None, None] * (said - unsaid)
            earlier = solver.step(noisy, guided, t)
            goal = predict(target, batch, earlier, solver.before(t), w, embeds)
        return pseudo_huber(predict(student, batch, noisy, t, w, embeds), goal)

    return loss_of
