"""What a run of a comparison has left so far: nothing, a checkpoint to go on from, or its account."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.runs.changed_config import changes
from app.runs.checkpoint_files import by_age
from app.studies.compare.machine import describe_machine
from app.studies.compare.settings import digest
from datamodules.errors import UserError

ASKED = "asked.json"
_SUMMARY = "summary.json"


def check_unchanged(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raises UserError when a run was begun there that was asked for otherwise."""
    saved = _read(folder / ASKED)
    if saved is None or saved.get("sha256") == digest(asked):
        return
    found = changes(saved.get("asked") or {}, asked) or ["how it was asked for"]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise UserError(
        f"{folder} holds a run that was asked for otherwise: {found[0]}{more}; give another --out, the same settings, "
        "or remove that folder"
    )


def note_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Keeps what a run is asked for, and what it is made on, before it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ASKED).exists():
        content = {"sha256": digest(asked), "machine": describe_machine(), "asked": asked}
        temporary = folder / f".{ASKED}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / ASKED)


def machine_of(folder: Path) -> dict[str, str]:
    """What a run was made on."""
    return dict((_read(folder / ASKED) or {}).get("machine", {}))


def asked_of(folder: Path) -> dict[str, Any]:
    """What a run was asked for."""
    return dict((_read(folder / ASKED) or {}).get("asked", {}))


def version_of(folder: Path) -> Path | None:
    """The newest `version_N` of a run; None before it has begun."""
    versions = {
        int(match[1]): path
        for path in folder.glob("version_*")
        if (match := re.fullmatch(r"version_(\d+)", path.name)) and path.is_dir()
    }
    return versions[max(versions)] if versions else None


def account_of(folder: Path) -> dict[str, Any] | None:
    """The `summary.json` of a run that is complete; None for any other."""
    version = version_of(folder)
    summary = None if version is None else _read(version / _SUMMARY)
    return summary if summary is not None and summary.get("completed") is True else None


def clear_unsaved(folder: Path) -> None:
    """Removes what a run left that ended before its first checkpoint, from which nothing can go on."""
    for version in folder.glob("version_*"):
        if not by_age(version / "checkpoints"):
            shutil.rmtree(version)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
