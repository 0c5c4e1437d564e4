"""Calls side by side agree on what is set up; a change waits for them and is not overtaken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines.drawing.turnstile import Turnstile


class Setting:
    """What can be set, and who relies on it."""

    def __init__(self) -> None:
        self.turnstile = Turnstile()
        self.value = ""
        self._inside = 0
        self.most_inside = 0

    def visit(self, wanted: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        def change() -> None:
            assert self._inside == 0
            self.value = wanted

        with self.turnstile.enter(lambda: self.value == wanted, change):
            self._inside += 1
            self.most_inside = max(self.most_inside, self._inside)
            meanwhile()
            assert self.value == wanted
            self._inside -= 1


def test_those_who_agree_are_in_together_and_no_others() -> None:
    setting = Setting()
    meet = threading.Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(setting.visit, "a", meet.wait) for _ in range(2)]:
            future.result()
    assert setting.most_inside == 2
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(setting.visit, "ab"[i // 3 % 2]) for i in range(400)]:
            future.result()


def test_a_change_is_not_put_off_by_others_who_come_and_go() -> None:
    setting = Setting()
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            setting.visit("a")

    with ThreadPoolExecutor(4) as pool:
        crowd = [pool.submit(come_and_go) for _ in range(3)]
        try:
            pool.submit(setting.visit, "b").result(timeout=30)
        finally:
            done.set()
        for future in crowd:
            future.result()


def test_a_change_that_fails_is_the_callers_and_leaves_the_way_free() -> None:
    turnstile = Turnstile()

    def fail() -> None:
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"), turnstile.enter(lambda: False, fail):
        raise AssertionError("not in")
    with turnstile.enter(lambda: True, fail):
        pass
