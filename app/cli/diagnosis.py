"""Reduce a report of jsonargparse to one line: the option, what was given, what is expected, the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from datamodules.errors import nearest

_MAX_LENGTH = 400
_MAX_VALUE = 120
_MAX_CHOICES = 20
_LEVEL = (
    r"""[ -]*(?:Parser key "(?P<option>[^"]+)"(?: element \d+)?:|Problem with given class_path '(?P<path>[^']+)':)"""
)
_UNKNOWN = r"(?:Group '(.+?)' does not )?(?:accept option|accept nested key|Option|arguments:) '?(-*)([\w.-]+)"
_DEFAULT_CLASSES = {
    "model": "app.module.GRPOModule",
    "data": "datamodules.online.OnlinePromptDataModule",
    "data.train": "datamodules.prompts.PromptFile",
}
_OTHER_NAMES = {
    "lr": "learning_rate",
    "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step",
    "per_device_train_batch_size": "prompts_per_step",
    "num_train_epochs": "max_epochs",
    "output_dir": "default_root_dir",
    "save_steps": "every",
    "save_total_limit": "keep",
    "eval_steps": "val_check_interval",
    "gpus": "devices",
    "kl": "beta",
    "kl_coef": "beta",
    "kl_loss_coef": "beta",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "max_grad_norm": "clip_norm",
    "cast_lm_head_to_fp32": "head_precision",
    "model_name_or_path": "policy",
    "reward_funcs": "rewards",
    "dataset": "train",
    "dataset_name": "train",
}
"""Names of options in other trainers (TRL, verl, Lightning), and the last part of the name that an option has here."""
_MAX_LONGER = 3
_WRONG_CLASS = r"module '[\w.]+' has no .*|No module named .*|does not correspond to .*|dot import path string"


class KnownNames(Protocol):
    """The names that a parser knows; `app.cli.parsing.DotsArgumentParser` is one."""

    def option_names(self) -> set[str]: ...

    def class_paths(self, option: str) -> list[str]: ...

    def of_class(self, class_path: str) -> KnownNames: ...


def explain(message: str, parser: KnownNames) -> str:
    """Return one line that says what is wrong with the command line or a config.

    A report is nested: an option, the class that it names, an option of that class, and so on. The options on the way
    in make the dotted name, and the innermost level says what is wrong.

    Args:
        message: the report of jsonargparse or argparse.
        parser: the parser that reports it.
    """
    prefix = class_path = ""
    classes: list[str] = []
    depth, outermost = -1, parser
    report = lines = message.splitlines() or [""]
    for number, line in enumerate(report):
        level = re.match(_LEVEL, line)
        if level and _indent(line) > depth:  # otherwise it is another alternative of a union
            depth = _indent(line)
            lines = [line[level.end() :], *report[number + 1 :]]
            if level["option"]:
                parser = parser.of_class(class_path) if class_path else parser
                classes = parser.class_paths(level["option"])
                prefix += f"{level['option']}."
                class_path = ""
            else:
                class_path = level["path"]
    cause = "\n".join([lines[0], *takewhile(lambda line: not line or _indent(line) > depth, lines[1:])])
    option = prefix.rstrip(".")
    value = found[1] if (found := re.search(r"(?:Got|Given) value: (.*)", cause)) else ""
    value = value if len(value) <= _MAX_VALUE else value[:_MAX_VALUE] + " ..."

    if cause.startswith("Unexpected config"):
        return "expected a YAML mapping of options, e.g. 'trainer: {max_steps: 10}'"
    if found := re.search(r"File does not exist: '([^']+)'", cause):
        path = Path(found[1])
        return f"{path}: no such file.{_hint(path.name, [one.name for one in path.parent.glob(f'*{path.suffix}')])}"
    if found := re.search(r'Unable to load config "(.*)"', cause):
        option = re.sub(r"\b(\w+)\.\1$", r"\1", option)  # a group's own option has the name of the group
        return f"{option}={found[1]}: expected options by name, as in --{option}.NAME VALUE, or a file of them."
    if found := re.search(r"argument --(data|model): expected one argument", cause):
        return f"An option whose name begins with --{found[1]} has no value. Write its value after its name."
    if found := re.search(r"([\w.]+): invalid choice: '(.+?)' \(choose from (.+)\)", cause):
        choices = re.findall(r"[^\s,']+", found[3])
        return f"{found[1]} {found[2]!r} does not exist.{_hint(found[2], choices)}"
    if found := re.search(r"[Uu]nrecognized arguments: ([^-\s]\S*)", cause):
        given = Path(found[1])
        option = "config" if given.suffix in (".yaml", ".yml") else "resume" if given.is_dir() else "OPTION"
        return f"{given} belongs to no option. Write --{option} {given}."
    if found := re.search(_UNKNOWN, cause):
        options = (parser.of_class(class_path) if class_path else parser).option_names()
        name, valid = _unknown_part(".".join(filter(None, (found[1], found[3]))), options)
        line = f"{prefix}{name} is not an option{f' of {class_path}' if class_path else ''}."
        # Without a class_path, the annotated class itself is meant.
        line += f" Is {option}.class_path missing?" if class_path in classes[:1] else ""
        last = name.rpartition(".")[2]
        near = _hint(last, valid, only_near=True)
        if not (near and (prefix or "." in name)) and (longer := _longer_names(last, outermost)):
            return f"{line} Did you mean {' or '.join(map(repr, longer))}?"
        return line + (near or _hint(last, valid))
    if found := re.search(r"arguments are required: ([\w.-]+)", cause):
        # A subcommand's own option is reported with the subcommand before it.
        own = not class_path and found[1] not in parser.option_names()
        if own and "." not in found[1]:
            return f"{found[1].upper()} is missing. Write it after the name of the command"
        name = prefix + (found[1].partition(".")[2] if own else found[1])
        needed = f": {class_path} needs it" if class_path else ""
        return f"{name} is missing{needed}. Set it in a --config file or as --{name}"
    if reason := re.search(_WRONG_CLASS, cause):
        named = re.search(r"(?:Import path (?!does not)|import path string: )([\w.]+)", cause)
        wrong = named[1] if named else value or class_path
        known = classes if "." in wrong else [one.rpartition(".")[2] for one in classes]
        said = reason[0].replace("dot import path string", "no class of this name is known")
        return f"{option}={wrong}: {said}.{_hint(wrong, known)}"
    if found := re.search(r"Key must be a string, got: (.+)\.", cause):
        where = f" of {option}" if option else ""
        return f"the key {found[1]}{where} is not text, but keys are names of options. Quote or remove it."
    if found := re.match(r"NestedArg\(key='([^']+)'", value):
        names = [one.rpartition(".")[2] for one in classes[1:]]  # without the annotated class
        first = (
            f"Write --{option} {'|'.join(names)}" if 0 < len(names) <= _MAX_CHOICES else f"Name the class as --{option}"
        )
        return f"{option}.{found[1]} is an option of a class, but no class is given. {first} before it."
    if expected := re.findall(
        r"(?:Expected an? (?!path)|Not a valid (?=subclass))(.+?)(?:\. Got value: .*)?$", cause, re.MULTILINE
    ):
        members = [name for text in expected if "Literal[" in text for name in re.findall(r"'([^']*)'", text)]
        types = re.sub(r"<class '(.+?)'>", r"\1", " or ".join(expected)).replace("NoneType", "null")
        types = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", types)
        lacks = value.startswith("{'init_args'") and any("subclass" in text for text in expected)
        if option == "seed_everything":
            more = " To run several seeds: dots compare --base CONFIG --seeds 0 1 2 --out FOLDER"
            return f"{option}={value}: expected one whole number.{more}"
        more = f" Is {option}.class_path missing?" if lacks else _hint(value, members, only_near=True)
        return f"{option}={value}: expected {types}.{more}"
    line = " ".join(f"{option}: {cause}".removeprefix(": ").split()).replace('in "<unicode string>", ', "at ")
    return line if len(line) <= _MAX_LENGTH else line[:_MAX_LENGTH] + " ..."


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" -"))


def _longer_names(name: str, parser: KnownNames) -> list[str]:
    """Return the options whose last part is a name, or else close to it; default classes have theirs, too."""
    known = set(parser.option_names())
    for prefix, path in _DEFAULT_CLASSES.items():
        known |= {f"{prefix}.{one}" for one in parser.of_class(path).option_names()} if prefix in known else set()
    name, by_last = name.replace("-", "_"), {one: one.rpartition(".")[2] for one in known if one[-1] != "+"}
    name = _OTHER_NAMES.get(name, name)
    if get_close_matches(name, [one for one in known if "." not in one], n=1, cutoff=0.5):
        wanted = [name]
    else:
        wanted = [name] if name in by_last.values() else get_close_matches(name, set(by_last.values()), n=2, cutoff=0.7)
    found = [one for one, last in by_last.items() if last in wanted or one.startswith(f"{name}_")]
    return sorted(found, key=lambda one: (one.count("."), one))[:_MAX_LONGER]


def _unknown_part(name: str, options: set[str]) -> tuple[str, set[str]]:
    """Return the shortest leading part of a dotted name that no option has, and the names valid at its end."""
    parts = name.split(".")
    valid: set[str] = set()
    for end in range(1, len(parts) + 1):
        start = parts[: end - 1]
        valid = {one[end - 1] for one in (option.split(".") for option in options) if one[: end - 1] == start != one}
        if parts[end - 1] not in valid:
            return ".".join(parts[:end]), valid
    return name, valid


def _hint(given: str, valid: Iterable[str], only_near: bool = False) -> str:
    names = set(valid)
    hint = nearest(given, names) if names else ""
    if not hint.startswith("did you mean") and (only_near or len(names) > _MAX_CHOICES):
        return ""
    return f" {hint[:1].upper()}{hint[1:]}".rstrip()
