"""Images kept for a while as files, so that an answer can name one by a URL.

A folder that all replicas share: any of them answers for what another drew, and a restart loses
nothing. Names are secrets of 192 bits, and whoever has one may have the image. Only files of such
names are ever touched here. A file's time of change is when it expires, as its client was told:
services of other settings, and successors, may share the folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.web.images import MEDIA_TYPES

if TYPE_CHECKING:
    from service.web.schema import OutputFormat

logger = logging.getLogger("fourstep.image_files")

NUM_SECRET_BYTES = 24
BY_SUFFIX: dict[str, str] = {f".{name}": media for name, media in MEDIA_TYPES.items()}
NAME = re.compile(rf"[A-Za-z0-9_-]{{32}}({'|'.join(map(re.escape, BY_SUFFIX))})")
UNFINISHED = ".part"
# A replica looks at the folder again after writing this share of the limit, and leaves at most that
# one: together eight replicas stay within the limit.
UNSWEPT_SHARE = 1 / 64
SWEPT_SHARE = 7 / 8
SWEEP_S = 60.0  # an expired file is answered no more at once, and gone after this
UNFINISHED_S = 60.0  # no write takes as long: its replica was killed


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One kept image, with the seconds that it has left."""

    data: bytes
    media_type: str
    left_s: float


class ImageFiles:
    """The folder as one replica sees it. All methods block; `keep` and `read` run on any thread.

    ``observe`` is told number and bytes of the files after every look at the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        life_s: float,
        max_bytes: int,
        observe: Callable[[int, int], None] = lambda num_files, num_bytes: None,
    ) -> None:
        self.life_s = life_s
        self._folder = folder
        self._max_bytes = int(max_bytes * SWEPT_SHARE)
        self._max_unswept_bytes = int(max_bytes * UNSWEPT_SHARE)
        self._observe = observe
        self._lock = threading.Lock()
        self._num_unswept_bytes = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Sweep from now on; no effect where that has begun."""
        if self._thread is None:
            self._closed.clear()
            self._thread = threading.Thread(
                target=self._sweep_on, name="fourstep-image-files", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Stop sweeping. The files stay: other replicas, and this one's successor, have them."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keep(self, data: bytes, output_format: OutputFormat) -> str | None:
        """The name of the new file; None where it could not be kept: no room, or a full disk."""
        with self._lock:
            self._num_unswept_bytes += len(data)
            due = self._num_unswept_bytes > self._max_unswept_bytes
        if len(data) > self._max_bytes:
            logger.error("an image of %d bytes is not kept: image_files_bytes", len(data))
            return None
        if due:
            self.sweep(room_bytes=len(data))
        name = f"{secrets.token_urlsafe(NUM_SECRET_BYTES)}.{output_format}"
        unfinished = self._folder / f"{name}{UNFINISHED}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            expires = time.time() + self.life_s
            os.utime(unfinished, (expires, expires))
            unfinished.rename(self._folder / name)
        except OSError as error:
            logger.error("an image is not kept in image_files_dir: %s", error)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return None
        return name

    def read(self, name: str) -> ImageFile | None:
        """The image of that name; None where it is expired, dropped, or never was."""
        known = NAME.fullmatch(name)
        if not known:
            return None
        try:
            with (self._folder / name).open("rb") as file:
                left_s = os.fstat(file.fileno()).st_mtime - time.time()
                data = file.read()
        except FileNotFoundError:
            return None
        return ImageFile(data, BY_SUFFIX[known[1]], left_s) if left_s > 0 else None

    def sweep(self, room_bytes: int = 0) -> None:
        """Remove what is expired or was never finished; then whatever expires next, until
        ``room_bytes`` more fit in. What is being written goes last.
        """
        now, kept = time.time(), []
        with self._lock:
            self._num_unswept_bytes = room_bytes
        for path, stat in self._files():
            unfinished = path.name.endswith(UNFINISHED)
            if now < stat.st_mtime + (UNFINISHED_S if unfinished else 0.0):
                kept.append((unfinished, stat.st_mtime_ns, stat.st_size, path))
            else:
                path.unlink(missing_ok=True)
        kept.sort(reverse=True)
        num_bytes = sum(size for *_, size, _ in kept)
        while kept and num_bytes + room_bytes > self._max_bytes:
            *_, size, next_to_expire = kept.pop()
            next_to_expire.unlink(missing_ok=True)
            num_bytes -= size
        self._observe(len(kept), num_bytes)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if NAME.fullmatch(entry.name.removesuffix(UNFINISHED)):
                        try:
                            yield Path(entry.path), entry.stat(follow_symlinks=False)
                        except FileNotFoundError:  # another replica swept it
                            continue
        except FileNotFoundError:  # nothing was kept yet
            return

    def _sweep_on(self) -> None:
        while True:
            try:
                self.sweep()
            except OSError as error:
                logger.error("image_files_dir cannot be swept: %s", error)
            if self._closed.wait(min(SWEEP_S, self.life_s)):
                return
