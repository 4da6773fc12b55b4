"""What the user wrote, files and options together, with the class each part configures: the ground of error lines."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Section:
    """One mapping of the configuration.

    Attributes:
        path: dotted, as on the command line (`data.selector`); empty for the root.
        values: what was given, by key.
        class_path: as written, or None.
        base: the class that `class_path` has to be or derive from, where known.
        options: names and annotations it accepts; None where that is unknown.
        required: those without a default.
        owner: in words, for messages.
    """

    path: str
    values: Mapping[str, Any]
    class_path: str | None
    base: type | None
    options: Mapping[str, Any] | None
    required: frozenset[str]
    owner: str

    def dotted(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def config_files(args: list[str]) -> list[Path]:
    """The files named by --config or -c, in order."""
    return [Path(value) for name, value in _options(args) if name in ("config", "c")]


def read(args: list[str]) -> dict[str, Any]:
    """Files merged in order, then the dotted options; unreadable files are left out."""
    tree: dict[str, Any] = {}
    for path in config_files(args):
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            _merge(tree, content)
    for name, value in _options(args):
        if name not in ("config", "c", "print_config", "help", "h"):
            _assign(tree, name.removesuffix("+").split("."), _scalar(value), append=name.endswith("+"))
    return tree


def sections(tree: Mapping[str, Any], option_names: set[str]) -> Iterator[Section]:
    """Every mapping of `tree`, outermost first; `option_names` are the dotted options that the parser knows."""
    yield from _walk(tree, "", None, option_names)


def _walk(node: Any, path: str, hint: Any, known: set[str]) -> Iterator[Section]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _walk(item, f"{path}[{index}]", hint, known)
    if not isinstance(node, Mapping):
        return
    class_path, base = node.get("class_path"), configured_class(hint)
    target = resolve(class_path, base) if class_path else base
    values = (node.get("init_args") or {}) if class_path else node
    if not isinstance(values, Mapping):
        return
    options, required = parameters(target) if target else (_options_below(path, known) or None, frozenset())
    owner = class_path or getattr(target, "__qualname__", None) or (f"section {path}" if path else "the configuration")
    yield Section(path, values, class_path, base, options, required, owner)
    for key, value in values.items():
        yield from _walk(value, f"{path}.{key}" if path else str(key), (options or {}).get(key), known)


def parameters(target: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Names and annotations of what a class or function takes, following **kwargs to the base classes; the required."""
    makers = (
        [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)] if inspect.isclass(target) else [target]
    )
    found: dict[str, Any] = {}
    required: set[str] = set()
    for maker in makers:
        try:
            signature = inspect.signature(maker)
        except (TypeError, ValueError):
            break
        hints = _hints(maker)
        named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for parameter in named:
            if parameter.name != "self" and parameter.name not in found:
                found[parameter.name] = hints.get(parameter.name)
                if parameter.default is parameter.empty:
                    required.add(parameter.name)
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    return found, frozenset(required)


def resolve(class_path: str, base: type | None) -> Any:
    """The object a class path names, also by its short name below `base`; None where there is none."""
    module, _, name = class_path.rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), name, None)
        except ImportError:
            return None
    return next((c for c in _subclasses(base) if c.__name__ == name), None) if base else None


def configured_class(hint: Any) -> type | None:
    """The class inside an annotation such as `Selector | None` or `list[Reward]`."""
    if inspect.isclass(hint) and not typing.get_args(hint):
        return hint if hint.__module__ != "builtins" and hint is not types.NoneType else None
    candidates = (configured_class(inner) for inner in typing.get_args(hint))
    return next((found for found in candidates if found), None)


def short_names(base: type) -> dict[str, type]:
    """`base` and every class below it that has been imported and can be made, by class name."""
    return {kind.__name__: kind for kind in _subclasses(base) if not inspect.isabstract(kind)}


def _subclasses(base: type) -> Iterator[type]:
    yield base
    children: list[type] = base.__subclasses__()
    for child in children:
        yield from _subclasses(child)


def _hints(maker: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(maker)
    except (NameError, TypeError, AttributeError):  # annotations of names that exist for type checkers only
        return {}


def _options_below(path: str, known: set[str]) -> dict[str, Any]:
    prefix = f"{path}." if path else ""
    return {name[len(prefix) :].split(".")[0]: None for name in known if name.startswith(prefix)}


def _options(args: list[str]) -> Iterator[tuple[str, str]]:
    for index, token in enumerate(args):
        if not token.startswith("-") or not token.lstrip("-")[:1].isalpha():
            continue
        name, equals, value = token.lstrip("-").partition("=")
        following = args[index + 1] if index + 1 < len(args) else ""
        yield name, value if equals else following


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _assign(node: dict[str, Any], keys: list[str], value: Any, append: bool = False) -> None:
    """Sets or appends to a dotted option, going through `init_args` and the last item of lists as the parser does."""
    head, *tail = keys
    if "class_path" in node and head not in ("class_path", "init_args", "dict_kwargs"):
        node = node.setdefault("init_args", {})
    if not tail:
        old = node.get(head)
        if append:
            node[head] = [*(old if isinstance(old, list) else []), value]
            return
        node[head] = {**old, "class_path": value} if isinstance(old, dict) and isinstance(value, str) else value
        return
    child: Any = node.get(head)
    if isinstance(child, list) and child:
        child[-1] = {"class_path": child[-1]} if isinstance(child[-1], str) else child[-1]
        if isinstance(child[-1], dict):
            _assign(child[-1], tail, value, append)
            return
    if not isinstance(child, dict):
        node[head] = child = {"class_path": child} if isinstance(child, str) else {}
    _assign(child, tail, value, append)
