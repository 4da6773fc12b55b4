"""A user's Python function as a reward, named by its dotted path."""

from __future__ import annotations

import asyncio
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from app.rewards.base import Reward
from datamodules.errors import UserError, nearest
from datamodules.types import Messages


class Function(Reward):
    """Any function with the signature of TRL's reward functions, plain or `async def`.

    `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list[float | None]`,
    all passed by keyword; a function without `**kwargs` gets only the arguments it names. It is imported in the
    worker processes alone, and sees a few whole groups at a time (single completions after a failure), not the batch.

    Args:
        path: module and name, e.g. `my_rewards.accuracy`; searched on the Python path and in the working directory.
        weight: factor of this reward in the sum that is optimised.
        correctness: whether difficulty, filters and accuracy are about this reward.
        name: under which it is logged; the function's name by default.

    Raises:
        UserError: `path` cannot be a function of an importable module.
    """

    def __init__(self, path: str, weight: float = 1.0, correctness: bool = False, name: str | None = None) -> None:
        super().__init__(weight, correctness, name or path.rpartition(".")[2])
        self.path = path
        self._call: Callable[..., Any] | None = None
        check_path(path)

    def load(self) -> None:
        self._call = resolve(self.path)
        parameters = inspect.signature(self._call).parameters.values()
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self._accepted = None if takes_all else {parameter.name for parameter in parameters}

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        if self._call is None:
            self.load()
        assert self._call is not None
        arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        if self._accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        scores = self._call(**arguments)
        return asyncio.run(_awaited(scores)) if inspect.isawaitable(scores) else scores

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_call": None, "_accepted": None}


async def _awaited(scores: Any) -> Any:
    return await scores


def check_path(path: str) -> None:
    """Finds what is wrong with a path without running any of the user's code.

    Raises:
        UserError: not `module.name`, or there is no such top-level module.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"reward function {path!r}: expected 'module.function', e.g. 'my_rewards.accuracy'")
    if parts[0] == "__main__":
        raise UserError(f"reward function {path!r}: workers cannot import __main__; move it to a module of its own")
    found = importlib.util.find_spec(parts[0]) or importlib.machinery.PathFinder.find_spec(parts[0], [os.getcwd()])
    if found is None:
        raise UserError(
            f"reward function {path!r}: no module {parts[0]!r} on the Python path or in {os.getcwd()}; "
            "install it or run from its folder"
        )


def resolve(path: str) -> Callable[..., Any]:
    """Imports the module of `path` and returns its function.

    Raises:
        UserError: the import fails, or there is no such name, or it cannot be called.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"reward function {path!r}: importing {module_name!r} fails ({cause}); mend the module"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"reward function {path!r}: {module_name!r} has no {name!r}; {nearest(name, defined)}")
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"reward function {path!r} is a {type(function).__name__}: expected a function; name one")
    return function
