"""The markup of tool calls in what a policy writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app.environments.base import ToolCall

Parsed = tuple[str, list[ToolCall], list[str]]
"""A turn's text without its calls, the calls, and what is wrong with each further one that cannot be read."""

_HERMES = "<tool_call>", "</tool_call>"
_PYTHON = {"True": True, "False": False, "None": None}
"""Values in XML, which chat templates write as Python does."""


def parse_plain(text: str, start: str, end: str, tool: str, argument: str) -> Parsed:
    """Find calls of one tool, whose only argument stands between two strings."""
    plain, bodies, malformed = _between(text, start, end)
    return plain, [ToolCall(tool, {argument: body.strip()}) for body in bodies], malformed


def parse_hermes(text: str, texts: Mapping[str, set[str]]) -> Parsed:
    """Find calls in `<tool_call>`: JSON as Qwen 2.5, Qwen 3 and Hermes write it, or XML as Qwen3-Coder does.

    Args:
        text: what the policy wrote.
        texts: arguments that are text, by tool; XML does not tell text from other values.
    """
    plain, bodies, malformed = _between(text, *_HERMES)
    calls = []
    for body in bodies:
        try:
            xml = body.strip().startswith("<function=")
            calls.append(_of_xml(body.strip(), texts) if xml else _of_json(json.loads(body)))
        except (ValueError, RecursionError) as error:
            malformed.append(f"The tool call cannot be read: {_line(error)}")
    return plain, calls, malformed


def parse_llama(text: str) -> Parsed:
    """Find calls as Llama 3.1 and 3.2 write them: a turn that starts with JSON that has a name and parameters."""
    left = text.strip()
    tagged = left.startswith("<|python_tag|>")
    left = left.removeprefix("<|python_tag|>").lstrip()
    decoder, calls = json.JSONDecoder(), []
    while left.startswith("{"):
        try:
            value, end = decoder.raw_decode(left)
            calls.append(_of_json(value))
        except (ValueError, RecursionError) as error:
            if tagged or '"parameters"' in left:
                return "", calls, [f"The tool call cannot be read: {_line(error)}"]
            break
        left = left[end:].lstrip("; \n")
    if tagged and not calls:
        return "", [], ["The tool call cannot be read: it is not JSON"]
    return left if calls else text, calls, []


def _between(text: str, start: str, end: str) -> tuple[str, list[str], list[str]]:
    """Return the text outside of pairs of strings, what is within each, and what is wrong with others."""
    first, *parts = text.split(start)
    outside, inside, malformed = [first], [], []
    for part in parts:
        body, closed, rest = part.partition(end)
        if closed:
            inside.append(body)
            outside.append(rest)
        else:
            malformed.append(f"The tool call is not closed by {end}")
    return "".join(outside).strip(), inside, malformed


def _of_json(value: Any) -> ToolCall:
    """Return a call that is given as JSON. Raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("it is not a JSON object with a name and arguments")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are not a JSON object")
    return ToolCall(value["name"], arguments)


def _of_xml(body: str, texts: Mapping[str, set[str]]) -> ToolCall:
    """Return a call of the form `<function=name><parameter=key>value</parameter></function>`. Raises ValueError."""
    name, closed, rest = body.removeprefix("<function=").partition(">")
    inner, ended, after = rest.partition("</function>")
    *parameters, tail = inner.split("</parameter>")
    if not closed or not ended or after.strip() or tail.strip():
        raise ValueError("it is not <function=...> with each <parameter=...> closed")
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        key, closed, value = parameter.lstrip().removeprefix("<parameter=").partition(">")
        if not closed or not parameter.lstrip().startswith("<parameter="):
            raise ValueError("it has something else than <parameter=...> in <function=...>")
        value = value.removeprefix("\n").removesuffix("\n")
        arguments[key] = value if key in texts.get(name, ()) else _value(value)
    return ToolCall(name, arguments)


def _value(text: str) -> Any:
    try:
        return _PYTHON[text] if text in _PYTHON else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
