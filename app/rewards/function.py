"""A user's Python function as a reward, named by its dotted path or by its file."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import cloudpickle

from app.rewards.base import Column, Reward, Scores, Texts, TokenIds
from app.user_code import locate, resolve
from datamodules.errors import UserError

_KIND = "Reward function"
RewardFunction = Callable[..., Scores | Awaitable[Scores]]


class Function(Reward):
    """A function with the signature of TRL's reward functions, plain or `async def`.

    `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list[float | None]`,
    all passed by keyword; a function without `**kwargs` receives only the arguments that it names, and one that names
    `environments` the final objects of the conversations' environments. It is imported in
    the worker processes only, and is called with a few whole groups at a time (single completions after a failure),
    not with the batch. It returns None for a completion that it does not apply to. A generator may yield the scores one
    by one: those before a failure are kept, and the time limit is that of one score.

    Args:
        path: module and function, e.g. `my_rewards.accuracy`, on the Python path or in the working directory, or file
            and function, e.g. `rewards/mine.py:accuracy`. A class whose instances are called is built once per worker.
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics; the function's name by default.
        kwargs: further arguments of the function at every call, or those of the class when it is built.

    Raises:
        UserError: `path` cannot name a function of an importable module.
    """

    _code: bytes | None = None
    """The pickled function, where no module holds it."""

    def __init__(
        self,
        path: str,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        function = path.rpartition(":" if ":" in path else ".")[2]
        super().__init__(weight, correctness, name or function)
        self.path, self.kwargs = path, kwargs or {}
        self._call: RewardFunction | None = None
        self._accepted: set[str] | None = None
        self._file = locate(path, _KIND, "my_rewards.py:is_right")

    @classmethod
    def of(cls, function: Callable[..., object]) -> Function:
        """Return the reward of a function given from Python.

        One at the top of a module is imported by the workers. They get the code of any other: of a script, a notebook,
        or of a function within another one.

        Raises:
            UserError: its code refers to something that cannot be sent to another process.
        """
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
        if name.isidentifier() and module not in (None, "__main__"):
            return cls(f"{module}.{name}")
        label = name.rpartition(".")[2].strip("<>") or type(function).__name__
        made = cls.__new__(cls)
        Reward.__init__(made, name=label)
        made.path, made.kwargs, made._file = f"{module}.{name or label}", {}, ""
        made._call = made._accepted = None
        try:
            made._code = cloudpickle.dumps(function)
        except Exception as error:
            raise UserError(
                f"The reward {label!r} cannot be sent to the workers ({type(error).__name__}: {error}). Move it to a "
                "module, and what it refers to into the function."
            ) from error
        return made

    def load(self) -> None:
        target = (
            resolve(self.path, self._file, "Reward function") if self._code is None else cloudpickle.loads(self._code)
        )
        if inspect.isclass(target):
            target = target(**self.kwargs)
            if not callable(target):
                raise UserError(f"Reward {self.path!r} is a class whose instances cannot be called. Give it __call__.")
        elif self.kwargs:
            target = partial(target, **self.kwargs)
        self._call = target
        parameters = inspect.signature(target).parameters.values()
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self._accepted = None if takes_all else {parameter.name for parameter in parameters}

    @property
    def receiver(self) -> RewardFunction:
        assert self._call is not None
        return self._call

    @property
    def takes_environments(self) -> bool:
        return self._call is None or super().takes_environments

    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        if self._call is None:
            self.load()
        assert self._call is not None
        arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        if self._accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        if isinstance(self._call, partial):  # a column of the data must not replace an option
            arguments = {name: value for name, value in arguments.items() if name not in self.kwargs}
        scores = self._call(**arguments)
        if not inspect.isawaitable(scores):
            return scores

        async def awaited() -> Scores:
            return await scores

        return asyncio.run(awaited())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_call": None, "_accepted": None}
