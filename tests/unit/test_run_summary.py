"""Reading and writing of `summary.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from app.runs.summary import Evaluation, RolloutCounts, RunSummary
from datamodules.errors import UserError
from datamodules.ledger import PHASES

SUMMARY = RunSummary(
    steps=2, prompts_rolled_out=8, completions=32, completion_tokens=96, replayed_groups=1, informative_fraction=0.5,
    reference=RolloutCounts(4, 16, 48), validation=RolloutCounts(2, 8, 24), discarded=RolloutCounts(1, 4, 12),
    wasted=RolloutCounts(0, 0, 0), discarded_groups=1, failed_rewards=0, val={"first": 0.5, "best": 0.5, "last": 0.5},
    evaluations=(Evaluation(2, 1.5, 48, 144, 0.5),), validation_prompts=None, training_seconds=1.5,
    seconds={**dict.fromkeys(PHASES, 0.0), "total": 2.0, "update": 0.5}, rollout_overlapped_seconds=0.0, seed=0,
    config_sha256=None, completed=True,
)  # fmt: skip


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for written in (SUMMARY, dataclasses.replace(SUMMARY, completed=False, evaluations=(), val={})):
        written.write(path)
        assert RunSummary.read(path) == written
    content = json.loads(path.read_text())
    assert list(content) == [field.name for field in dataclasses.fields(RunSummary)]
    assert content["reference"] == {"prompts": 4, "completions": 16, "tokens": 48}
    del content["seconds"]["environment"]  # as in a file of an earlier version
    path.write_text(json.dumps(content))
    assert RunSummary.read(path) == written


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"steps": 1}'])
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not the summary of a run of this version") as error:
        RunSummary.read(path)
    assert "\n" not in str(error.value)
