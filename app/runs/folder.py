"""Where a run leaves what it produces, and where a stopped one is found again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from app.runs.checkpoint_files import OnDamage, by_age, newest_whole
from datamodules.errors import UserError

LAST = "last.ckpt"


def run_folder(trainer: Trainer) -> Path:
    """`runs/NAME/version_N`: the logger's folder, or the trainer's root without a logger.

    Right on rank 0, which is the one that writes. `trainer.log_dir` would make the other ranks agree, but stalls where
    one rank alone asks for it.
    """
    logger: Any = trainer.logger
    return Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir)


def find_last(save_dir: Path, name: str, on_damage: OnDamage = "previous") -> tuple[int, Path] | None:
    """Version and newest whole checkpoint of the newest run under `save_dir/name`; None when there is no such run.

    Raises UserError when runs are there, but no checkpoint that can be resumed.
    """
    versions = {
        int(match[1]): folder
        for folder in (save_dir / name).glob("version_*")
        if (match := re.fullmatch(r"version_(\d+)", folder.name))
    }
    saved = [version for version, folder in versions.items() if by_age(folder / "checkpoints")]
    if not versions:
        return None
    if not saved:
        raise UserError(
            f"--ckpt_path last: no checkpoint under {save_dir / name}/version_*/checkpoints; expected a run of this "
            "name that was stopped behind its first one: leave --ckpt_path out to start anew"
        )
    return max(saved), newest_whole(versions[max(saved)] / "checkpoints", on_damage)
