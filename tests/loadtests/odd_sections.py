"""Sections that go wrong, for `tests.loadtests.test_gpu_command`."""

from __future__ import annotations

import os
import time

from loadtests.gpu.section import Section


def well(section: Section) -> None:
    section.row("found", what="all is well", share=0.5)
    with section.attempt("a division"):
        section.row("found", what=1 / 0)


def late(section: Section) -> None:
    section.has_time("something long", 1e9)


def crash(section: Section) -> None:
    section.row("found", what="the last words")
    os.abort()


def hang(section: Section) -> None:
    section.row("found", what="about to hang")
    time.sleep(3600)
