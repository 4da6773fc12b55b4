"""The text of an answer: without what LaTeX needs for looks alone, and split outside its brackets."""

from __future__ import annotations

import re

from app.rewards.numbers import plain_symbols

MAX_LENGTH = 400
MAX_DEPTH = 8
"""The parser's time grows by a factor with every pair of brackets."""
_TIDY = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\textdollar(?![A-Za-z])\s*", r"\\$"),
        (r"\\(?:pounds|textsterling)(?![A-Za-z])\s*", "£"),
        (r"\\(?:text)?euro(?![A-Za-z])\s*", "€"),
        (r"\\(?:mbox|hbox|mathrm|mathbf|mathit|mathsf|text[a-z]+|operatorname)\s*(?=\{)", r"\\text"),
        (r"\\text\s*\{\s*(\\\$|[€£¥₹])\s*\}", r"\1"),
        (r"(?<![A-Za-z])US(?:D ?)?(?=\\\$)", ""),
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
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = frozenset({"(", "[", "{", r"\{", r"\langle", r"\begin"})
_CLOSE = frozenset({")", "]", "}", r"\}", r"\rangle", r"\end"})


def tidy(text: str) -> str:
    """Return a text without what LaTeX needs for looks alone."""
    text = plain_symbols(text).strip().strip("*").strip()
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if dollars == 1:  # a currency sign, not one of a pair
        text = re.sub(r"(?<!\\)\$(?=\s*[-+.\d])", r"\\$", text)
    text = re.sub(r"(?<!\\)\$", " ", text).strip()
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    return text[1:-1].strip() if is_enclosed(text) and text[0] == "{" else text


def tight(text: str) -> str:
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text where a separator stands outside all brackets."""
    pieces, start, depth, place = [], 0, 0, 0
    while place < len(text):
        if depth == 0 and (found := separator.match(text, place)):
            pieces.append(text[start : found.start()])
            start = place = found.end()
            continue
        token = TOKEN.match(text, place)
        assert token is not None, "every character is a token"
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        place = token.end()
    return [*pieces, text[start:]]


def _depths(text: str) -> list[int]:
    """Return the number of open brackets after every token."""
    depth, depths = 0, []
    for token in TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        depths.append(depth)
    return depths


def is_bounded(text: str) -> bool:
    """Return whether the nesting of a text's brackets is safe for the parser."""
    return max(_depths(text), default=0) <= MAX_DEPTH


def is_enclosed(text: str) -> bool:
    """Return whether the first bracket of a text, at its start, closes at its end."""
    depths = _depths(text)
    return len(depths) > 1 and depths[0] == 1 and depths[-1] == 0 and 0 not in depths[:-1]
