"""What rank 0 does for all ranks, and what one of them has met with and all must act on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from app.engines.requests import EngineError
from app.engines.server.client import ServerGone
from app.ranks import Ranks
from datamodules.errors import UserError

T = TypeVar("T")


def by_first(ranks: Ranks, work: Callable[[], T], where: str) -> T:
    """What `work` returns, which rank 0 alone does, on all ranks. To be called by all of them.

    Args:
        ranks: the processes.
        work: its result is what JSON can hold.
        where: what the others wait for, for messages.

    Raises:
        ServerGone: `work` raised it: on all ranks.
        UserError: likewise; an EngineError on the others.
        LostRankError: `Ranks.meet`.
    """
    if ranks.size == 1:
        return work()
    said, raised = "{}", None
    if ranks.rank == 0:
        try:
            said = json.dumps({"result": work()})
        except (ServerGone, UserError) as error:
            raised = error
            said = json.dumps({"error": str(error), "gone": isinstance(error, ServerGone)})
    told = json.loads(ranks.gather(said.encode(), where)[0])
    if raised is not None:
        raise raised
    if "error" in told:
        raise (ServerGone if told["gone"] else EngineError)(told["error"])
    result: T = told["result"]
    return result


def loss_of_any(ranks: Ranks, mine: ServerGone | None, where: str) -> ServerGone | None:
    """The loss of a server that this rank or another one has met with, the same on all; None when none has.

    To be called by all ranks.
    """
    told = [said.decode() for said in ranks.gather(str(mine or "").encode(), where)]
    return next((ServerGone(said) for said in told if said), None)
