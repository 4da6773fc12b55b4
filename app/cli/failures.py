"""One line for any exception: what the command was doing, what went wrong, and where in whose code."""

from __future__ import annotations

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from datamodules.errors import UserError

_OURS = tuple(str(Path(__file__).parents[2] / name) + "/" for name in ("app", "callbacks", "datamodules"))
_INSTALLED = tuple(sysconfig.get_path(name) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_LIBRARY = "site-packages/jsonargparse/"
_MAX_CAUSE = 300


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Note on an exception that leaves the block what the command was doing, unless an inner stage has."""
    try:
        yield
    except BaseException as error:
        if stage_of(error) is None:
            # An exception class of a user may have an `add_note` or a `__notes__` of its own.
            with contextlib.suppress(TypeError):
                BaseException.add_note(error, f"{_STAGE}{name}")
        raise


_STAGE = "dots: while "


def stage_of(error: BaseException) -> str | None:
    """Return what the command was doing when the exception was raised, if `stage` has noted it."""
    return next((note.removeprefix(_STAGE) for note in notes_of(error) if note.startswith(_STAGE)), None)


def notes_of(error: BaseException) -> list[str]:
    """Return the notes of an exception, whose class may have a `__notes__` that is something else."""
    notes = getattr(error, "__notes__", None)
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def describe(error: BaseException) -> str:
    """Return one line with the stage, the type and message of the exception, and the place in the user's code or ours.

    What cannot be shown of the exception (its `__str__` raises) is left out, and what is long is cut.
    """
    raised = _unwrapped(error)
    doing = stage_of(error)
    at = _place(raised)
    return (
        f"{f'While {doing}: ' if doing else ''}{_shown(raised)}{f' (at {at})' if at else ''}. "
        "Run again with --debug for the traceback."
    )


def raised_by_user(error: BaseException) -> bool:
    """Return whether the frame that raised the exception is neither of an installed package nor of Dots."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and _is_of_user(frames[-1][0].f_code.co_filename)


def passed_user_code(error: BaseException) -> bool:
    """Return whether the exception was raised by the user's code or something that it called, e.g. an import."""
    of_syntax = isinstance(error, SyntaxError) and error.filename is not None and _is_of_user(error.filename)
    frames = traceback.walk_tb(error.__traceback__)
    return of_syntax or any(_is_of_user(frame.f_code.co_filename) for frame, _ in frames)


def _unwrapped(error: BaseException) -> BaseException:
    """Return the exception that jsonargparse has wrapped in its report of an option, or the exception itself."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or _LIBRARY not in frames[-1][0].f_code.co_filename:
        return error
    wrapped = list(chain(error))
    # The first alternative of a type is the one that was meant: its exception is the cause.
    return next((one for one in wrapped if passed_user_code(one)), error if error.__cause__ is None else wrapped[-1])


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its causes and the exceptions that it was raised in handling."""
    pending, seen = [error], set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [current.__context__, current.__cause__]


def _shown(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, BaseExceptionGroup):
        leaves = [_shown(one) for one in error.exceptions]
        return f"{name} of {len(leaves)}: {'; '.join(leaves)}"[:_MAX_CAUSE]
    try:
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    except Exception:  # noqa: BLE001  # whatever a user's `__str__` raises
        text = "its message cannot be shown"
    return f"{name}: {text if len(text) <= _MAX_CAUSE else text[:_MAX_CAUSE] + ' ...'}".removesuffix(": ").rstrip(".")


def _place(error: BaseException) -> str:
    """Return file, line and function of the innermost frame of the user's code, or else of ours."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for chosen in (_is_of_user, _is_ours):
        for code, line in reversed(frames):
            if chosen(code.co_filename):
                return f"{code.co_filename}:{line} in {code.co_qualname}"
    inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
    return _place(inner) if inner is not None else ""


def _is_ours(file: str) -> bool:
    return file.startswith(_OURS)


def _is_of_user(file: str) -> bool:
    # Built-in and compiled modules give no absolute path.
    return os.path.isabs(file) and not file.startswith((*_OURS, *_INSTALLED)) and "/site-packages/" not in file


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the first UserError among an exception, its causes and the exceptions it was raised in handling."""
    return next((each for each in chain(error) if isinstance(each, UserError)), None)
