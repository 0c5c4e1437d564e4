"""Stages 5 and 7: the teacher in a few steps. A whole student (LCM), or a LoRA on the teacher.

One loss for both: the student at t_{n+k} must say what the target says at t_n, one guided solver
step further (arXiv 2310.04378, algorithm 1; arXiv 2311.05556 for the LoRA).
"""

from __future__ import annotations

import copy
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
from engines.distill.lora import LCM_TARGETS, add_lora
from engines.distill.networks import (
    GUIDANCE_WIDTH,
    build_unet,
    noise_schedule,
    prepare_for_training,
)
from engines.distill.samples import tokenize
from engines.distill.training import Course, Draws, Place, train

COURSE = Course(num_steps=2_000, batch_size=64, learning_rate=6e-4, average=0.995)
LORA_COURSE = Course(num_steps=1_200, batch_size=64, learning_rate=3e-4, average=0.99)
LORA_RANK = 16
LORA_GUIDANCE = 3.0  # w that the LoRA builds in, having no guidance embedding to be told another

Network = Callable[..., Tensor]


def train_lcm(
    course: Course, place: Place, data: LatentData, tokenizer: Any, encoder: Any, teacher: Any
) -> Any:
    """Distil and return the student's UNet, which takes w as `timestep_cond`."""
    torch.manual_seed(place.seed)
    student = build_unet(guidance_embedding=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)  # begin as the teacher
    student = prepare_for_training(student, place.device)
    target = copy.deepcopy(student).requires_grad_(False)
    prepare_for_training(teacher, place.device)
    live, held = list(student.parameters()), list(target.parameters())

    @torch.no_grad()
    def follow() -> None:
        torch._foreach_lerp_(held, [p.detach() for p in live], 1 - TARGET_DECAY)

    networks = [compiled_at_native(unet, place) for unet in (student, target, teacher)]
    loss_of = _distillation(course, place, data, tokenizer, encoder, *networks, embedded=True)
    train("lcm", course, place, live, loss_of, lambda: held, follow)
    return student.eval().requires_grad_(False)


def train_lcm_lora(
    course: Course, place: Place, data: LatentData, tokenizer: Any, encoder: Any, teacher: Any
) -> Any:
    """Distil the same acceleration into a LoRA; returns the teacher's copy that carries it.

    The target is the student itself, without gradient, as in diffusers' LoRA distillation.
    """
    torch.manual_seed(place.seed)
    prepare_for_training(teacher, place.device)
    student = copy.deepcopy(teacher)
    parameters = add_lora(student, LORA_RANK, LCM_TARGETS)
    networks = [compiled_at_native(unet, place) for unet in (student, teacher)]
    student_network, teacher_network = networks
    loss_of = _distillation(
        course, place, data, tokenizer, encoder,
        student_network, student_network, teacher_network, embedded=False,
    )  # fmt: skip
    train("lcm-lora", course, place, parameters, loss_of)
    return student.eval()


def _distillation(
    course: Course,
    place: Place,
    data: LatentData,
    tokenizer: Any,
    encoder: Any,
    student: Network,
    target: Network,
    teacher: Network,
    *,
    embedded: bool,
) -> Callable[[Draws], Tensor]:
    schedule = noise_schedule()
    solver = Solver(schedule.alphas_cumprod.to(place.device))
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
