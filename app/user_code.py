"""Users' functions and classes, named by module or file: `my_rewards.is_right`, `my_rewards.py:is_right`."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from datamodules.errors import UserError, nearest


def locate(path: str, what: str, example: str) -> str:
    """Check that a path can name something, without running any of the user's code.

    Args:
        path: module and name, separated by a colon or dot, on the Python path or in the working directory, or file and
            name, separated by a colon.
        what: what it names, for messages, e.g. "Reward function".
        example: such a path, for messages.

    Returns:
        The absolute path of the file; "" for a module.

    Raises:
        UserError: there is no such module or file.
    """
    module, _, name = path.rpartition(":" if ":" in path else ".")
    file = os.path.abspath(module) if module.endswith(".py") else ""
    if file and name.isidentifier():
        if not os.path.isfile(file):
            scripts = [one.name for one in Path(file).parent.glob("*.py")]
            raise UserError(f"{what} {path!r}: there is no file {module}; {nearest(Path(module).name, scripts)}")
        return file
    parts = [*module.split("."), name]
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        kind = what.split()[-1].lower()
        raise UserError(f"{what} {path!r} is neither 'module.{kind}' nor 'file.py:{kind}'. Write e.g. {example!r}.")
    if parts[0] == "__main__":
        raise UserError(
            f"{what} {path!r} is in __main__, which workers cannot import. Move it to a module, or give the function "
            "itself."
        )
    found = importlib.util.find_spec(parts[0]) or importlib.machinery.PathFinder.find_spec(parts[0], [os.getcwd()])
    if found is None:
        raise UserError(
            f"{what} {path!r}: there is no module {parts[0]!r} on the Python path or in {os.getcwd()}. Install it, or "
            "run from its folder."
        )
    return ""


def resolve(path: str, file: str, what: str) -> Any:
    """Import what a path names.

    Args:
        path: as in `locate`.
        file: what `locate` has returned for it.
        what: as in `locate`.

    Raises:
        UserError: its module cannot be imported, has no such name, or what it names cannot be called.
    """
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        module = import_code(file or module_name)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{what} {path!r}: importing {module_name!r} fails ({cause}). Fix it.") from error
    found = getattr(module, name, None)
    if found is None:
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{what} {path!r}: {module_name!r} has no {name!r}; {nearest(name, defined)}")
    if not callable(found):
        raise UserError(f"{what} {path!r} is a {type(found).__name__}, not a function. Name a function or class.")
    return found


def import_code(module: str) -> ModuleType:
    """Import a module by its name, or a file, by its path that ends in `.py`, under its own name; once per process."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    file = Path(module)
    known = sys.modules.get(file.stem)
    if known is not None and getattr(known, "__file__", None) == module:
        return known
    sys.path.append(str(file.parent))  # for what the file imports from beside it
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None, "the name of the file ends in .py"
    made = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[file.stem]
        if known is not None:
            sys.modules[file.stem] = known
        raise
    return made
