"""Report which settings of a resumed run differ from those of the run that wrote its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

_MAX_SHOWN = 20
_CHANGED_BY_RESUME = ("ckpt_path", "weights_only", "trainer.logger.init_args.version", "on_damaged_checkpoint")
_ABSENT = "(not set)"
_KEPT = {
    r"data\..*\.p_(easy|hard)": "stays as it was: the selector has moved it since",
    r"trainer\.callbacks.*\.patience": "stays as it was: the callback saves it",
    r"model\..*policy\.path": "the weights are those of the checkpoint",
}
"""Settings that a checkpoint brings with it, with what is said of them. All others take effect with the next step."""


def changes(saved: Mapping[str, object], given: Mapping[str, object]) -> list[str]:
    """Return `name: before -> now` for every setting that differs, in the order of the settings."""
    before, now = dict(_flatten(saved)), dict(_flatten(given))
    return [
        f"{name}: {before.get(name, _ABSENT)} -> {now.get(name, _ABSENT)}{_remark(name)}"
        for name in {**before, **now}
        if name not in _CHANGED_BY_RESUME and before.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]


def report(checkpoint: Path, given: Mapping[str, object]) -> str | None:
    """Return the lines that list the changed settings, or None when nothing changed.

    Args:
        checkpoint: the checkpoint that is resumed, in the `checkpoints` folder of its run; nothing is compared unless
            the run has a readable `config.yaml`.
        given: the configuration of the resumed run.
    """
    file = checkpoint.resolve().parent.parent / "config.yaml"
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    found = changes(saved, given) if isinstance(saved, dict) else []
    if not found:
        return None
    more = [f"and {len(found) - _MAX_SHOWN} more"] if len(found) > _MAX_SHOWN else []
    lines = [f"  {line}" for line in [*found[:_MAX_SHOWN], *more]]
    return "\n".join([f"resuming from {checkpoint.name} with other settings than its run had:", *lines])


def _remark(name: str) -> str:
    return next((f" ({said})" for pattern, said in _KEPT.items() if re.fullmatch(pattern, name)), "")


def _flatten(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from _flatten(value, f"{path}[{index}]")
    else:
        yield path, node
