"""What the engine thread sends arrives whole, in order, and with as few wake-ups as can be."""

from __future__ import annotations

import asyncio
import functools
import threading

from service.batching.mailbox import Mailbox


def test_what_is_put_in_one_go_arrives_in_order_by_one_wake_up() -> None:
    async def listen() -> tuple[list[int], int]:
        arrived: list[int] = []
        event_loop = asyncio.get_running_loop()
        mailbox, num_wake_ups = Mailbox(event_loop), 0
        wake_up = event_loop.call_soon_threadsafe

        def counted(*args: object) -> object:
            nonlocal num_wake_ups
            num_wake_ups += 1
            return wake_up(*args)  # type: ignore[arg-type]

        event_loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        for index in range(5):  # the event loop, which runs this, cannot look in between
            mailbox.put(functools.partial(arrived.append, index))
        await asyncio.sleep(0.05)
        mailbox.put(functools.partial(arrived.append, 5))
        await asyncio.sleep(0.05)
        return arrived, num_wake_ups

    assert asyncio.run(listen()) == ([0, 1, 2, 3, 4, 5], 2)


def test_nothing_is_lost_while_the_event_loop_looks() -> None:
    async def listen() -> list[int]:
        arrived: list[int] = []
        mailbox = Mailbox(asyncio.get_running_loop())

        def send() -> None:
            for index in range(20_000):
                mailbox.put(functools.partial(arrived.append, index))

        thread = threading.Thread(target=send)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        return arrived

    assert asyncio.run(listen()) == list(range(20_000))


def test_one_letter_that_fails_keeps_no_other_back() -> None:
    async def listen() -> list[str]:
        arrived: list[str] = []
        event_loop = asyncio.get_running_loop()
        event_loop.set_exception_handler(lambda _, context: arrived.append(context["message"][:9]))
        mailbox = Mailbox(event_loop)
        mailbox.put(lambda: 1 / 0)
        mailbox.put(lambda: arrived.append("next"))
        await asyncio.sleep(0.05)
        return arrived

    assert asyncio.run(listen()) == ["Exception", "next"]


def test_a_closed_event_loop_is_no_error() -> None:
    event_loop = asyncio.new_event_loop()
    mailbox = Mailbox(event_loop)
    event_loop.close()
    mailbox.put(lambda: None)
    mailbox.put(lambda: None)
