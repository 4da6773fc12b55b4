"""Checks of a config's text before it is loaded: what YAML accepts but no config means, named with its line."""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml

_MAX_DEPTH = 64
_MAX_NODES = 200_000
_MAX_CHARACTERS = 16 * 2**20


class ConfigTextError(yaml.YAMLError):
    """A text that must not be loaded. The message is one line."""


@dataclass
class _Open:
    """A list or mapping whose end has not been read.

    Attributes:
        anchor: its name for aliases, if any.
        is_mapping: whether its children are keys and values in turn.
        nodes: nodes in it so far, those that aliases repeat included.
        children: number of keys and values, or of elements.
        key: the last key.
        keys: the line of every key.
    """

    anchor: str | None
    is_mapping: bool
    nodes: int = 1
    children: int = 0
    key: str = ""
    keys: dict[str, int] = field(default_factory=dict)

    @property
    def expects_key(self) -> bool:
        return self.is_mapping and self.children % 2 == 0


def check_text(text: str) -> None:
    """Check the text of a config without loading it, in time proportional to its length.

    Raises:
        ConfigTextError: a key is given twice, a `class_path` is no text or `init_args` no mapping, an alias stands
            within what it names, or the text is too long, too deep, or too large once its aliases are replaced.
        yaml.YAMLError: the text is not YAML.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigTextError(f"the config has {len(text)} characters, but at most {_MAX_CHARACTERS} are read")
    stack: list[_Open] = []
    sizes: dict[str, int | None] = {}  # by anchor; None while it is open
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        assert event.start_mark is not None, "every event of a text has its place"
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent):
            if stack:
                _check_child(stack[-1], event, line)
            if event.anchor is not None:
                sizes[event.anchor] = None if isinstance(event, yaml.CollectionStartEvent) else 1
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(stack) > _MAX_DEPTH:
                raise ConfigTextError(f"line {line}: lists and mappings are nested more than {_MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.ScalarEvent):
            nodes = 1
        elif isinstance(event, yaml.AliasEvent):
            known = sizes.get(event.anchor or "", 1)  # the loader reports an alias of nothing
            if known is None:
                raise ConfigTextError(f"line {line}: the alias *{event.anchor} stands within what it names")
            nodes = known
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            nodes = closed.nodes
            if closed.anchor is not None:
                sizes[closed.anchor] = nodes
        else:
            continue
        if stack:
            stack[-1].nodes += nodes
            stack[-1].children += 1
            nodes = stack[-1].nodes
        if nodes > _MAX_NODES:
            raise ConfigTextError(
                f"line {line}: the config has more than {_MAX_NODES} entries once aliases are replaced"
            )


def _check_child(parent: _Open, event: yaml.NodeEvent, line: int) -> None:
    if parent.expects_key:
        if not isinstance(event, yaml.ScalarEvent):
            raise ConfigTextError(f"line {line}: a key is a list or mapping, but keys are names of options")
        parent.key = event.value
        if parent.key in parent.keys and parent.key != "<<":
            first = parent.keys[parent.key]
            raise ConfigTextError(
                f"line {line}: the key {parent.key!r} was given on line {first} already, and one of the two would be "
                "ignored. Remove one"
            )
        parent.keys[parent.key] = line
        return
    if not parent.is_mapping:
        return
    text = event.value if isinstance(event, yaml.ScalarEvent) else None
    given = repr(text) if text is not None else "a mapping" if isinstance(event, yaml.MappingStartEvent) else "a list"
    if parent.key == "class_path" and (text is None or not _is_dotted_name(text)):
        raise ConfigTextError(
            f"line {line}: class_path is {given}, but expected the dotted name of a class, e.g. "
            "'datamodules.selectors.Dots'"
        )
    if parent.key == "init_args" and given != "a mapping" and text not in ("", "~", "null"):
        raise ConfigTextError(f"line {line}: init_args is {given}, but expected a mapping of the class's options")


def _is_dotted_name(text: str) -> bool:
    return text not in ("null", "true", "false") and all(part.isidentifier() for part in text.split("."))
