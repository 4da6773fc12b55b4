"""Formulas and relations, read by math-verify's parser and compared by their values at fixed points."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from app.rewards.equality.latex import MAX_LENGTH, is_bounded
from app.rewards.numbers import RELATIVE_TOLERANCE, Number

if TYPE_CHECKING:
    from sympy import Basic, Expr

_MAX_EXPONENT = 1000
_DIGITS = 40
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi mod max min gcd lcm det lim "
        "inf infinity frac",
    )
)
"""Names that are no product of variables."""
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+")
_CAPITALS = re.compile(r"\\(?:text|begin|end)\s*\{[^{}]*\}|(?<![A-Za-z\\])[A-Z]{2,}(?![A-Za-z])")
_UNSOUND = re.compile(r"\d \d|(?:\^[^-+*/=,^]*){12}")
"""The parser adds up numbers with a space between them, and takes seconds for a tower of powers."""
_UNBOUNDED = frozenset({"Sum", "Product", "Integral", "Limit", "Derivative"})
_TRIALS = 4
Relation: TypeAlias = tuple[str, "Basic", "Basic"]
"""Sign and the two sides."""


def same_formula(gold: str, given: str, right: Number | None = None, found: Number | None = None) -> bool:
    """Return whether two formulas, or relations, agree at fixed points; a decimal may be rounded."""
    from sympy import nan, zoo

    left, other = _parse(gold), _parse(given)
    if left is None or other is None:
        return False
    relations = _relations(left), _relations(other)
    if any(relations):
        return any(_same_relations(relations[0], turned) for turned in (relations[1], relations[1][::-1]))
    place = max((number.place for number in (right, found) if number), default=Fraction(0))
    for trial in range(_TRIALS):
        one, two = _evaluate(left, trial), _evaluate(other, trial)
        if one is None or two is None:
            return str(left) == str(other) and not left.has(zoo, nan)
        size = max(abs(one), abs(two))
        slack = min(float(RELATIVE_TOLERANCE) * size, float(place))
        if abs(one - two) > max(slack, 1e-25 * size, 1e-30):
            return False
    return True


def _same_relations(gold: Sequence[Relation], given: Sequence[Relation]) -> bool:
    """Return whether each relation has the same sign, and sides whose differences are proportional."""
    if [sign for sign, *_ in gold] != [sign for sign, *_ in given]:
        return False
    for (sign, *sides), (_, *others) in zip(gold, given, strict=True):
        ratios = []
        for trial in range(_TRIALS):
            values = [value for side in (*sides, *others) if (value := _evaluate(side, trial)) is not None]
            if len(values) < 4 or values[2] == values[3]:
                return [str(side) for side in sides] == [str(side) for side in others]
            ratios.append((values[0] - values[1]) / (values[2] - values[3]))
        constant = all(abs(ratio - ratios[0]) <= 1e-25 * abs(ratios[0]) for ratio in ratios)
        if not constant or not ratios[0] or (sign[0] == "<" and not ratios[0] > 0):
            return False
    return True


def _relations(expression: Basic) -> list[Relation]:
    """Return sign and sides of a relation, or of each in a chain of relations; an empty list for a formula."""
    from latex2sympy2_extended.logic import And
    from sympy.core.relational import Relational

    if isinstance(expression, And):
        return [each for part in expression._unsorted_args for each in _relations(part)]
    if not isinstance(expression, Relational):
        return []
    if expression.rel_op in (">", ">="):
        return [(expression.rel_op.replace(">", "<"), expression.rhs, expression.lhs)]
    return [(expression.rel_op, expression.lhs, expression.rhs)]


@lru_cache(maxsize=4096)
def _parse(text: str) -> Basic | None:
    """Return the sympy object that math-verify's parser makes of LaTeX or plain text; None if it makes none."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex
    from sympy import Basic

    if not text or len(text) > MAX_LENGTH or not is_bounded(text) or _UNSOUND.search(text):
        return None
    text = re.sub(r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text.replace("*", r"\cdot ").replace("°", ""))
    text = _WORD.sub(lambda word: rf"\{word[0]}" if word[0] in FUNCTIONS else word[0], text)
    # Letters side by side multiply, but a name such as AB is one symbol.
    text = _CAPITALS.sub(lambda word: word[0] if word[0][0] == "\\" else rf"\text{{{word[0]}}}", text)
    try:
        normal = normalize_latex(text, NormalizationConfig(malformed_operators=True, boxed="none"))
        parsed = latex2sympy(
            normal,
            is_real=not should_treat_as_complex(normal),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # noqa: BLE001 (it raises Exception itself)
        return None
    return parsed if isinstance(parsed, Basic) else None


def _evaluate(expression: Basic, trial: int) -> Expr | None:
    """Return an expression's value with its variables at a fixed point, one per trial; None if it has no value.

    Evaluates from the leaves up, so that no number exceeds the bounds: `10^{10^{10}}` has no value.
    """
    import sympy

    if isinstance(expression, sympy.Symbol):
        name = re.sub(r"[{}\s]", "", expression.name)
        place = zlib.crc32(f"{name} {trial}".encode()) / 2**32
        return sympy.I if name == "i" else sympy.Float((0.4 + place) * (-1) ** trial, _DIGITS)
    if isinstance(expression, sympy.Float):
        return sympy.Rational(str(expression)).evalf(_DIGITS)
    if not isinstance(expression, sympy.Expr) or expression.func.__name__ in _UNBOUNDED:
        return None
    values = []
    for argument in expression.args:
        if (part := _evaluate(argument, trial)) is None:
            return None
        values.append(part)
    if isinstance(expression, sympy.Pow) and values[0]:
        if abs(values[1] * sympy.log(values[0])).evalf(5) > _MAX_EXPONENT * 10:
            return None
    elif not isinstance(expression, sympy.Add | sympy.Mul | sympy.Number) and any(
        abs(value) > _MAX_EXPONENT for value in values
    ):
        return None  # a factorial, say
    whole = (
        values[0]
        if isinstance(expression, sympy.UnevaluatedExpr)
        else expression.func(*values)
        if values
        else expression
    )
    value = whole.evalf(_DIGITS)
    return value if value.is_number and value.is_finite else None
