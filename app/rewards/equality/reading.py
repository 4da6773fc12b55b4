"""Reads what an answer says: numbers, units, words, and the structure of lists, intervals, sets and matrices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from app.rewards.equality.comparison import same
from app.rewards.equality.forms import Answer, Based, Group, Named, Quantity, Words
from app.rewards.equality.formulas import FUNCTIONS
from app.rewards.equality.latex import MAX_LENGTH, TOKEN, is_bounded, is_enclosed, split, tidy
from app.rewards.numbers import NUMBER, number_of
from datamodules.answers import last_boxes

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
_BASED = re.compile(r"\(?([-+]?)([0-9A-Za-z]+)\)?\s*(?:_\s*\{?\s*|\(?\s*base\s*)(\d{1,2})\s*[})]?")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+\s*(?:[ap]\.?\s?m\.?)?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}([-/.])\d\d?\1\d\d?|\d\d?([-/.])\d\d?\2\d{4}")


@lru_cache(maxsize=4096)
def read(text: str) -> Answer | None:
    """Return what an answer says; None if it is empty."""
    boxes = last_boxes(text)
    if len(boxes) > 1:
        items: list[Answer] = []
        for item in map(read, boxes):
            if item is not None and not any(same(known, item) for known in items):
                items.append(item)
        return items[0] if len(items) == 1 else Group(text, "{}", tuple(items))
    return _read(tidy(boxes[0] if boxes else text))


def _read(text: str) -> Answer | None:
    if not text:
        return None
    if len(text) > MAX_LENGTH or not is_bounded(text):
        return Words(text, text.casefold())
    return (
        _quantity(text)
        or _based(text)
        or _matrix(text)
        or _listed(text, split(text, _COMMA), "")
        or _named(text)
        or _interval(text)
        or _listed(text, split(text, _CUP), "cup")
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
        if not known or word in FUNCTIONS:
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
        _listed(row, split(row, re.compile(r"\s*&\s*")), "row", 1) for row in split(found[2], re.compile(r"\s*\\\\\s*"))
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
    sides = split(text, _EQUALS)
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
    pieces, signs = split(text, _ORDER), [sign.strip() for sign in _ORDER.findall(text)]
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
    tokens = TOKEN.findall(text)
    if not is_enclosed(text) or tokens[0] == r"\begin":
        return None
    kind = (tokens[0] + tokens[-1]).replace("\\", "")
    inner = text[len(tokens[0]) : -len(tokens[-1])].strip()
    pieces = split(inner, _COMMA)
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
        any(len(run) > 3 and run not in FUNCTIONS for run in runs)
        or re.fullmatch("[A-Za-z]{2,3}", flat)
        or (any(len(run) > 1 for run in runs) and (marked or re.search("[A-Z][A-Za-z]", flat)))
        or _RATIO.fullmatch(flat)
        or _DATE.fullmatch(flat)
    )
    if not is_text or set(runs) & FUNCTIONS:
        return _read(flat) if marked else None
    return Words(text, " ".join(re.sub("[.,'\"]", "", flat).casefold().split()))
