"""What a trial call refuses: a reward that cannot work on any completion, because of its signature, columns or result.

Other exceptions, and a call that takes too long, may be the reward's honest answer to this one completion. They are
told and end nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from app.rewards.base import Reward, ScoreError
from app.rewards.workers.results import shape_error, value_error
from datamodules.errors import UserError, nearest

EXTRAS = ("trainer_state", "log_extra", "log_metric")


def check_arguments(reward: Reward, arguments: Mapping[str, Any]) -> None:
    """Raise UserError when the reward requires an argument that is neither a column nor one of TRL's."""
    parameters = inspect.signature(reward.receiver).parameters.values()
    required = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and (one.name not in arguments or one.kind is one.POSITIONAL_ONLY)
    ]
    if required:
        names = ", ".join(map(repr, required))
        raise UserError(
            f"Reward {reward.name!r} requires the argument {names}, but it is called with prompts, completions, "
            f"completion_ids and the data's columns, by keyword. {_hint(required[0], arguments)}"
        )


def check_missing_column(reward: Reward, error: KeyError, arguments: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Raise UserError when an exception is the look-up of a column that the data do not have.

    A key that is part of a completion is no column but what the reward has read there.
    """
    key = error.args[0] if error.args else None
    if isinstance(key, str) and key not in arguments and not any(key in text for text in texts):
        raise UserError(f"Reward {reward.name!r} reads {key!r}. {_hint(key, arguments)}") from error


def missing_module(reward: Reward, error: ImportError) -> UserError:
    """Return the refusal of a reward that cannot import what it uses."""
    return UserError(
        f"Reward {reward.name!r} cannot import what it uses ({error}). Install it in the environment of dots "
        f"({sys.executable})."
    )


def check_result(reward: Reward, returned: Any, count: int) -> None:
    """Raise UserError when a reward has not returned one number, None or `ScoreError` per completion."""
    wrong = shape_error(returned, count)
    if wrong is None:
        for one in returned:
            if isinstance(one, ScoreError):
                check_refusal(reward, one)
            else:
                wrong = wrong or value_error(one)
    if wrong:
        raise UserError(
            f"Reward {reward.name!r} {wrong}. Return a list with one score per completion, in order, and None where "
            "the reward does not apply."
        )


def check_refusal(reward: Reward, error: ScoreError) -> None:
    """Raise UserError when what a reward met would happen to any completion."""
    if error.refused:
        raise UserError(f"Reward {reward.name!r} cannot work: {error}.") from error


def _hint(name: str, arguments: Mapping[str, Any]) -> str:
    if name == "environments":
        return "Only a run with an environment has that: set model.environment."
    own = {"prompts", "completions", "completion_ids", "environments", *EXTRAS}
    columns = sorted(set(arguments) - own)
    return f"The data's columns are {', '.join(map(repr, columns)) or 'none'}: {nearest(name, columns)}"
