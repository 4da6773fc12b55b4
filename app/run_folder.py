"""Where a run leaves what it produces, and where a stopped one is found again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from datamodules.errors import UserError

LAST = "last.ckpt"


def run_folder(trainer: Trainer) -> Path:
    """`runs/NAME/version_N`: the logger's folder, or the trainer's root without a logger.

    Right on rank 0, which is the one that writes. `trainer.log_dir` would make the other ranks agree, but stalls where
    one rank alone asks for it.
    """
    logger: Any = trainer.logger
    return Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir)


def find_last(save_dir: Path, name: str) -> tuple[int, Path]:
    """Version and checkpoint of the newest run under `save_dir/name` that has one.

    Raises UserError when there is none.
    """
    found = []
    for folder in (save_dir / name).glob("version_*"):
        version = re.fullmatch(r"version_(\d+)", folder.name)
        if version and (folder / "checkpoints" / LAST).exists():
            found.append((int(version[1]), folder / "checkpoints" / LAST))
    if not found:
        raise UserError(
            f"--ckpt_path last: no checkpoint under {save_dir / name}/version_*/checkpoints; "
            "expected a stopped run of this name: leave --ckpt_path out to start one"
        )
    return max(found)
