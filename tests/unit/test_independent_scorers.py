"""Our verdicts beside those of lm-eval-harness's GSM8K task and of math-verify on the same completions.

The harness's scorer is written here from the expressions in its task file (version 3.0); math-verify runs itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import math_verify
import pytest

from app.rewards import Math, Numeric

DATA = Path("/work/shared/data")
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the questions and solutions in {DATA}")
ENDS = (
    "#### {right}", "The answer is {right}.", "So she has ${right} left.", r"\boxed{{{right}}}", "#### ${right}.00",
    "#### {wrong}", "The answer is {wrong}.", "**Answer: {right}**", "That is {right} / 1 each.", "#### {right} apples",
)  # fmt: skip
"""How answers end: eight of ten are right."""
VERDICTS = ("math", "numeric", "after", "strict", "flexible")


def without(text: str) -> str:
    """Return a text as the harness compares it: what `regexes_to_ignore` names is left out, and case."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def strict_match(completion: str, target: str) -> bool:
    found = re.findall(r"#### (\-?[0-9\.\,]+)", completion)
    return without(found[0] if found else "[invalid]") == without(target)


def flexible_extract(completion: str, target: str) -> bool:
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", completion)
    return without(next(filter(None, found[-1])) if found else "[invalid]") == without(target)


def verdicts(completion: str, target: str) -> tuple[bool, ...]:
    """Return the five verdicts of `VERDICTS`; `after` is `Numeric` on what follows `####`."""
    gold = [target.rpartition("#### ")[2]]
    ours = [one.score(completion, gold) == 1 for one in (Math(), Numeric(), Numeric(after="####"))]
    return (*ours, strict_match(completion, target), flexible_extract(completion, target))


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("#### {right}", "11111"),
        ("#### {wrong}", "00000"),
        ("The answer is {right}.", "11001"),
        (r"\boxed{{{right}}}", "11001"),
        # The harness's strict expression does not begin at a dollar sign, and it compares digits, not numbers.
        ("#### ${right}.00", "11100"),
        # It takes the denominator for the answer.
        ("That is {right} / 1 each.", "11000"),
        ("#### {right} apples", "11111"),
    ],
)
def test_verdicts_on_one_answer(end: str, expected: str) -> None:
    completion = "3 times 350 is 1,050.\n" + end.format(right="1050", wrong="1051")
    assert verdicts(completion, "350 * 3 = <<350*3=1050>>1050\n#### 1,050") == tuple(one == "1" for one in expected)


@NEEDS_DATA
def test_500_answers_of_gsm8k_beside_the_harness() -> None:
    agree: Counter[tuple[str, str]] = Counter()
    differ: dict[tuple[str, str], set[str]] = {}
    pairs = (("after", "strict"), ("numeric", "flexible"), ("math", "flexible"))
    for place, line in enumerate((DATA / "gsm8k_test.jsonl").read_text().splitlines()[:500]):
        target = json.loads(line)["answer"]
        body, _, right = target.rpartition("\n#### ")
        end = ENDS[place % len(ENDS)]
        completion = f"{body}\n" + end.format(right=right, wrong=int(right.replace(",", "")) + 1)
        found = dict(zip(VERDICTS, verdicts(completion, target), strict=True))
        assert found["math"] == ("wrong" not in end), completion
        for ours, theirs in pairs:
            if found[ours] == found[theirs]:
                agree[ours, theirs] += 1
            else:
                assert found[ours], "where they differ, the answer is right and ours says so"
                differ.setdefault((ours, theirs), set()).add(end)
    # The figures of docs/rewards.md. One right answer is 1, the denominator.
    assert [agree[pair] for pair in pairs] == [450, 401, 401]
    money, fraction = "#### ${right}.00", "That is {right} / 1 each."
    assert [differ[pair] for pair in pairs] == [{money}, {money, fraction}, {money, fraction}]


@NEEDS_DATA
@pytest.mark.long
def test_500_solutions_of_math_beside_math_verify() -> None:
    rows = [json.loads(line) for line in (DATA / "math500.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    ours, right = Math(), 0
    for place, row in enumerate(rows):
        # A solution of the question, and for every other question one of the next.
        completion = rows[(place + place % 2) % 500]["solution"]
        gold = math_verify.parse(f"${row['answer']}$", parsing_timeout=None)
        theirs = math_verify.verify(gold, math_verify.parse(completion, parsing_timeout=None), timeout_seconds=None)
        assert ours.score(completion, [row["answer"]]) == float(theirs), (row["answer"], completion[-200:])
        right += theirs
    assert 250 <= right < 260
