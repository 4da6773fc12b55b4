"""Numbers as people write them, in running text and LaTeX, as exact fractions."""
# ruff: noqa: RUF001 (the table of symbols names the look-alikes)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
"""Longer numbers are ignored: exact arithmetic on them would take seconds."""
RELATIVE_TOLERANCE = Fraction(1, 10**6)

# An ordinary space may also stand between two numbers. It groups thousands (`1 000 000`, `12 345`, `250 000`) where all
# groups are regular and the first is shorter than the others or the last is 000: `100 200` and `10 20 30` are lists.
_SPACED = r"(?<!\d )(?:[1-9]\d?(?: \d{3})+|[1-9]\d\d(?: \d{3})* 000)(?!\d)(?! \d+(?![\d/]))"
_UNSIGNED = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|{_SPACED}|\d+)"
_DECIMAL = rf"(?:{_UNSIGNED}(?:\.\d+)?|\.\d+)"
_POWER = r"\s?(?:\^|\*\*)\s?\{?\s?(?P<NAME>[-+]?\d+)\s?\}?"
_PART = rf"\{{\s*([-+]?{_DECIMAL})\s*\}}"
NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:"
    rf"(?P<whole>{_UNSIGNED})?\s*\\[dtc]?frac\s*(?:{_PART}|(\d))\s*(?:{_PART}|(\d))"
    rf"|(?P<mixed>{_UNSIGNED}) (?P<over>[1-9]\d*)/(?P<under>\d+)(?![\d/])"
    r"|(?P<head>\d*\.\d*)\\overline\s*\{(?P<cycle>\d+)\}"
    rf"|(?P<base>\d+){_POWER.replace('NAME', 'power')}"
    rf"|(?P<mantissa>{_DECIMAL})(?:[eE](?P<e>[-+]?\d+)(?!\w)"
    rf"|\s?(?:\\times|\\cdot|\*|x)\s?10{_POWER.replace('NAME', 'ten')}"
    r"|\s?/\s?(?P<denominator>\d+(?:\.\d+)?)(?![\d,/]))?"
    r")"
)
# A sign belongs to a number unless it subtracts from what precedes it; exponents (`m^2`), indices (`x_1`) and numbers
# in another base (`52_8`) are no numbers of their own.
_IN_TEXT = re.compile(
    rf"(?<![^\W_])(?<!\d\.)(?<![_^])(?<![_^]\{{)(?<![_^][-+])(?<![_^]\{{[-+])"
    rf"(?:(?<![\w)\]}}])|(?![-+])){NUMBER.pattern}(?!\d*_)"
)
_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty "}
    | {"°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "}
    | {"±": r"\pm ", "⁄": "/", "∕": "/", "’": "'", "\N{RUPEE SIGN}": "₹"}
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number.

    Attributes:
        value: exact value.
        place: value of one unit of the last decimal that was written; 0 for integers and fractions, which are exact.
    """

    value: Fraction
    place: Fraction

    def equals(self, given: Number) -> bool:
        """Return whether the two are one number up to the rounding of decimals: at most 1e-6 relative, 1 last place."""
        slack = min(RELATIVE_TOLERANCE * max(abs(self.value), abs(given.value)), max(self.place, given.place))
        return abs(self.value - given.value) <= slack


def plain_symbols(text: str) -> str:
    r"""Return a text with LaTeX or ASCII in place of Unicode's mathematical symbols, superscripts and fractions.

    Thousands grouped by a narrow or non-breaking space (`1\,000`, U+2009, U+202F, U+00A0) have commas in its place.
    """
    text = _THIN.sub(lambda grouped: re.sub(r"\D+", ",", grouped[0]), text)
    text = re.sub(r"(?<=\d)\\ (?=\d)", " ", text)
    if text.isascii():
        return text
    text = re.sub(r"√\s*(\w+)", r"\\sqrt{\1}", text)
    parts: list[str] = []
    for character in text.translate(_SYMBOLS).replace("√", r"\sqrt"):
        kind = (unicodedata.decomposition(character).split() or [""])[0]
        plain = unicodedata.normalize("NFKC", character) if kind in _COMPATIBLE else character
        if kind == "<super>":
            plain = f"^{{{plain}}}".replace("−", "-")
        elif kind == "<fraction>":
            plain = f" {plain}".replace("⁄", "/") if parts and parts[-1][-1:].isdigit() else plain.replace("⁄", "/")
        parts.append(plain)
    return "".join(parts).replace("}^{", "")


_THIN = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\\,|\\thinspace |[\u2007\u2009\u202f\u00a0])\d{3})+(?!\d)")
_COMPATIBLE = frozenset({"<super>", "<fraction>", "<noBreak>", "<compat>", "<wide>", "<narrow>", "<small>"})


def number_of(match: re.Match[str]) -> Number | None:
    """Return the number in a match of `NUMBER`; None if it has too many digits or divides by zero."""
    if len(match[0]) > MAX_DIGITS:
        return None
    place = Fraction(0)
    numerators, denominators = match.group(3, 4), match.group(5, 6)
    if any(numerators):
        parts = [next(filter(None, pair)).replace(",", "").replace(" ", "") for pair in (numerators, denominators)]
        top, bottom = map(Fraction, parts)
        if not bottom:
            return None
        value = _integer(match["whole"]) + top / bottom
    elif match["mixed"]:
        if not int(match["under"]):
            return None
        value = _integer(match["mixed"]) + Fraction(int(match["over"]), int(match["under"]))
    elif match["cycle"]:
        fixed, cycle = match["head"].partition(".")[2], match["cycle"]
        value = Fraction(match["head"] + "0") + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    elif match["base"]:
        base, power = int(match["base"]), int(match["power"])
        if abs(power) * len(match["base"]) > MAX_DIGITS or (power < 0 and not base):
            return None
        value = Fraction(base) ** power
    else:
        mantissa = match["mantissa"].replace(",", "").replace(" ", "")
        exponent = match["e"] or match["ten"] or "0"
        if len(exponent) > 5 or abs(int(exponent)) > MAX_DIGITS:
            return None
        value = Fraction(mantissa) * Fraction(10) ** int(exponent)
        _, dot, decimals = mantissa.partition(".")
        place = Fraction(10) ** (int(exponent) - len(decimals)) if dot else place
        if match["denominator"]:
            if not Fraction(match["denominator"]):
                return None
            value, place = value / Fraction(match["denominator"]), Fraction(0)
    return Number(-value if match["sign"] == "-" else value, place)


def _integer(text: str | None) -> Fraction:
    return Fraction((text or "0").replace(",", "").replace(" ", ""))


def spans(text: str) -> Iterator[re.Match[str]]:
    """Yield the places of the numbers in running text, with `plain_symbols`."""
    return _IN_TEXT.finditer(text)


_GROUPING = re.compile(r"(?<=\d)(?:,\\!|\{,\})(?=\d)")
"""LaTeX's ways to write the comma between thousands: `1,\\!000`, `1{,}000`."""


def find_numbers(text: str) -> list[Number]:
    r"""Return all numbers in running text: `-3`, `+2.50`, `1,234`, `3/4`, `1 1/2`, `\frac{3}{4}`, `1e-3`, `10^5`.

    `5-3` contains 5 and 3, `x=-3` contains -3. Numbers that are part of a word (`x2`), exponents, indices, fractions
    over zero and numbers of more than `MAX_DIGITS` digits are ignored.
    """
    grouped = _GROUPING.sub(",", plain_symbols(text))
    found = (number_of(match) for match in spans(grouped))
    return [number for number in found if number is not None]
