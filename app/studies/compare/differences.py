"""In what the settings of two runs differ, in lines that people read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_CLASS, _ARGUMENTS = "class_path", "init_args"
_NOT_OF_A_METHOD = ("seed_everything", "ckpt_path", "weights_only")


def differences(arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """`name: baseline's value -> arm's value` for every setting that differs.

    A class that is exchanged, added or left out is one line with its arguments, those that are null aside. Callbacks go
    by their names, so that one more does not change the places of the others.

    Args:
        arm: settings as `dots fit` resolves them, defaults included.
        baseline: the same.
    """
    return list(_differences("", _by_name(baseline), _by_name(arm)))


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    trainer = dict(settings["trainer"])
    callbacks = trainer.pop("callbacks", None) or []
    rest = {name: value for name, value in settings.items() if name not in ("trainer", *_NOT_OF_A_METHOD)}
    return {**rest, "trainer": trainer, "callbacks": {_short(one[_CLASS]): one for one in callbacks}}


def _differences(path: str, before: Any, now: Any) -> Iterator[str]:
    if before == now:
        return
    if _same_kind(before, now):
        if _CLASS in before:
            before, now = before.get(_ARGUMENTS) or {}, now.get(_ARGUMENTS) or {}
        for name in {**before, **now}:
            yield from _differences(f"{path}.{name}" if path else name, before.get(name), now.get(name))
    else:
        yield f"{path}: {_named(before)} -> {_named(now)}"


def _same_kind(before: Any, now: Any) -> bool:
    """Two mappings, of the same class where they are of any."""
    return isinstance(before, Mapping) and isinstance(now, Mapping) and before.get(_CLASS) == now.get(_CLASS)


def _named(value: Any) -> str:
    if isinstance(value, Mapping) and _CLASS in value:
        given = (value.get(_ARGUMENTS) or {}).items()
        arguments = ", ".join(f"{name}={_named(each)}" for name, each in given if each is not None)
        return f"{_short(value[_CLASS])}({arguments})"
    return "none" if value is None else str(value)


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]
