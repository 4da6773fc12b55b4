"""Users' own environments: classes whose methods are tools, as TRL's `environment_factory` takes them."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from app.environments.base import Environment, Reply, ToolCall
from app.environments.options import EnvironmentOptions
from app.import_path import import_path
from app.user_code import import_code, locate, resolve
from datamodules.errors import UserError

_KIND = "Environment factory"


class Tools(EnvironmentOptions):
    """An environment whose object has `reset`, tools as public methods, and `get_reward` where it scores itself.

    These are the classes that TRL's `environment_factory` takes; methods may be `async def`. An object is built once
    per process and reset for every conversation.

    Args:
        factory: a class, or function that returns an object, by module or file and name, e.g. `my_env.py:MyEnv`; or
            several by name, among which a row's column `environment` chooses.

    Raises:
        UserError: there is no such module or file.
    """

    def __init__(self, factory: str | dict[str, str], **limits: Any) -> None:
        super().__init__(**limits)
        self.factory = factory
        factories = {"": factory} if isinstance(factory, str) else dict(factory)
        if not factories:
            raise UserError("model.environment.factory is empty. Name a factory, e.g. my_env.py:MyEnv.")
        self.names = tuple(factories)
        self._located = {name: (path, locate(path, _KIND, "my_env.py:MyEnv")) for name, path in factories.items()}

        self._importable = import_path().split(os.pathsep)
        """Where reward workers, which unpickle final objects, find classes; they get the code of any other."""

    @property
    def preload(self) -> tuple[str, ...]:
        modules = [file or path.rpartition(":" if ":" in path else ".")[0] for path, file in self._located.values()]
        return tuple(dict.fromkeys(modules))

    def load(self) -> None:
        for path, file in self._located.values():
            resolve(path, file, _KIND)
            if file and os.path.dirname(file) not in self._importable:
                cloudpickle.register_pickle_by_value(import_code(file))

    def make(self, name: str) -> Environment:
        return ToolEnvironment(resolve(*self._located[name], _KIND))


class ToolEnvironment(Environment):
    """An object of a user's class, whose methods are the tools.

    Args:
        factory: makes the object.

    Raises:
        UserError: the object has no `reset`.
    """

    def __init__(self, factory: Callable[[], object]) -> None:
        self._object = factory()
        # Those of the class, as TRL lists them: listing those of the object would evaluate its properties.
        self._methods: dict[str, Callable[..., Any]] = {
            name: getattr(self._object, name)
            for name, _ in inspect.getmembers(type(self._object), inspect.isfunction)
            if not name.startswith("_")
        }
        self._reset = self._methods.pop("reset", None)
        self._get_reward = self._methods.pop("get_reward", None)
        self._runner = asyncio.Runner()
        if self._reset is None:
            raise UserError(
                f"The environment {type(self._object).__name__!r} has no method reset(**columns). Give it one, which "
                "begins a conversation."
            )

    def tools(self) -> list[dict[str, Any]]:
        from transformers.utils import get_json_schema  # slow to import, and needed once per run only

        schemas = []
        for name, method in self._methods.items():
            try:
                schemas.append(get_json_schema(method))
            except Exception as error:
                said = " ".join(str(error).split())[:300]
                raise UserError(
                    f"The tool {name!r} of the environment {type(self._object).__name__!r} cannot be described to the "
                    f"policy ({said}). Give its arguments type hints, and describe it and them in a docstring of "
                    "Google's style; a method that is no tool begins with an underscore."
                ) from error
        return schemas

    def reset(self, columns: Mapping[str, Any]) -> str | None:
        assert self._reset is not None
        observation = self._result(self._reset(**columns))
        return None if observation is None else str(observation)

    def respond(self, text: str, calls: list[ToolCall]) -> Reply:
        messages, failed = [], 0
        for call in calls:
            try:
                if call.name not in self._methods:
                    raise ValueError(f"Tool {call.name} not found.")
                content = str(self._result(self._methods[call.name](**call.arguments)))
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 (a tool may raise anything, which the policy reads)
                failed += 1
                content = str({"error": str(error)})
            messages.append({"role": "tool", "name": call.name, "content": content})
        return Reply(messages, done=not calls, calls=len(calls), failed_calls=failed)

    @property
    def scores_itself(self) -> bool:
        return self._get_reward is not None

    def reward(self) -> float | None:
        return None if self._get_reward is None else self._result(self._get_reward())

    def final(self) -> object:
        return self._object

    def _result(self, returned: Any) -> Any:
        """Return the result of a method, after waiting for it if it is `async def`."""
        if not inspect.isawaitable(returned):
            return returned

        async def awaited() -> Any:
            return await returned

        return self._runner.run(awaited())  # one loop per object, which what it holds may belong to
