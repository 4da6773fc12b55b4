"""What choice alone could save: the time of a run without the groups that taught it nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.errors import UserError
from datamodules.types import REWARD_TOLERANCE

_COLUMNS = ["step", "prompt_id", "source", "correctness", "completion_tokens"]


def informative_token_share(version: Path) -> float | None:
    """Of the tokens that a run rolled out, the share in groups whose correctness rewards differ.

    Counted over the steps whose completions it wrote (`callbacks.CompletionsLog`); replayed groups are left out.

    Args:
        version: folder of the run.

    Returns:
        None where no completions were written.

    Raises UserError for a file that cannot be read.
    """
    tokens, informative = 0.0, 0.0
    for file in sorted((version / "completions").glob("step_*.parquet")):
        table = _read(file)
        groups = table[table["source"] != "replay"].groupby(["step", "prompt_id"])
        spread = groups["correctness"].max() - groups["correctness"].min()
        sums = groups["completion_tokens"].sum()
        tokens += float(sums.sum())
        informative += float(sums[spread > REWARD_TOLERANCE].sum())
    return informative / tokens if tokens else None


def _read(file: Path) -> pd.DataFrame:
    try:
        return pq.read_table(file, columns=_COLUMNS).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read ({str(error).splitlines()[0]}), expected completions with "
            f"{', '.join(_COLUMNS)}: remove it to leave what choice could save untold"
        ) from None


def perfect_choice(account: Mapping[str, Any], share: float) -> float:
    """Time of a run with the same informative groups and none besides, over its own time.

    Choosing costs nothing, a token costs the same in every rollout, and a group teaches the same whatever stands
    beside it: a method that chooses other informative groups may do better, and none by leaving out waste alone.

    Args:
        account: the run's `summary.json`.
        share: its `informative_token_share`.
    """
    return 1.0 - account["seconds"]["rollout"] / account["training_seconds"] * (1.0 - share)
