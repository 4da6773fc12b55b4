"""What a resumed run does otherwise than the run whose checkpoint it takes, setting by setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

_SHOWN = 20
_EXPECTED = ("ckpt_path", "weights_only", "trainer.logger.init_args.version", "on_damaged_checkpoint")
"""Settings that a resume changes by itself."""
_ABSENT = "(not set)"


def changes(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """`name: before -> now` for every setting that differs."""
    before, now = dict(_flat(saved)), dict(_flat(given))
    names = [name for name in {**before, **now} if name not in _EXPECTED]
    return [
        f"{name}: {before.get(name, _ABSENT)} -> {now.get(name, _ABSENT)}"
        for name in names
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]


def report(checkpoint: Path, given: Mapping[str, Any]) -> str | None:
    """What to print when a run goes on from `checkpoint` with other settings; None when they are the same.

    Known is what the `config.yaml` of the checkpoint's run says; without one there is nothing to compare.
    """
    file = checkpoint.resolve().parent.parent / "config.yaml"
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(saved, dict):
        return None
    found = changes(saved, given)
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    lines = [f"  {line}" for line in [*found[:_SHOWN], *more]]
    return (
        "\n".join([f"going on from {checkpoint.name} with other settings than its run had:", *lines]) if found else None
    )


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children: Iterator[tuple[str, Any]] | None = None
    if isinstance(node, Mapping) and node:
        children = ((f"{path}.{key}" if path else str(key), value) for key, value in node.items())
    elif isinstance(node, list) and node:
        children = ((f"{path}[{index}]", value) for index, value in enumerate(node))
    if children is None:
        yield path, node
        return
    for name, value in children:
        yield from _flat(value, name)
