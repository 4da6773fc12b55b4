r"""Whether two answers are equal, strictly: what they say decides, not what a lenient parser can make of them.

| | equal | unlike |
|---|---|---|
| numbers | `0.5`, `1/2`, `\frac12`; `1,234`, `1 234`; `3\frac12`, `7/2`; `1/3`, `0.333333` | `1.6e-19`, `3.2e-19` |
| units | `5`, `5 cm`; `\$7`, `7`; `90^\circ`, `90`; `50\%`, `50` (as MATH grades it) | `5 m`, `5 cm`; `50\%`, `0.5` |
| bases | `2004_5`, `2004_{5}` | `2004_5`, `2004_7`, `2004` |
| words | `\text{east}`, `East`; `\text{(C)}`, `C` | `CAB`, `ABC` |
| order | `\{1, 2\}`, `\{2, 1\}`; `x = 1, y = 2`, `y = 2, x = 1` | `12, 5`, `5, 12`; `(1, 2)`, `[1, 2)` |
| several boxes | `\boxed{2}` and `\boxed{3}`, in any order | one of them |
| names | `x = 5`, `5`; `x \in [1, 2]`, `1 \le x \le 2`, `[1, 2]` | `x = 5`, `y = 5` |
| formulas | `(x+1)^2`, `x^2+2x+1`; `y = 2x + 3`, `2x - y + 3 = 0` | what differs at a point |

Decimals may be rounded: by 1e-6 relative to the reference, and by one unit of the last place that is written. Numbers,
units, words and the structure of lists, intervals, sets and matrices are read here; single formulas by
math-verify's parser, and compared by their values at fixed points. Text and nesting are bounded before they reach that
parser, and magnitudes before they reach sympy: beyond the bounds answers are compared as text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from app.rewards.numbers import NUMBER, RELATIVE_TOLERANCE, Number, number_of, plain_symbols
from datamodules.answers import last_boxes

if TYPE_CHECKING:
    from sympy import Basic, Expr

MAX_LENGTH = 400
MAX_DEPTH = 8
"""The parser's time grows by a factor with every pair of brackets."""
_MAX_EXPONENT = 1000
_DIGITS = 40

_TIDY = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|hbox|mathrm|mathbf|mathit|mathsf|text[a-z]+|operatorname)\s*(?=\{)", r"\\text"),
        (r"(?<!\\)\\!|(?:\\text\s*)?\{\s*\}", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\thinspace(?![A-Za-z])", " "),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"(?<=\d)\{,\}(?=\d)", ","),
        (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\le "),
        (r"\\geq?(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\neq?(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\%|\\text\s*\{\s*per ?cent\s*\}|\bper ?cent\b", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\text\s*\{\s*degrees?\s*\}|(?<=[\d}])\s*degrees?\b", "°"),
        (r"\*\*", "^"),
        (r"^([-+])\s+", r"\1"),
        (r"\s+", " "),
    )
]
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = frozenset({"(", "[", "{", r"\{", r"\langle", r"\begin"})
_CLOSE = frozenset({")", "]", "}", r"\}", r"\rangle", r"\end"})
_COMMA = re.compile(
    r"\s*(?:[,;]\s*)?(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*|\s*[,;]\s*"
)
_EQUALS = re.compile(r"\s*(?:=|\\approx(?![A-Za-z])|\\in(?![A-Za-z]))\s*")
_ORDER = re.compile(r"\s*(?:<|>|\\le|\\ge)(?![A-Za-z])\s*")
_CUP = re.compile(r"\s*\\cup(?![A-Za-z])\s*")
_NAME = re.compile(
    r"(?:[A-Za-z]|\\(?!frac|sqrt|text)[a-z]+)(?:_\{?\w+\}?)?|[A-Za-z](?:\^\{?-1\}?)?\s?\([A-Za-z]\)"
    r"|(?:\\text\s?\{)?[A-Za-z ]{2,}\}?"
)
_MATRIX = re.compile(r"\\begin\{(\w*matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CURRENCY = {r"\$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
_MONEY = re.compile(r"([-+]?)\s*(\\\$|[€£¥₹])\s*(?=[-+.\d])")
_UNIT_WORD = r"(?:\\text\s*\{[A-Za-z .]*\}|[A-Za-z]+\.?)(?:\s?\^\s?\{?-?\d\}?)?"
_UNIT = re.compile(rf"(?:%|°\s?[CF]?|\\\$|[€£¥₹])|{_UNIT_WORD}(?:\s?[ /]\s?{_UNIT_WORD})*")
_FORMULA_UNIT = re.compile(r"(?s)(.*(?:\d|\\pi).*?)\s*(%|°|\\text\s*\{\s*[A-Za-z][A-Za-z .]*\}(?:\s?\^\s?\{?-?\d\}?)?)")
_SHORT_UNITS = set(re.findall(r"\w+", "m s g h l L cm mm km kg mg ml mL in ft yd mi lb oz hr"))
_FUNCTIONS = set(
    re.findall(
        r"\w+",
        """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi mod
max min gcd lcm det lim inf infinity frac""",
    )
)
_BASED = re.compile(r"\(?([-+]?)([0-9A-Za-z]+)\)?\s*(?:_\s*\{?\s*|\(?\s*base\s*)(\d{1,2})\s*[})]?")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+")
_CAPITALS = re.compile(r"\\(?:text|begin|end)\s*\{[^{}]*\}|(?<![A-Za-z\\])[A-Z]{2,}(?![A-Za-z])")
_UNSOUND = re.compile(r"\d \d|(?:\^[^-+*/=,^]*){12}")
"""The parser adds up numbers with a space between them, and takes seconds for a tower of powers."""
_UNBOUNDED = frozenset({"Sum", "Product", "Integral", "Limit", "Derivative"})
_TRIALS = 4
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+\s*(?:[ap]\.?\s?m\.?)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or a formula, with its unit (empty if none is written)."""

    text: str
    number: Number | None
    formula: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """An answer that is no mathematics, in lower case."""

    text: str
    words: str


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base that is written with them."""

    text: str
    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Named:
    """`name = value` or `name` in `value`."""

    text: str
    name: str
    value: Answer


@dataclass(frozen=True, slots=True)
class Group:
    """Several answers: a set `{}`, two of one `±`, a union, a matrix, a list in a pair of brackets or without any."""

    text: str
    kind: str
    items: tuple[Answer, ...]


Answer: TypeAlias = Quantity | Words | Based | Named | Group
Relation: TypeAlias = tuple[str, "Basic", "Basic"]
"""Sign and the two sides."""


@lru_cache(maxsize=4096)
def read(text: str) -> Answer | None:
    """Return what an answer says; None if it is empty."""
    boxes = last_boxes(text)
    if len(boxes) > 1:
        items: list[Answer] = []
        for item in filter(None, map(read, boxes)):
            if not any(same(known, item) for known in items):
                items.append(item)
        return items[0] if len(items) == 1 else Group(text, "{}", tuple(items))
    return _read(_tidy(boxes[0] if boxes else text))


def same(gold: Answer, given: Answer) -> bool:
    """Return whether an answer equals the reference."""
    if _tight(gold.text) == _tight(given.text):
        return True
    if isinstance(gold, Named) or isinstance(given, Named):
        if isinstance(gold, Named) and isinstance(given, Named) and gold.name != given.name:
            return _same_formula(gold.text, given.text)
        if _is_equation(gold) or _is_equation(given):
            return _same_formula(gold.text, given.text)
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
            _same_formula(gold.text, given.text)
        )
    if gold.unit and given.unit and gold.unit != given.unit:
        return False
    if gold.number and given.number:
        return gold.number.equals(given.number)
    return _same_formula(gold.formula, given.formula, gold.number, given.number)


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


def _tidy(text: str) -> str:
    """Return a text without what LaTeX needs for looks alone."""
    text = plain_symbols(text).strip().strip("*").strip()
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if dollars == 1:  # a currency sign, not one of a pair
        text = re.sub(r"(?<!\\)\$(?=\s*[-+.\d])", r"\\$", text)
    text = re.sub(r"(?<!\\)\$", " ", text).strip()
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    return text[1:-1].strip() if _is_enclosed(text) and text[0] == "{" else text


def _tight(text: str) -> str:
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text where a separator stands outside all brackets."""
    pieces, start, depth, place = [], 0, 0, 0
    while place < len(text):
        if depth == 0 and (found := separator.match(text, place)):
            pieces.append(text[start : found.start()])
            start = place = found.end()
            continue
        token = _TOKEN.match(text, place)
        assert token is not None, "every character is a token"
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        place = token.end()
    return [*pieces, text[start:]]


def _depths(text: str) -> list[int]:
    """Return the number of open brackets after every token."""
    depth, depths = 0, []
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        depths.append(depth)
    return depths


def is_bounded(text: str) -> bool:
    """Return whether the nesting of a text's brackets is safe for the parser."""
    return max(_depths(text), default=0) <= MAX_DEPTH


def _is_enclosed(text: str) -> bool:
    """Return whether the first bracket of a text, at its start, closes at its end."""
    depths = _depths(text)
    return len(depths) > 1 and depths[0] == 1 and depths[-1] == 0 and 0 not in depths[:-1]


def _read(text: str) -> Answer | None:
    if not text:
        return None
    if len(text) > MAX_LENGTH or not is_bounded(text):
        return Words(text, text.casefold())
    return (
        _quantity(text)
        or _based(text)
        or _matrix(text)
        or _listed(text, _split(text, _COMMA), "")
        or _named(text)
        or _interval(text)
        or _listed(text, _split(text, _CUP), "cup")
        or _bracketed(text)
        or _two_signs(text)
        or _words(text)
        or Quantity(text, None, text)
    )


def _quantity(text: str) -> Quantity | None:
    money = _MONEY.match(text)
    unit = _CURRENCY[money[2]] if money else ""
    bare = money[1] + text[money.end() :] if money else text
    found = NUMBER.match(bare)
    number = number_of(found) if found else None
    if found and number:
        rest = bare[found.end() :]
        if not rest:
            return Quantity(text, number, bare, unit)
        if not unit and _UNIT.fullmatch(rest.strip()) and _is_unit(rest):
            return Quantity(text, number, found[0], _unit_name(rest))
    measured = _FORMULA_UNIT.fullmatch(bare)
    if measured and not unit and not _EQUALS.search(bare):
        return Quantity(text, None, measured[1], _unit_name(measured[2]))
    return Quantity(text, None, bare, unit) if money else None


def _is_unit(text: str) -> bool:
    """Return whether what follows a number is its unit, not a product of variables."""
    for word in re.findall("[A-Za-z]+", _TEXT.sub("", text)):
        spaced = text.startswith(" ")
        known = len(word) > 1 or spaced if word in _SHORT_UNITS else spaced and len(word) > 2
        if not known or word in _FUNCTIONS:
            return False
    return True


def _unit_name(text: str) -> str:
    """Return one name for the spellings of a unit: `centimeter**2` for `cm^2`, `\text{ square centimeters}`."""
    from sympy.physics import units

    text = _TEXT.sub(r" \1 ", text).strip().rstrip(".")
    if text in _CURRENCY:
        return _CURRENCY[text]
    text = re.sub(r"\b(sq|square|cu|cubic)\.? (\w+)", lambda m: m[2] + ("^2" if m[1][0] == "s" else "^3"), text)
    names = []
    for word in re.findall(r"[A-Za-z]+|-?\d|[^\sA-Za-z{}^]", text):
        known = getattr(units, word, None) or getattr(units, word.lower(), None)
        names.append(str(known.name) if isinstance(known, units.Quantity) else re.sub("(?<=..)s$", "", word.lower()))
    return " ".join(names)


def _based(text: str) -> Based | None:
    found = _BASED.fullmatch(_TEXT.sub(r" \1 ", text).strip())
    if not found:
        return None
    sign, digits, base = found[1], found[2].upper().lstrip("0"), int(found[3])
    if not re.search(r"\d", found[2]) or any(int(digit, 36) >= base for digit in digits):
        return None
    return Based(text, sign + digits, base)


def _matrix(text: str) -> Group | None:
    found = _MATRIX.fullmatch(text)
    if not found:
        return None
    rows = [
        _listed(row, _split(row, re.compile(r"\s*&\s*")), "row", 1)
        for row in _split(found[2], re.compile(r"\s*\\\\\s*"))
    ]
    kind = "|" if found[1] == "vmatrix" else "matrix"
    items = [row for row in rows if row is not None]
    return Group(text, kind, tuple(items)) if items else None


def _listed(text: str, pieces: Sequence[str], kind: str, least: int = 2) -> Group | None:
    items = [item for item in map(_read, map(str.strip, pieces)) if item is not None] if len(pieces) >= least else []
    if len(items) < least:
        return None
    if any(isinstance(item, Group) and item.kind == "±" for item in items):
        items = [one for item in items for one in (item.items if isinstance(item, Group) else [item])]
        kind = kind or "±"
    return Group(text, kind, tuple(items))


def _named(text: str) -> Answer | None:
    sides = _split(text, _EQUALS)
    if len(sides) < 2:
        return None
    name, value = sides[0].strip(), _read(sides[-1].strip())
    if value is None:
        return None
    if _NAME.fullmatch(name):
        return Named(text, re.sub(r"[{}\s]|\\text", "", name), value)
    return value if not any(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", side)) for side in sides) else None


def _interval(text: str) -> Named | None:
    """Return the interval in which an inequality puts one variable."""
    pieces, signs = _split(text, _ORDER), [sign.strip() for sign in _ORDER.findall(text)]
    if len(pieces) - 1 != len(signs) or len(signs) not in (1, 2):
        return None
    if all(sign in (">", r"\ge") for sign in signs):
        pieces, signs = pieces[::-1], [{">": "<", r"\ge": r"\le"}[sign] for sign in signs[::-1]]
    if any(sign not in ("<", r"\le") for sign in signs):
        return None
    if len(signs) == 1:
        left = _NAME.fullmatch(pieces[0].strip()) is not None
        pieces, signs = ([r"-\infty", *pieces], ["<", *signs]) if left else ([*pieces, r"\infty"], [*signs, "<"])
    low, name, high = (piece.strip() for piece in pieces)
    ends = [_read(low), _read(high)]
    if not _NAME.fullmatch(name) or None in ends:
        return None
    kind = "(["[signs[0] != "<"] + ")]"[signs[1] != "<"]
    return Named(text, name, Group(text, kind, tuple(end for end in ends if end is not None)))


def _bracketed(text: str) -> Answer | None:
    tokens = _TOKEN.findall(text)
    if not _is_enclosed(text) or tokens[0] == r"\begin":
        return None
    kind = (tokens[0] + tokens[-1]).replace("\\", "")
    inner = text[len(tokens[0]) : -len(tokens[-1])].strip()
    pieces = _split(inner, _COMMA)
    if kind == "()" and len(pieces) == 1:
        return _read(inner)
    return _listed(text, pieces, kind, 1)


def _two_signs(text: str) -> Answer | None:
    if text.count(r"\pm") != 1:
        return None
    items = [_read(re.sub(r"^\+", "", text.replace(r"\pm", sign).strip())) for sign in "+-"]
    return Group(text, "±", tuple(item for item in items if item is not None))


def _words(text: str) -> Answer | None:
    flat = _TEXT.sub(r" \1 ", text).strip()
    if not re.fullmatch(r"[\w .,:;'\"!?()/&-]+", flat) or re.search(r"\d_|_", flat):
        return None
    runs = re.findall("[A-Za-z]+", flat)
    marked = flat != text
    is_text = (
        any(len(run) > 3 and run not in _FUNCTIONS for run in runs)
        or re.fullmatch("[A-Za-z]{2,3}", flat)
        or (any(len(run) > 1 for run in runs) and (marked or re.search("[A-Z][A-Za-z]", flat)))
        or _RATIO.fullmatch(flat)
    )
    if not is_text or set(runs) & _FUNCTIONS:
        return _read(flat) if marked else None
    return Words(text, " ".join(re.sub("[.,'\"]", "", flat).casefold().split()))


def _same_formula(gold: str, given: str, right: Number | None = None, found: Number | None = None) -> bool:
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
        values = _evaluate(left, trial), _evaluate(other, trial)
        if values[0] is None or values[1] is None:
            return str(left) == str(other) and not left.has(zoo, nan)
        size = max(map(abs, values))
        slack = min(float(RELATIVE_TOLERANCE) * size, float(place))
        if abs(values[0] - values[1]) > max(slack, 1e-25 * size, 1e-30):
            return False
    return True


def _same_relations(gold: Sequence[Relation], given: Sequence[Relation]) -> bool:
    """Return whether each relation has the same sign, and sides whose differences are proportional."""
    if [sign for sign, *_ in gold] != [sign for sign, *_ in given]:
        return False
    for (sign, *sides), (_, *others) in zip(gold, given, strict=True):
        ratios = []
        for trial in range(_TRIALS):
            values = [_evaluate(side, trial) for side in (*sides, *others)]
            if any(value is None for value in values) or values[2] == values[3]:
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
    text = _WORD.sub(lambda word: rf"\{word[0]}" if word[0] in _FUNCTIONS else word[0], text)
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
        part = zlib.crc32(f"{name} {trial}".encode()) / 2**32
        return sympy.I if name == "i" else sympy.Float((0.4 + part) * (-1) ** trial, _DIGITS)
    if isinstance(expression, sympy.Float):
        return sympy.Rational(str(expression)).evalf(_DIGITS)
    if not isinstance(expression, sympy.Expr) or expression.func.__name__ in _UNBOUNDED:
        return None
    values = [_evaluate(argument, trial) for argument in expression.args]
    if any(value is None for value in values):
        return None
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
