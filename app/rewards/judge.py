"""Scores by a language model that reads each completion with a rubric."""

from __future__ import annotations

import hashlib
import json
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

from app.rewards.answers import compiled, gold_answers, plain, require_column, value_at, whole_text
from app.rewards.base import Column, ScoreError, Texts, TokenIds
from app.rewards.endpoint import SHOWN, EndpointError, EndpointReward
from app.rewards.replies import ReplyCache
from datamodules.errors import UserError
from datamodules.fields import fields_of, filled

SCORE = r"""(?i)\bscore\b[\s:=*"']*(-?\d+(?:\.\d+)?)"""
"""What a reply says after the word score: `Score: 7`, `**Score:** 7`, `"score": 7`."""


class Judge(EndpointReward):
    """The score in [0, 1] that a language model gives by a rubric, asked over OpenAI's chat API (vLLM has it, too).

    The rubric is sent as the message of a user, at temperature 0, and the score is read from the end of the reply.
    Replies with a score are kept by the content of their request, and asked for once. A completion whose reply has no
    score, or none within `scale`, has failed; a run whose judge cannot be asked does not start. The metric `cached` is
    the fraction of replies that were known, and the column `<name>_reply` of the completions has their texts.

    Args:
        url: address of the API, e.g. `http://127.0.0.1:8000/v1`, or several of them, asked in turn.
        model: name of the judge at that address.
        rubric: format string with `{completion}` and, if it wants them, `{question}`, `{prompt}` (what the policy
            read), `{answer}` (the reference answer) and columns of the data. Write literal braces as `{{` and `}}`.
        pattern: regular expression with one group; that of its last match is the score.
        json_key: key of the score where the rubric asks for a JSON object, in place of `pattern`.
        scale: the scores that become 0 and 1.
        max_tokens: length limit of a reply.
        body: further fields of the request, e.g. `{seed: 0}`; null leaves one out, e.g. `{temperature: null}`.
        cache: JSONL file that keeps replies, shared by workers and runs. Delete it when another model gets the name.
        cache_entries: replies that each worker keeps in memory.
        api_key_env: name of the environment variable that holds the key, sent as `Authorization: Bearer KEY`.
        concurrency: requests in flight at once, of all workers of a rank together.
        retries: further tries where the server cannot be reached or is overloaded, with growing pauses between them.
        time_limit_s: seconds for a reply, retries included. `reward_workers.time_limit_s` must be at least 2 seconds
            longer.
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
    """

    def __init__(
        self,
        url: str | list[str],
        model: str,
        rubric: str,
        pattern: str = SCORE,
        json_key: str | None = None,
        scale: tuple[float, float] = (0.0, 10.0),
        max_tokens: int = 512,
        body: dict[str, Any] | None = None,
        cache: str | None = None,
        cache_entries: int = 10_000,
        api_key_env: str | None = None,
        concurrency: int = 32,
        retries: int = 4,
        time_limit_s: float = 8.0,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
    ) -> None:
        urls = [_chat_url(one) for one in ([url] if isinstance(url, str) else url)]
        super().__init__(weight, correctness, name, urls, api_key_env, concurrency, retries, time_limit_s)
        try:
            self._fields = sorted(fields_of(rubric))
            filled(rubric, dict.fromkeys(self._fields, ""))
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"rubric of app.rewards.Judge is not a format string ({error}). Write literal braces as {{{{ and }}}}."
            ) from error
        if "completion" not in self._fields:
            raise UserError(
                f"rubric of app.rewards.Judge has the fields {self._fields}, but not {{completion}}, which the judge "
                "reads. Put it in."
            )
        self.rubric, self.pattern, self.json_key = rubric, compiled(pattern), json_key
        if json_key is None and self.pattern.groups != 1:
            raise UserError(
                f"pattern={pattern!r} of app.rewards.Judge has {self.pattern.groups} groups, but expected one, the "
                "score. Write others as (?:...)."
            )
        low, high = scale
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"scale of app.rewards.Judge is {[low, high]}, expected two rising numbers. Change it.")
        if cache_entries < 1:
            raise UserError(f"cache_entries of app.rewards.Judge is {cache_entries}, but must be at least 1. Raise it.")
        self.scale = (low, high)
        fields = {"model": model, "temperature": 0.0, "max_tokens": max_tokens, **(body or {})}
        self._request = {field: value for field, value in fields.items() if value is not None}
        self.cache, self.cache_entries = cache, cache_entries

    def load(self) -> None:
        super().load()
        self._cache = ReplyCache(self.cache, self.cache_entries)

    def __call__(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column
    ) -> Iterator[float | ScoreError | None]:
        texts = self._texts(prompts, completions, columns)
        bodies = [{**self._request, "messages": [{"role": "user", "content": text}]} for text in texts]
        digests = [hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() for body in bodies]
        self._cache.refresh()
        replies: dict[str, str | ScoreError] = {}
        for digest in digests:
            if (known := self._cache.get(digest)) is not None:
                replies[digest] = known
        cached = [digest in replies for digest in digests]
        missing = {digest: body for digest, body in zip(digests, bodies, strict=True) if digest not in replies}
        with closing(self.answers(list(missing.values()))) as answers:
            for digest in digests:
                asked = digest not in replies
                reply = replies[digest] if not asked else _content(next(answers))
                score = self._score(reply) if isinstance(reply, str) else reply
                if asked and isinstance(reply, str) and isinstance(score, float):
                    self._cache.add(digest, reply)
                replies[digest] = reply
                yield score
        if callable(log_metric := columns.get("log_metric")):
            for one in cached:
                log_metric("cached", float(one))
        if callable(log_extra := columns.get("log_extra")):
            log_extra(
                f"{self.name}_reply", [reply if isinstance(reply := replies[one], str) else None for one in digests]
            )

    def _texts(self, prompts: Texts, completions: Texts, columns: Mapping[str, Column]) -> list[str]:
        """Return what the judge reads of each completion."""
        values: dict[str, list[str]] = {
            "prompt": [whole_text(prompt) for prompt in prompts],
            "completion": [whole_text(completion) for completion in completions],
        }
        for field in self._fields:
            if field == "answer":
                values[field] = [" or ".join(gold) for gold in gold_answers(columns, len(completions), None)]
            elif field == "question" and field not in columns:
                values[field] = values["prompt"]
            elif field not in values and completions:
                require_column(field, columns, "rubric of app.rewards.Judge")
                values[field] = [_written(value_at(columns, field, row)) for row in range(len(completions))]
        return [
            filled(self.rubric, {name: its[row] for name, its in values.items()}) for row in range(len(completions))
        ]

    def _score(self, reply: str) -> float | ScoreError:
        """Return the score that a reply gives."""
        text = reply.rpartition("</think>")[2]
        value = _in_json(text, self.json_key) if self.json_key is not None else _last(self.pattern, text)
        try:
            number = float(value)  # type: ignore[arg-type]  # whatever else it is, it is no score
        except (TypeError, ValueError):
            number = math.nan
        low, high = self.scale
        if not low <= number <= high:
            wanted = (
                f"a number under {self.json_key!r}" if self.json_key is not None else f"one by {self.pattern.pattern}"
            )
            found = (
                "no score" if math.isnan(number) else f"the score {number:g}, which is not within {low:g} to {high:g}"
            )
            return ScoreError(f"the judge's reply has {found} (expected {wanted}): {text.strip()[-SHOWN:]!r}")
        return (number - low) / (high - low)


def _chat_url(url: str) -> str:
    """Return the address of chat completions, of which the API's may have been given."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/") or "/v1"
    return parts._replace(path=path if path.endswith("/chat/completions") else f"{path}/chat/completions").geturl()


def _content(answer: Any) -> str | EndpointError:
    """Return the text of a chat completion."""
    if isinstance(answer, EndpointError):
        return answer
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return EndpointError(f"the answer is not a chat completion: {str(answer)[:SHOWN]}")
    return content if isinstance(content, str) else ""


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    return matches[-1].group(1) if matches else None


def _in_json(text: str, key: str) -> object:
    """Return the value of a key in the JSON object that a text holds; None without one."""
    try:
        found = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except ValueError:
        return None
    return found.get(key) if isinstance(found, dict) else None


def _written(value: object) -> str:
    """Return a value of a column as text: lists and objects as JSON."""
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    return json.dumps(plain(value), ensure_ascii=False, default=str)
