"""The folder that a run writes to, and the newest run that can be resumed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from app.runs.checkpoint_files import OnDamage, by_age, newest_whole
from datamodules.errors import UserError

LAST = "last.ckpt"


def run_folder(trainer: Trainer) -> Path:
    """Return `runs/NAME/version_N`: the logger's folder, or the trainer's root folder when there is no logger.

    Correct on rank 0, the only one that writes. `trainer.log_dir` is not used because it broadcasts: it would hang when
    a single rank asks for it.
    """
    logger: Any = trainer.logger
    return Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir)


def find_last(save_dir: Path, name: str, on_damage: OnDamage = "previous") -> tuple[int, Path] | None:
    """Return the version of the newest run under `save_dir/name` and its newest intact checkpoint.

    Returns None when there is no such run. Raises UserError when there are runs, but no checkpoint to resume from.
    """
    versions = {
        int(match[1]): folder / "checkpoints"
        for folder in (save_dir / name).glob("version_*")
        if (match := re.fullmatch(r"version_(\d+)", folder.name))
    }
    if not versions:
        return None
    saved = [version for version, folder in versions.items() if by_age(folder)]
    if not saved:
        raise UserError(
            f"--ckpt_path last: no checkpoint under {save_dir / name}/version_*/checkpoints. Expected a run of this "
            "name that got as far as its first checkpoint; leave --ckpt_path out to start a new run"
        )
    return max(saved), newest_whole(versions[max(saved)], on_damage)
