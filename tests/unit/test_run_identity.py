"""Which checkpoints a run may resume from."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from app.runs.identity import FORMAT, RunIdentity
from datamodules.errors import UserError

RUN = RunIdentity(tokenizer="t", pool="p", prompts="q", group_size=8)


def test_the_same_run_is_accepted() -> None:
    RUN.check(RUN.as_dict())


@pytest.mark.parametrize("format_", [None, 1, FORMAT + 1])
def test_another_format_is_refused(format_: int | None) -> None:
    saved: dict[str, object] = {**RUN.as_dict(), "format": format_}
    if format_ is None:
        del saved["format"]
    expected = f"another version of Dots (its format is {format_ or 1}, this version reads {FORMAT}). Resume it with"
    with pytest.raises(UserError, match=re.escape(expected)) as raised:
        RUN.check(saved)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_without_identity_is_refused() -> None:
    with pytest.raises(UserError, match="another version of Dots"):
        RUN.check({})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(RUN, tokenizer="u"), "another tokenizer"),
        (replace(RUN, group_size=4), "num_generations=8, but the checkpoint was saved with groups of 4"),
        (replace(RUN, pool="x", prompts="y"), "another prompt pool"),
        (replace(RUN, pool="x", prompts="y"), r"dots export RUN --out FOLDER .* --model.policy.path FOLDER"),
        (replace(RUN, pool="x"), "the same prompts in another order"),
        (replace(RUN, pool="x", prompts="y", seed=3), "had seed_everything=3, this one has 0.* --seed_everything 3"),
    ],
)
def test_another_run_is_refused(other: RunIdentity, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RUN.check(other.as_dict())
