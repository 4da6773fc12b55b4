"""The savings that perfect choice could bring: the time of a run without its uninformative groups."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from app.studies.compare.records import Summary
from datamodules.errors import UserError
from datamodules.types import REWARD_TOLERANCE

_COLUMNS = ["step", "prompt_id", "source", "correctness", "completion_tokens"]


def informative_token_share(version: Path) -> float | None:
    """Return the share of rolled-out tokens that were in groups with differing correctness rewards.

    Only steps whose completions were written (`callbacks.CompletionsLog`) count; replayed groups are left out.

    Args:
        version: folder of the run.

    Returns:
        The share, or None when no completions were written.

    Raises UserError for an unreadable file.
    """
    tokens, informative = 0.0, 0.0
    for file in sorted((version / "completions").glob("step_*.parquet")):
        try:
            table = pq.read_table(file, columns=_COLUMNS).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{str(file)!r} is unreadable ({str(error).splitlines()[0]}), expected completions with "
                f"{', '.join(_COLUMNS)}. Remove it to rebuild the report without it."
            ) from None
        groups = table[table["source"] != "replay"].groupby(["step", "prompt_id"])
        spread = groups["correctness"].max() - groups["correctness"].min()
        sums = groups["completion_tokens"].sum()
        tokens += float(sums.sum())
        informative += float(sums[spread > REWARD_TOLERANCE].sum())
    return informative / tokens if tokens else None


def perfect_choice(summary: Summary, share: float) -> float:
    """Return the time of a run that rolls out only its informative groups, relative to its own time.

    It assumes that choosing is free, that a token costs the same in every rollout, and that a group teaches the same
    in any batch. A method that finds other informative groups may do better; leaving out waste alone cannot.

    Args:
        summary: the run.
        share: its `informative_token_share`.
    """
    return 1.0 - summary.seconds["rollout"] / summary.training_seconds * (1.0 - share)
