"""A user's Python function as a reward, named by its dotted path."""

from __future__ import annotations

import asyncio
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
from collections.abc import Awaitable, Callable

from app.rewards.base import Column, Reward, Scores, Texts, TokenIds
from datamodules.errors import UserError, nearest

RewardFunction = Callable[..., Scores | Awaitable[Scores]]


class Function(Reward):
    """A function with the signature of TRL's reward functions, plain or `async def`.

    `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list[float | None]`,
    all passed by keyword; a function without `**kwargs` receives only the arguments that it names. It is imported in
    the worker processes only, and is called with a few whole groups at a time (single completions after a failure),
    not with the batch.

    Args:
        path: module and function, e.g. `my_rewards.accuracy`, on the Python path or in the working directory.
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics; the function's name by default.

    Raises:
        UserError: `path` cannot name a function of an importable module.
    """

    def __init__(
        self, path: str, weight: float = 1.0, correctness: bool | None = None, name: str | None = None
    ) -> None:
        super().__init__(weight, correctness, name or path.rpartition(".")[2])
        self.path = path
        self._call: RewardFunction | None = None
        self._accepted: set[str] | None = None
        parts = path.split(".")
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            raise UserError(
                f"Reward function {path!r} is not of the form 'module.function'. Write e.g. 'my_rewards.f'."
            )
        if parts[0] == "__main__":
            raise UserError(
                f"Reward function {path!r} is in __main__, which workers cannot import. Move it to a module."
            )
        # Looks the module up without running any of the user's code.
        found = importlib.util.find_spec(parts[0]) or importlib.machinery.PathFinder.find_spec(parts[0], [os.getcwd()])
        if found is None:
            raise UserError(
                f"Reward function {path!r}: there is no module {parts[0]!r} on the Python path or in {os.getcwd()}. "
                "Install it, or run from its folder."
            )

    def load(self) -> None:
        self._call = _resolve(self.path)
        parameters = inspect.signature(self._call).parameters.values()
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self._accepted = None if takes_all else {parameter.name for parameter in parameters}

    @property
    def receiver(self) -> RewardFunction:
        assert self._call is not None
        return self._call

    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        if self._call is None:
            self.load()
        assert self._call is not None
        arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        if self._accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        scores = self._call(**arguments)
        if not inspect.isawaitable(scores):
            return scores

        async def awaited() -> Scores:
            return await scores

        return asyncio.run(awaited())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_call": None, "_accepted": None}


def _resolve(path: str) -> RewardFunction:
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"Reward function {path!r}: importing {module_name!r} fails ({cause}). Fix it.") from error
    function: RewardFunction | None = getattr(module, name, None)
    if function is None:
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"Reward function {path!r}: {module_name!r} has no {name!r}; {nearest(name, defined)}")
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"Reward function {path!r} is a {type(function).__name__}, not a function. Name a function.")
    return function
