"""Rewards by short names and functions: `math`, `my_rewards.is_right`, `my_rewards.py:is_right`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TypeAlias

from app.rewards.base import Reward
from app.rewards.code.reward import Code
from app.rewards.environment import Environment
from app.rewards.formatting import Format, SoftOverlong
from app.rewards.function import Function
from app.rewards.judge import Judge
from app.rewards.math import Math
from app.rewards.numeric import Exact, Numeric
from app.rewards.reasoning_gym import ReasoningGym
from app.rewards.remote import Remote
from datamodules.errors import UserError, nearest

Named: TypeAlias = Reward | str
_BUILT_IN: tuple[type[Reward], ...] = (
    Math, Numeric, Exact, Code, Environment, Judge, Remote, ReasoningGym, Format, SoftOverlong,
)  # fmt: skip


def rewards_of(given: Sequence[Named] | Named) -> list[Reward]:
    """Return the rewards of a run, of which one may be given without a list.

    Args:
        given: rewards, short names of built-in ones in any case, and functions: by their path or, from Python,
            themselves.

    Raises:
        UserError: a text names no reward, or something else is given.
    """
    listed = [given] if isinstance(given, str | Reward) or callable(given) else list(given)
    return [_reward(one) for one in listed]


def _reward(given: Named | Callable[..., object]) -> Reward:
    if isinstance(given, Reward):
        return given
    if isinstance(given, str):
        names = {kind.__name__: kind for kind in _BUILT_IN}
        kind = next((names[name] for name in names if name.lower() == given.lower().replace("_", "")), None)
        if kind is not None:
            return _without_options(kind)
        if "." not in given and ":" not in given:
            raise UserError(
                f"model.rewards={given}: no reward of this name is known; {nearest(given, [*names])} A function of "
                "your own is my_rewards.py:is_right or my_rewards.is_right."
            )
        return Function(given)
    if callable(given) and not isinstance(given, type):
        return Function.of(given)
    raise UserError(
        f"model.rewards holds {given!r}, but expected a reward, the name of one, or a function. Write e.g. math or "
        "my_rewards.py:is_right."
    )


def _without_options(kind: type[Reward]) -> Reward:
    parameters = inspect.signature(kind).parameters
    if needed := [name for name, one in parameters.items() if one.default is inspect.Parameter.empty]:
        raise UserError(
            f"model.rewards={kind.__name__} needs {' and '.join(needed)}. Write it as {{class_path: "
            f"app.rewards.{kind.__name__}, init_args: {{{needed[0]}: ...}}}}."
        )
    return kind()
