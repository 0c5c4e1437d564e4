"""Embeddings of prompts are kept while they fit, in memory of their own."""

from __future__ import annotations

import torch

from engines.drawing import prompts
from engines.drawing.prompts import Encoded, Prompts


def _encoded(width: int = 4096) -> Encoded:
    """As of T5-XXL: 2 MB."""
    return {"prompt_embeds": torch.zeros(120, width), "mask": torch.ones(120, dtype=torch.int64)}


def test_the_bound_is_one_of_bytes() -> None:
    kept = Prompts()
    for number in range(200):
        kept.add((), b"often", _encoded())
        kept.add((), bytes([number]), _encoded())
        assert kept.num_bytes <= prompts.KEPT_BYTES
    found = [number for number in range(200) if kept.find((), bytes([number]))]
    size = sum(value.nbytes for value in _encoded().values())
    assert len(found) + 1 == prompts.KEPT_BYTES // size
    assert found == list(range(200 - len(found), 200))
    kept.clear()
    assert kept.num_bytes == 0
    assert kept.find((), b"often") is None


def test_a_row_does_not_keep_its_batch() -> None:
    kept, batch = Prompts(), torch.rand(8, 120, 64)
    kept.add((), b"x", {"prompt_embeds": batch[3]})
    found = kept.find((), b"x")
    assert found is not None
    assert torch.equal(found["prompt_embeds"], batch[3])
    assert found["prompt_embeds"].untyped_storage().nbytes() == batch[3].nbytes
