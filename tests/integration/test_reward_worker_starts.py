"""Reward workers that die while they load a reward."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.rewards import Function, RewardScorer, WorkerOptions
from datamodules.errors import UserError

DYING = """
import os
with open({log!r}, "a") as file: print("started", file=file)
with open({log!r}) as file: starts = len(file.readlines())
if starts <= {deaths}: os._exit(3)
def reward(completions, **rest): return [1.0] * len(completions)
"""


@pytest.mark.parametrize("deaths", [2, 3])
def test_the_third_worker_in_a_row_that_dies_while_loading_ends_the_run(
    deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "starts"
    (tmp_path / f"dots_dies_{deaths}.py").write_text(DYING.format(log=str(log), deaths=deaths))
    monkeypatch.syspath_prepend(tmp_path)
    scorer = RewardScorer([Function(f"dots_dies_{deaths}.reward")], "drop", WorkerOptions(num_workers=1))
    try:
        if deaths == 2:
            scorer.wait_ready()
        else:
            with pytest.raises(UserError, match="3 workers in a row died while loading it"):
                scorer.wait_ready()
    finally:
        scorer.close()
    assert log.read_text().count("started") == 3
