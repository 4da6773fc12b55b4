"""Work that rank 0 does for all ranks, and failures of one rank on which all must act."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from app.engines.requests import EngineError
from app.engines.server.client import LostServerError
from app.ranks import Ranks
from datamodules.errors import UserError

T = TypeVar("T")


def on_rank_zero(ranks: Ranks, work: Callable[[], T], where: str) -> T:
    """Run `work` on rank 0 and return its result on all ranks. Collective.

    Args:
        ranks: the trainer's processes.
        work: returns a value that JSON can represent.
        where: what the other ranks wait for, for messages.

    Raises:
        LostServerError: raised by `work`; on all ranks.
        UserError: raised by `work`; the other ranks raise an EngineError.
        LostRankError: see `Ranks.meet`.
    """
    if ranks.size == 1:
        return work()
    sent, raised = "{}", None
    if ranks.rank == 0:
        try:
            sent = json.dumps({"result": work()})
        except (LostServerError, UserError) as error:
            raised = error
            sent = json.dumps({"error": str(error), "lost_server": isinstance(error, LostServerError)})
    received = json.loads(ranks.gather(sent.encode(), where)[0])
    if raised is not None:
        raise raised
    if "error" in received:
        raise (LostServerError if received["lost_server"] else EngineError)(received["error"])
    result: T = received["result"]
    return result


def lost_server_of_any_rank(ranks: Ranks, mine: LostServerError | None, where: str) -> LostServerError | None:
    """Return the first rank's lost server on all ranks, or None if no rank has lost one. Collective."""
    messages = [message.decode() for message in ranks.gather(str(mine or "").encode(), where)]
    return next((LostServerError(message) for message in messages if message), None)
