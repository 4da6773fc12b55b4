"""The strict reader and comparison on the answers of GSM8K's test set and MATH-500 (skipped without the data)."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from app.rewards import Math, Numeric, Reward
from app.rewards.equality import Quantity, read, same
from datamodules.answers import extract
from tests.support.reading_helpers import shared


def golds(name: str) -> list[str]:
    rows = [json.loads(line) for line in Path(shared(f"{name}.jsonl")).read_text().splitlines()]
    return [str(extract(row["answer"], "gsm8k" if name == "gsm8k_test" else "verbatim")) for row in rows]


def scored(reward: Reward, given: list[str], answers: list[str]) -> list[float | None]:
    boxes = [rf"Hence \boxed{{{one}}}." for one in given]
    return reward(["?"] * len(boxes), boxes, [[0]] * len(boxes), answer=answers)


def spellings(gold: str) -> list[str]:
    """Three other spellings of a number; none for other answers."""
    answer = read(gold)
    if not isinstance(answer, Quantity) or answer.number is None:
        return []
    value = answer.number.value
    over, under = value.as_integer_ratio()
    sign = "-" if value < 0 else ""
    if value.denominator == 1:
        return [f"{over:,}", f"{over}.0", rf"\frac{{{3 * over}}}{{3}}"]
    return [rf"{sign}\dfrac{{{abs(over)}}}{{{under}}}", f"{5 * over}/{5 * under}", f"{float(Fraction(value)):.12g}"]


def unlike(answers: list[str]) -> list[tuple[str, str]]:
    """Pairs of unlike answers: neighbours that differ, and changes of one thing of the answers themselves."""
    changes = [
        lambda text: rf"{text}_7" if text.isdigit() and int(text) > 6 and max(text) < "7" else "",
        lambda text: text[::-1] if text.isdigit() and text != text[::-1] else "",
        lambda text: f"{text},5" if text.isdigit() else "",
        lambda text: rf"{text}\times10^{{-19}}" if text.isdigit() and text != "0" else "",
        lambda text: text.replace("(", "[", 1) if text.startswith("(") and "," in text else "",
        lambda text: rf"\text{{{text[6:-1][::-1]}}}" if text.startswith(r"\text{") and "(" not in text else "",
        lambda text: text.replace("_", "_1") if "_" in text else "",
        lambda text: f"-{text}" if text[0].isdigit() and text != "0" else "",
    ]
    pairs = [(gold, change(gold)) for change in changes for gold in answers[::3] if change(gold)]
    neighbours = zip(answers, answers[1:] + answers[:1], strict=True)
    return [(a, b) for a, b in neighbours if a not in b and b not in a] + pairs


@pytest.mark.parametrize("name", ["gsm8k_test", "math500"])
def test_every_answer_is_read_and_equals_itself_in_other_spellings(name: str) -> None:
    answers = golds(name)
    assert len(answers) == {"gsm8k_test": 1319, "math500": 500}[name]
    assert scored(Math(), answers, answers) == [1.0] * len(answers)
    assert scored(Math(require_boxed=True), answers, answers) == [1.0] * len(answers)
    written = [(other, gold) for gold in answers for other in spellings(gold)]
    wrong = [
        pair
        for pair, score in zip(written, scored(Math(), *map(list, zip(*written, strict=True))), strict=True)
        if score != 1
    ]
    assert wrong == []
    assert len(written) >= {"gsm8k_test": 3 * 1319, "math500": 3 * 350}[name]
    numbers = [gold for gold in answers if spellings(gold)]
    assert scored(Numeric(pattern=r"\\boxed\{(.*)\}"), numbers, numbers) == [1.0] * len(numbers)
    others = [gold for gold in answers if not spellings(gold) and gold != "x=5"]
    assert not others or set(scored(Numeric(), others, others)) == {None}


@pytest.mark.parametrize("name", ["gsm8k_test", "math500"])
def test_unlike_answers_are_not_equal(name: str) -> None:
    pairs = unlike(golds(name))
    assert len(pairs) >= 200
    given, right = map(list, zip(*pairs, strict=True))
    wrong = [pair for pair, score in zip(pairs, scored(Math(), right, given), strict=True) if score != 0]
    assert wrong == []


def test_a_change_makes_unlike_pairs() -> None:
    """The pairs differ as written, so that a score of 1 would be the comparison's."""
    for gold, other in unlike(["(1, 2)", "12", r"\text{east}", "204_5", "3"]):
        assert gold != other
        assert not same(read(gold), read(other)), (gold, other)  # type: ignore[arg-type]
