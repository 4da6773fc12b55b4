"""A chunk of weights in shared memory, as a file that other users cannot open and that is unlinked after use."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from app.engines.wire.chunks import TensorSpec, as_bytes, layout, unpack

FOLDER = "/dev/shm"
_PREFIX = f"{FOLDER}/dots-"


@contextmanager
def shared_chunk(chunk: Sequence[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, list[TensorSpec]]]:
    """Write the tensors to a new file, yield its path and contents, and unlink it at the end of the block.

    Raises:
        OSError: the shared memory is full.
    """
    specs = [TensorSpec.of(name, tensor) for name, tensor in chunk]
    starts, size = layout(specs)
    name = f"{os.getpid()}-{secrets.token_hex(8)}"
    path, unlocked = f"{_PREFIX}{name}", f"{FOLDER}/.dots-{name}"
    descriptor = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Named only once it is locked, so that `remove_abandoned` of another process never finds it unlocked.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.rename(unlocked, path)
        # Reserve the space first: a full file system is an error here, but a SIGBUS in a mapping.
        os.posix_fallocate(descriptor, 0, max(size, 1))
        for start, (_, tensor) in zip(starts, chunk, strict=True):
            data = as_bytes(tensor).cpu().numpy().data
            while len(data):
                written = os.pwrite(descriptor, data, start)
                data, start = data[written:], start + written
        yield path, specs
    finally:
        os.close(descriptor)
        with suppress(FileNotFoundError):
            os.unlink(path)


def remove_abandoned() -> None:
    """Remove the chunks of processes that were killed in a push. A chunk is locked for as long as its process lives."""
    for path in glob.glob(f"{glob.escape(_PREFIX)}*"):
        with suppress(OSError):  # another user's, locked, or removed meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
            finally:
                os.close(descriptor)


def read_chunk(path: str, specs: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """Return the names and tensors of a file written by another process of this user.

    The tensors map the file, and stay valid after it is unlinked.

    Raises:
        ValueError: the path is not such a file.
    """
    if not path.startswith(_PREFIX) or "/" in path.removeprefix(_PREFIX):
        raise ValueError(f"{path} was not written by a trainer: expected {_PREFIX}...")
    _, size = layout(specs)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or found.st_mode & 0o077 or found.st_size < size:
            raise ValueError(f"{path}: expected {size} bytes, owned by this user and inaccessible to others")
        # A private mapping: writes here do not reach the trainer's file.
        flat = torch.from_file(f"/proc/self/fd/{descriptor}", shared=False, size=size, dtype=torch.uint8)
    finally:
        os.close(descriptor)
    return unpack(flat, specs)
