"""The loop: a killed run resumes to the same weights; bad runs stop with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.distill import training
from engines.distill.training import Course, Draws, Place, TrainingError, train

COURSE = Course(num_steps=10, batch_size=8, learning_rate=0.1, warmup_steps=2)


class _Killed(Exception):
    pass


def _learn(place: Place, *, kill_at: int | None = None, course: Course = COURSE) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    calls = 0

    def loss_of(draws: Draws) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise _Killed
        inputs = torch.randn(course.batch_size, 4, generator=draws.torch)
        targets = torch.tensor(draws.numpy.random((course.batch_size, 1)), dtype=torch.float32)
        loss: Tensor = ((model(inputs) - targets) ** 2).mean()
        return loss

    train("toy", course, place, list(model.parameters()), loss_of)
    return [p.detach() for p in model.parameters()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 3)
    return Place(tmp_path, torch.device("cpu"))


def test_resumes_to_the_same_weights(place: Place, tmp_path: Path) -> None:
    whole = _learn(Place(tmp_path / "whole", place.device))
    with pytest.raises(_Killed):
        _learn(place, kill_at=9)
    assert (place.folder / "toy.checkpoint.pt").exists()
    resumed = _learn(place)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
    assert not list(place.folder.glob("toy*"))


def test_another_courses_checkpoint_is_refused(place: Place) -> None:
    with pytest.raises(_Killed):
        _learn(place, kill_at=9)
    other = Course(num_steps=20, batch_size=8, learning_rate=0.1, warmup_steps=2)
    with pytest.raises(TrainingError, match=r"other settings.*--work"):
        _learn(place, course=other)


def test_a_diverged_loss_stops_and_names_the_rate(place: Place) -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(TrainingError, match=r"step 0 is inf.*--learning-rate"):
        train("bad", COURSE, place, [parameter], lambda _: parameter.sum() / 0)


def test_a_full_disk_is_refused_before_training(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MIN_FREE_BYTES", 2**60)
    with pytest.raises(TrainingError, match=r"GB free; training needs .* free some"):
        _learn(place)
