"""Where modules are looked for: the user's folder comes last, so that no file in it hides an installed package."""

from __future__ import annotations

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_added: list[str] = []


def put_user_folder_last() -> None:
    """Let modules of the working folder, where users keep their rewards, be imported after all that is installed.

    `python -m` looks there first, a console script not at all. The folder of Dots itself keeps its place.
    """
    folder = os.getcwd()
    if folder == _ROOT:
        return
    sys.path[:] = [entry for entry in sys.path if entry and entry not in (folder, *_added)] + [folder]
    _added[:] = [folder]


def hidden_files() -> list[tuple[str, str]]:
    """Return the modules of the working folder that are not importable, and what is installed under their names."""
    from importlib.util import find_spec

    found = []
    for entry in sorted(os.scandir(), key=lambda one: one.name) if os.getcwd() != _ROOT else ():
        name, ending = os.path.splitext(entry.name)
        is_module = ending == ".py" or (not ending and os.path.isfile(os.path.join(entry.path, "__init__.py")))
        if not is_module or not name.isidentifier() or name == "__main__":
            continue
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None and not (spec.origin or "").startswith(os.getcwd() + os.sep):
            found.append((entry.name, spec.origin or name))
    return found


def import_path() -> str:
    """Return a PYTHONPATH for children: what this process can import, in its order, then the working folder."""
    user = {os.getcwd(), *_added} - {_ROOT}
    entries = [os.path.abspath(entry) for entry in sys.path]
    installed = [entry for entry in entries if entry not in user]
    return os.pathsep.join(dict.fromkeys([*installed, _ROOT, *entries, os.getcwd()]))
