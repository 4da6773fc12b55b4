"""What a worker does: load the rewards once, then score the completions of one call after the other."""

from __future__ import annotations

import inspect
import os
import pickle
import random
import resource
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from app.rewards.base import Reward, ScoreError
from app.rewards.workers import frames
from app.rewards.workers.function_log import FunctionLog
from app.rewards.workers.results import checked
from app.rewards.workers.task import MAX_REPLY_BYTES, Call, Reply, Setup
from app.rewards.workers.trial import check_arguments, check_missing_column, check_refusal, check_result, missing_module
from datamodules.errors import UserError

_MAX_TRACEBACK = 20_000


def serve(connection: socket.socket) -> None:
    """Load the rewards, then answer calls until the other end closes."""

    def tell(reply: Reply) -> None:
        frames.send(connection, frames.SETUP, reply.encode())

    tell(Reply("started", pid=os.getpid()))
    setup: Setup = pickle.loads(frames.receive(connection)[1])  # noqa: S301 (from the trainer, over a private socket)
    limit = setup.memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    rewards = []
    for position, pickled in enumerate(setup.rewards):
        tell(Reply("loading", reward=position))
        try:
            reward = pickle.loads(pickled)  # noqa: S301 (from the trainer, over a private socket)
            reward.sharing_workers = setup.num_workers
            reward.load()
        except UserError as error:
            return tell(Reply("unusable", error=str(error)))
        except BaseException as error:  # noqa: BLE001 (a reward may raise anything)
            return tell(
                Reply("unloadable", error=error_line(error), traceback=traceback.format_exc()[-_MAX_TRACEBACK:])
            )
        rewards.append(reward)
    tell(Reply("ready", notes=[reward.start_notice for reward in rewards if reward.start_notice]))
    me = os.getpid()
    while True:
        number, request = frames.receive(connection)
        for reply in answers(rewards, request):
            if os.getpid() != me:  # a fork that the reward has let return here
                os._exit(0)
            frames.send(connection, number, within_limit(reply))


def answers(rewards: Sequence[Reward], request: bytes) -> Iterator[Reply]:
    """Yield the replies to a pickled `Call`; see `Reply`."""
    call: Call = pickle.loads(request)  # noqa: S301 (from the trainer, over a private socket)
    reward, count = rewards[call.reward], len(call)
    if not call.one_by_one:
        yield from _attempt(reward, call, 0)
        return
    for row in range(count):
        if not reward.one_by_one:  # what it has changed in its arguments must not reach the next completion
            call = pickle.loads(request)  # noqa: S301 (as above)
        yield from _attempt(reward, call.rows(row, row + 1), row)


def _attempt(reward: Reward, call: Call, row: int) -> Iterator[Reply]:
    """Yield the replies to a call, the last of which says how it ended."""
    try:
        yield from score(reward, call, row)
    except UserError as error:
        yield Reply("unusable", row=row, error=str(error))
    except BaseException as error:  # noqa: BLE001 (a reward may raise anything)
        yield Reply("raised", row=row, error=error_line(error), traceback=traceback.format_exc()[-_MAX_TRACEBACK:])


def error_line(error: BaseException) -> str:
    """Return type and message of an exception, and the innermost line of code that no package installs."""
    told = " ".join("".join(traceback.format_exception_only(error)).split())[:300]
    installed = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "<")
    places = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(installed)]
    return f"{told} ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else told


def within_limit(reply: Reply) -> bytes:
    """Encode a reply, without what the reward has logged where that makes it larger than `MAX_REPLY_BYTES`."""
    encoded = reply.encode()
    if len(encoded) <= MAX_REPLY_BYTES:
        return encoded
    note = f"logged {len(encoded) >> 20} MiB in one call, more than the {MAX_REPLY_BYTES >> 20} MiB allowed: left out"
    return replace(reply, metrics=[], extras={}, notes=[note]).encode()


def score(reward: Reward, call: Call, row: int = 0) -> Iterator[Reply]:
    """Run the reward on the call's completions and check what it returns. Yield what a generator yields at once.

    Args:
        reward: a loaded reward.
        call: `N` completions, which the reward may change.
        row: position of the first, for the replies.
    """
    random.seed(call.seed)
    np.random.seed(call.seed % 2**32)
    count = len(call)
    texts = list(map(str, call.completions)) if call.trial else []
    log = FunctionLog(count)
    arguments = {
        **call.columns,
        "prompts": call.prompts,
        "completions": call.completions,
        "completion_ids": [ids.tolist() for ids in call.completion_ids],
        "trainer_state": call.state,
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    arguments.pop(_name_of_self(type(reward)), None)
    reads_environments = call.environments is not None and reward.takes_environments
    if reads_environments and call.environments is not None:
        arguments["environments"] = [] if call.trial else _unpickled(reward, call.environments, call.labels)
    if call.trial:
        check_arguments(reward, arguments)
        if reads_environments:  # of which there are none before the first conversation
            yield Reply("scores", row=row, scores=[None] * count)
            return
    try:
        returned: object = reward(**arguments)
        if isinstance(returned, Iterator):
            yielded: list[object] = []
            for value in islice(returned, count + 1):
                if len(yielded) < count:
                    yield _reply("partial", row + len(yielded), [value], 1)
                yielded.append(value)
            returned = yielded
    except ImportError as error:
        if call.trial:
            raise missing_module(reward, error) from error
        raise
    except ScoreError as error:
        if call.trial:
            check_refusal(reward, error)
        raise
    except KeyError as error:
        if call.trial:
            check_missing_column(reward, error, arguments, texts)
        raise
    if call.trial:
        check_result(reward, returned, count)
    yield replace(_reply("scores", row, returned, count), metrics=log.metrics, extras=log.extras, notes=log.notes)


def _reply(kind: Literal["scores", "partial"], row: int, returned: object, count: int) -> Reply:
    scores, errors = checked(returned, count)
    late = [
        position
        for position, one in enumerate(returned if isinstance(returned, list | tuple) else ())
        if isinstance(one, ScoreError) and one.timed_out and position in errors
    ]
    return Reply(kind, row=row, scores=scores, invalid={str(at): error for at, error in errors.items()}, late=late)


def _unpickled(reward: Reward, environments: Sequence[bytes | None], labels: Sequence[str]) -> list[object]:
    """Return the final objects of environments. Raises UserError for one that does not pickle."""
    advice = "Let it refer to plain values only, or give it get_reward and choose the reward app.rewards.Environment."
    found: list[object] = []
    for pickled, label in zip(environments, labels, strict=True):
        told = f"Reward {reward.name!r} reads the environment's final object, but that of {label}"
        if pickled is None:
            raise UserError(f"{told} does not pickle. {advice}")
        try:
            found.append(pickle.loads(pickled))  # noqa: S301 (the user's own class, in the process for users' code)
        except Exception as error:
            raise UserError(f"{told} cannot be unpickled ({error_line(error)}). {advice}") from error
    return found


@cache
def _name_of_self(kind: type[Reward]) -> str:
    """Return the argument of `__call__` that takes the reward itself, which a column must not take; "" if none can."""
    own = next(iter(inspect.signature(kind.__call__).parameters.values()))
    return "" if own.kind is own.POSITIONAL_ONLY else own.name
