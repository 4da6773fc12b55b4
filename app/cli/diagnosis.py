"""Turns a report of jsonargparse into one line: what was given, what is expected, the nearest valid name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import yaml

from app.cli.given_config import Section, config_files, configured_class, read, sections, short_names
from datamodules.errors import nearest

_LONGEST = 300


def explain(message: str, args: list[str], option_names: set[str]) -> str:
    """One line for `message`, the parser's report about the command line `args`.

    Args:
        message: as jsonargparse or argparse put it; may have many lines.
        args: the command line, without the program's name.
        option_names: every dotted option that the parser knows.
    """
    given = list(sections(read(args), option_names))
    flat = " ".join(message.split())
    attempts: list[Callable[[], str | None]] = [
        lambda: _broken_yaml(flat, args),
        lambda: _missing_file(flat),
        lambda: _invalid_choice(flat),
        lambda: _bad_class_path(flat, given),
        lambda: _bad_short_name(flat, given),
        lambda: _required(flat, given),
        lambda: _unknown_key(flat, given),
        lambda: _bad_value(message, given),
    ]
    for attempt in attempts:
        if line := attempt():
            return line
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 4] + " ..."


def _broken_yaml(flat: str, args: list[str]) -> str | None:
    if not flat.startswith(("Problems parsing config", "Unexpected config")):
        return None
    for path in config_files(args):
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            return f"{path}, line {line}: not valid YAML: {error.problem}"
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return f"{path}: cannot be read as YAML: {error}"
        if not isinstance(content, dict):
            return f"{path}: expected a YAML mapping of options, found {type(content).__name__}"
    return None


def _missing_file(flat: str) -> str | None:
    found = re.search(r"File does not exist: '([^']+)'", flat)
    if not found:
        return None
    path = Path(found[1])
    if not path.parent.is_dir():
        return f"{path}: no such file, and no folder {path.parent} either"
    names = [other.name for other in path.parent.iterdir() if other.is_file() and other.suffix == path.suffix]
    return f"{path}: no such file{_hint(path.name, names)}"


def _invalid_choice(flat: str) -> str | None:
    found = re.search(r"argument (.+): invalid choice: '(.+?)' \(choose from (.+)\)", flat)
    if found:
        names = [name.strip(" '") for name in found[3].split(",")]
        return f"{found[1]} {found[2]!r} does not exist{_hint(found[2], names)}"
    found = re.search(r'expected "subcommand" to be one of \{(.+)\}', flat)
    return f"a subcommand is missing: give one of {found[1].replace(',', ', ')}" if found else None


def _bad_class_path(flat: str, given: list[Section]) -> str | None:
    # The report quotes the class of every enclosing section too: only the one that cannot be imported is meant.
    missing = re.search(
        r"class_path '([\w.]+)': *(?:module '[\w.]+' has no attribute|No module named|Expected a dot)", flat
    )
    other = re.search(r"Import path ([\w.]+) does not correspond to a subclass of ([\w.]+)", flat)
    found = missing or other
    if not found:
        return None
    wrong = found[1]
    section = next((s for s in given if s.class_path == wrong or wrong in map(str, s.values.values())), None)
    place = _place_of_class(section, wrong)
    if not missing and other:
        return f"{place}class_path {wrong} is no {other[2]}: give a subclass of it"
    base = section.base if section is not None and section.class_path == wrong else None
    reason, names = _importable(wrong, base)
    return f"{place}class_path {wrong}: {reason}{_hint(wrong, names)}"


def _bad_short_name(flat: str, given: list[Section]) -> str | None:
    """A class named without its module, where no class of the expected kind has that name."""
    found = re.search(r"dot import path string: (\w+)", flat)
    if not found:
        return None
    for section in given:
        for key, value in section.values.items():
            named = value.get("class_path") if isinstance(value, Mapping) else value
            base = configured_class((section.options or {}).get(key))
            if named == found[1] and base is not None:
                return f"{section.dotted(key)}: {named} is no {base.__name__}{_hint(named, short_names(base))}"
    return None


def _place_of_class(section: Section | None, wrong: str) -> str:
    if section is None:
        return ""
    if section.class_path == wrong:
        return f"{section.path}: "
    return f"{section.dotted(next(key for key, value in section.values.items() if str(value) == wrong))}: "


def _importable(wrong: str, base: type | None) -> tuple[str, list[str]]:
    """What part of a dotted name fails, and the dotted names that exist there."""
    parts = wrong.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found = [n for n, o in vars(module).items() if inspect.isclass(o) and (base is None or issubclass(o, base))]
        found += [m.name for m in pkgutil.iter_modules(module.__path__)] if hasattr(module, "__path__") else []
        return f"{name} has no {parts[end]!r}", [f"{name}.{n}" for n in found if not n.startswith("_")]
    return f"no module {parts[0]!r}", [".".join([name, *parts[1:]]) for name in ("app", "callbacks", "datamodules")]


def _required(flat: str, given: list[Section]) -> str | None:
    found = re.search(r"arguments are required: ([\w.-]+)|[Kk]ey \"?([\w.]+)\"? is required", flat)
    if not found:
        return None
    name = (found[1] or found[2]).strip("-")
    leaf = name.split(".")[-1]
    for section in given:
        if leaf in section.required and leaf not in section.values:
            return f"{section.dotted(leaf)} is missing: {section.owner} needs it"
    return f"{name} is missing: give it in a --config file or as --{name}"


def _unknown_key(flat: str, given: list[Section]) -> str | None:
    found = re.search(r"does not accept (?:nested key|option) '([^']+)'|Option '([^']+)' is not accepted", flat)
    unrecognized = re.search(r"unrecognized arguments: (\S+)", flat)
    if not found and not unrecognized:
        return None
    name = (found[1] or found[2]) if found else unrecognized[1].lstrip("-").partition("=")[0]  # type: ignore[index]
    parts = name.split(".")
    for section in given:
        for key in section.values:
            if section.options is not None and str(key) in parts and key not in section.options:
                place = section.dotted(key)
                return f"{place}: {section.owner} has no option {key!r}{_hint(str(key), section.options)}"
    headless = next((s for s in given if "init_args" in s.values), None)
    if headless is not None:
        return f"{headless.path}: init_args without class_path: say which class they are for"
    return f"{name!r} is not an option here: see --help"


def _bad_value(message: str, given: list[Section]) -> str | None:
    keys = list(re.finditer(r'Parser key "([^"]+)":', message))
    if not keys:
        return None
    # The innermost report is the cause; the alternatives of enclosing annotations, listed after it, are not.
    report = message[keys[-1].end() :]
    ends = r"Given value: .*" if "Does not validate" in report.split("Expected")[0] else r"Got value: .*"
    if end := re.search(ends, report):
        report = report[: end.end()]
    expected = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value: |\n|$)", report)))
    if not expected:
        return None
    shown = re.search(r"(?:Got value|Given value): (.*)", report)
    value = shown[1].strip() if shown else None
    place = _place_of_value(keys[-1][1], value, given)
    literal = [choice for text in expected if "Literal[" in text for choice in re.findall(r"'([^']*)'", text)]
    told = f"{place}={value}" if value is not None else place
    if literal:
        return f"{told}: expected one of {', '.join(map(repr, literal))}{_close(value or '', literal)}"
    return f"{told}: expected {' or '.join(_plain_type(text) for text in expected)}"


def _place_of_value(key: str, value: str | None, given: list[Section]) -> str:
    """The dotted name of the value the parser calls `key`, which is relative to the class it belongs to."""
    matches = []
    for section in given:
        for name, content in section.values.items():
            place = section.dotted(name)
            if place == key or place.endswith("." + key):
                matches.append((str(content) != value, place))
    return min(matches)[1] if matches else key


def _plain_type(text: str) -> str:
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("typing.", "")
    return "null" if text == "NoneType" else text


def _hint(given: str, names: Iterable[str]) -> str:
    valid = list(names)
    return f", {nearest(given, valid)}" if valid else ""


def _close(given: str, names: Iterable[str]) -> str:
    hint = nearest(given, names)
    return f", {hint}" if hint.startswith("did you mean") else ""
