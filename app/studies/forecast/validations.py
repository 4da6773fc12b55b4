"""A run's own validations as a recorded run: each is a visit to all of its prompts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from app.studies.forecast.recorded_run import Traces
from datamodules.errors import UserError


def read_validations(folder: Path) -> Traces:
    """Read `completions/val_*.parquet` of a run's folder, which `callbacks.CompletionsLog` writes, as traces.

    A rate is the mean correctness of a prompt's completions in one validation. Prompts that are not in all of them are
    left out. A named validation set is in a folder of its own, `completions/NAME`.

    Raises:
        UserError: fewer than two validations, or no prompt that is in all of them.
    """
    inside = folder / "completions" if (folder / "completions").is_dir() else folder
    files = sorted(inside.glob("val_*.parquet"))
    if len(files) < 2:
        raise UserError(
            f"--traces is the folder {str(folder)!r} with {len(files)} validations (completions/val_*.parquet), "
            "expected at least 2. Give the folder of a run that was validated several times, or for a named set its "
            "folder completions/NAME."
        )
    columns = ["prompt_id", "question", "correctness"]
    rows = pd.concat([pd.read_parquet(file, columns=columns).assign(visit=visit) for visit, file in enumerate(files)])
    rates = rows.groupby(["prompt_id", "visit"], sort=False)["correctness"].mean().unstack().dropna().clip(0.0, 1.0)
    if rates.empty:
        raise UserError(
            f"--traces is the folder {str(folder)!r}, but none of its prompts is in all {len(files)} validations. Give "
            "the folder of a run whose validation prompts stayed the same."
        )
    questions = rows.drop_duplicates("prompt_id").set_index("prompt_id")["question"].loc[rates.index]
    return Traces(tuple(rates.index), tuple(questions), rates.sort_index(axis=1).to_numpy())
