"""Whether two answers are equal."""

from __future__ import annotations

import re

from app.rewards.equality.forms import Answer, Based, Group, Named, Quantity, Words
from app.rewards.equality.formulas import same_formula
from app.rewards.equality.latex import tight


def same(gold: Answer, given: Answer) -> bool:
    """Return whether an answer equals the reference."""
    if tight(gold.text) == tight(given.text):
        return True
    if isinstance(gold, Named) or isinstance(given, Named):
        if isinstance(gold, Named) and isinstance(given, Named) and gold.name != given.name:
            return same_formula(gold.text, given.text)
        if _is_equation(gold) or _is_equation(given):
            return same_formula(gold.text, given.text)
        return same(_value(gold), _value(given))
    if isinstance(gold, Group):
        return _same_group(gold, given)
    if isinstance(given, Group):
        return given.kind == "{}" and len(given.items) == 1 and same(gold, given.items[0])
    if isinstance(gold, Words) and isinstance(given, Words):
        return gold.words == given.words
    if isinstance(gold, Based) or isinstance(given, Based):
        return (
            isinstance(gold, Based)
            and isinstance(given, Based)
            and (gold.digits, gold.base) == (given.digits, given.base)
        )
    if isinstance(gold, Words) or isinstance(given, Words):
        # A few small letters may be a product of variables; a word is not.
        return all(not isinstance(one, Words) or re.fullmatch("[a-z]{2,3}", one.text) for one in (gold, given)) and (
            same_formula(gold.text, given.text)
        )
    if gold.unit and given.unit and gold.unit != given.unit:
        return False
    if gold.number and given.number:
        return gold.number.equals(given.number)
    return same_formula(gold.formula, given.formula, gold.number, given.number)


def _value(answer: Answer) -> Answer:
    return answer.value if isinstance(answer, Named) else answer


def _is_equation(answer: Answer) -> bool:
    return isinstance(answer, Quantity) and bool(re.search(r"[=<>]|\\[lgn]e ", answer.text))


def _same_group(gold: Group, given: Answer) -> bool:
    if not isinstance(given, Group):
        return gold.kind == "{}" and len(gold.items) == 1 and same(gold.items[0], given)
    loose = ("", "{}", "±")
    kinds = loose if gold.kind in loose else (gold.kind,)
    if given.kind not in kinds or len(gold.items) != len(given.items):
        return False
    names = [{item.name for item in group.items if isinstance(item, Named)} for group in (gold, given)]
    if gold.kind in ("{}", "±", "cup") or given.kind == "±" or all(len(each) == len(gold.items) for each in names):
        rest = list(given.items)
        for item in gold.items:
            match = next((place for place, other in enumerate(rest) if same(item, other)), None)
            if match is None:
                return False
            del rest[match]
        return True
    return all(map(same, gold.items, given.items))
