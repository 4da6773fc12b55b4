"""Checkpoint files that are written as they are serialised, with their checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from app.runs.background import Background, copied


class StreamedCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint straight to its file, without a second copy in memory, and its SHA-256 on the way."""

    def __init__(self) -> None:
        self.digests: dict[Path, str] = {}
        """Checksums of the files that were written, until someone takes them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file and flush it to disk.

        Args:
            checkpoint: what to write.
            path: where to.
            storage_options: a `Background` that writes a copy of the checkpoint; by default the caller waits.
        """
        if isinstance(storage_options, Background):
            copy = copied(checkpoint)
            storage_options.submit(lambda: self._write(copy, Path(path)))
        else:
            self._write(checkpoint, Path(path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # writes and flushes, nothing else
            file.flush()
            os.fsync(file.fileno())
        self.digests[path] = hashing.digest.hexdigest()


class _Hashing:
    """A file whose content is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()
