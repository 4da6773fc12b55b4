"""Messages as frames over a socket: a mark, the number of the call that they belong to, their length, and the body."""

from __future__ import annotations

import socket
import struct

_HEADER = struct.Struct("!4sQQ")
_MARK = b"dots"
_AT_ONCE = 2**20
SETUP = 0
"""Number of the messages that belong to no call."""


class GarbledError(Exception):
    """What arrives is not a frame within the limit: something else has written to the socket."""


def send(connection: socket.socket, number: int, body: bytes, timeout: float | None = None) -> None:
    """Send a frame. Raises OSError when the other end has closed, or does not read it within `timeout` seconds."""
    connection.settimeout(timeout)
    try:
        connection.sendall(_HEADER.pack(_MARK, number, len(body)) + body)
    finally:
        connection.settimeout(None)  # with one, `recv` would wait in spite of MSG_DONTWAIT


def receive(connection: socket.socket) -> tuple[int, bytes]:
    """Wait for a frame and return its number and body. Raises EOFError when the other end has closed."""
    _, number, size = _HEADER.unpack(_exactly(connection, _HEADER.size))
    return number, _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), _AT_ONCE))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


class FrameReader:
    """Reads frames as they arrive, without ever waiting for the rest of one.

    Args:
        connection: the socket.
        limit: largest accepted body, in bytes.
    """

    def __init__(self, connection: socket.socket, limit: int) -> None:
        self._connection, self._limit = connection, limit
        self._buffer = bytearray()

    def read(self) -> list[tuple[int, bytes]]:
        """Return numbers and bodies of the frames that are complete.

        Raises:
            EOFError: the other end has closed.
            GarbledError: what arrives is not a frame, or a longer one than allowed.
        """
        try:
            part = self._connection.recv(_AT_ONCE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        self._buffer += part
        frames = []
        while len(self._buffer) >= _HEADER.size:
            mark, number, size = _HEADER.unpack_from(self._buffer)
            if mark != _MARK or size > self._limit:
                raise GarbledError
            end = _HEADER.size + size
            if len(self._buffer) < end:
                break
            frames.append((number, bytes(self._buffer[_HEADER.size : end])))
            del self._buffer[:end]
        return frames
