"""From one prompt to the next, frame by frame."""

from __future__ import annotations

from collections import deque

from engines.families.recipe import Blend

MAX_TOWARDS = 4  # prompts of one picture; each is read by the text encoder and blended in


class Slide:
    """The way from prompt to prompt: what its embeddings are blended of, frame by frame."""

    def __init__(self) -> None:
        self._prompt = ""
        self._towards: deque[tuple[str, int]] = deque()  # a prompt, and in how many frames
        self._done: deque[int] = deque()  # frames of each

    def next(self, prompt: str, num_frames: int) -> tuple[str, tuple[Blend, ...]]:
        """For one more frame: where it starts, and what it moves towards."""
        if prompt != (self._towards[-1][0] if self._towards else self._prompt):
            if not self._prompt or not num_frames:
                self._prompt = prompt
                self._towards.clear()
                self._done.clear()
            else:
                if len(self._towards) == MAX_TOWARDS:  # the oldest counts as come to
                    self._prompt, _ = self._towards.popleft()
                    self._done.popleft()
                self._towards.append((prompt, num_frames))
                self._done.append(0)
        self._done = deque(done + 1 for done in self._done)
        whole = [
            done >= wanted for (_, wanted), done in zip(self._towards, self._done, strict=True)
        ]
        if True in whole:  # all before it is behind it
            num_behind = len(whole) - whole[::-1].index(True)
            for _ in range(num_behind):
                self._prompt, _ = self._towards.popleft()
                self._done.popleft()
        shares = zip(self._towards, self._done, strict=True)
        return self._prompt, tuple(Blend(text, done / wanted) for (text, wanted), done in shares)
