"""How much one API key may ask for: images a minute, and images at a time.

Counts only; who is who, `service.access.keys` says. Each replica counts what it serves itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from service.errors import BadRequest, RateLimited

MINUTE_S = 60.0


class Priority(IntEnum):
    """Whose rows go first; the scheduler compares the numbers."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever a key belongs to. Without keys everyone is the tenant without a name.

    A limit of 0 is none. ``priority`` is what a request gets that asks for none, and
    ``max_priority`` the most that one can ask for.
    """

    name: str = ""
    priority: Priority = Priority.NORMAL
    max_priority: Priority = Priority.HIGH
    images_per_minute: int = 0
    max_open_images: int = 0

    def allowed(self, asked: Priority | None) -> Priority:
        """What a request gets that asks for this: no more than the tenant may have."""
        return self.priority if asked is None else min(asked, self.max_priority)


class Quotas:
    """What each tenant has used. Called on the event loop alone; ``clock`` is in seconds.

    The rate is a leaky bucket (the generic cell rate algorithm): a minute's images may come at
    once, and from then on one every ``60 / images_per_minute`` seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: Counter[str] = Counter()  # images, by tenant
        self._paid_until: dict[str, float] = {}  # when the images taken so far were all due

    def check(self, tenant: Tenant, num_images: int, param: str = "n") -> None:
        """Refuse what `take` would, and count nothing. ``param`` is the field that says how many.

        Raises:
            RateLimited: it would exceed a limit of this tenant now.
            BadRequest: it alone exceeds one.
        """
        for limit, what in (
            (tenant.max_open_images, "at a time"),
            (tenant.images_per_minute, "a minute"),
        ):
            if limit and num_images > limit:
                raise BadRequest(
                    f"{param} is {num_images}; this API key may have {limit} images {what}",
                    param=param,
                )
        self._check_open(tenant, num_images)
        if tenant.images_per_minute:
            self._due(tenant, num_images)

    def take(self, tenant: Tenant, num_images: int) -> None:
        """Count a request of so many images. Raises what `check` does, and then counts nothing."""
        self.check(tenant, num_images)
        if tenant.images_per_minute:
            self._paid_until[tenant.name] = self._due(tenant, num_images)
        self._open[tenant.name] += num_images

    def give_back(self, tenant: Tenant, num_images: int) -> None:
        """A request has ended, however it did."""
        self._open[tenant.name] -= num_images
        self._open += Counter()  # forgets those that have none

    def refund(self, tenant: Tenant, num_images: int) -> None:
        """A request that was counted has not been accepted."""
        self.give_back(tenant, num_images)
        if tenant.images_per_minute:
            self._paid_until[tenant.name] -= num_images * MINUTE_S / tenant.images_per_minute

    def _check_open(self, tenant: Tenant, num_images: int) -> None:
        num_open, limit = self._open[tenant.name], tenant.max_open_images
        if limit and num_open + num_images > limit:
            raise RateLimited(
                f"{num_open} images of this API key are waiting or running and this request would "
                f"add {num_images}; at most {limit} may be",
                retry_after_s=1,
            )

    def _due(self, tenant: Tenant, num_images: int) -> float:
        now, limit = self._clock(), tenant.images_per_minute
        due = max(now, self._paid_until.get(tenant.name, 0.0)) + num_images * MINUTE_S / limit
        if due > now + MINUTE_S + 1e-6:  # of rounding
            raise RateLimited(
                f"this API key may have {limit} images a minute and has had them",
                retry_after_s=due - now - MINUTE_S,
            )
        return due
