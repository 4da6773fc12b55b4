"""A cache of what a judge has replied, shared by workers and runs through a file."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from datamodules.errors import UserError

logger = logging.getLogger("dots.rewards")


class ReplyCache:
    """Replies by the digest of their request: the newest in memory, all of them in a file if there is one.

    The file is JSONL and only ever appended to, under a lock, so that processes may share it. A line that a process has
    not finished when it was killed is ignored.

    Args:
        path: the file; None for none.
        entries: replies held in memory.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | None, entries: int) -> None:
        self._entries = entries
        self._known: OrderedDict[str, str] = OrderedDict()
        self._file: int | None = None
        self._read = 0
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            except OSError as error:
                raise UserError(
                    f"The cache {path} cannot be written ({error.strerror}). Name another file, or leave cache out."
                ) from error
            self.refresh()

    def get(self, digest: str) -> str | None:
        if (reply := self._known.get(digest)) is not None:
            self._known.move_to_end(digest)
        return reply

    def refresh(self) -> None:
        """Read what any process has appended to the file since the last time."""
        if self._file is None:
            return
        if (size := os.fstat(self._file).st_size) < self._read:
            self._read = 0  # somebody has emptied it
        rest = b""
        while self._read + len(rest) < size and (part := os.pread(self._file, 2**20, self._read + len(rest))):
            *lines, rest = (rest + part).split(b"\n")
            self._read += sum(len(line) + 1 for line in lines)
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self._keep(str(entry["request"]), str(entry["reply"]))

    def add(self, digest: str, reply: str) -> None:
        self._keep(digest, reply)
        if self._file is None:
            return
        line = json.dumps({"request": digest, "reply": reply}).encode() + b"\n"
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                size = os.fstat(self._file).st_size
                if size and os.pread(self._file, 1, size - 1) != b"\n":
                    line = b"\n" + line  # after one that was killed while it wrote
                while line:
                    line = line[os.write(self._file, line) :]
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError as error:
            logger.warning("The cache of judgements is not written any more: %s.", error)
            self._file = None

    def _keep(self, digest: str, reply: str) -> None:
        self._known[digest] = reply
        self._known.move_to_end(digest)
        while len(self._known) > self._entries:
            self._known.popitem(last=False)
