"""Scores from an HTTP endpoint: a reward model or a function that runs on a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

from app.rewards.answers import GOLD_COLUMNS, plain, require_column, value_at, whole_text
from app.rewards.base import Column, ScoreError, Texts, TokenIds
from app.rewards.endpoint import SHOWN, EndpointError, EndpointReward
from datamodules.errors import UserError

_OWN = ("query", "prompts", "completions", "labels")
"""Keys of a request besides those of the data's columns."""


class Remote(EndpointReward):
    """The scores that a server returns, asked as OpenRLHF asks its remote rewards (`--reward.remote_url`).

    It posts `{"query": [...], "prompts": [...], "completions": [...], "labels": [...]}` with one text per completion:
    prompt and completion together, each alone, and the reference answer. It reads `{"rewards": [...]}`, a number per
    completion, or null where the reward does not apply. Numbers in `extra_logs` are logged. Conversations arrive as
    text, with paragraphs `User: ...` and `Assistant: ...`. What the server cannot score has failed; a run whose first
    request gets no such answer does not start.

    Args:
        url: the endpoint, or several of them, asked in turn.
        batch_size: completions of a request. Where a server refuses one, they are asked for one by one.
        labels: column sent as `labels`; by default the first of the usual ones for reference answers that has a value.
        columns: further columns, sent under their own names.
        key: key of the answer that holds the scores: `rewards`, or `scores` for what OpenRLHF filters by.
        end: text after each `query`, e.g. the end token that a reward model reads its score from.
        api_key_env: name of the environment variable that holds the key, sent as `Authorization: Bearer KEY`.
        concurrency: requests in flight at once, of all workers of a rank together.
        retries: further tries where the server cannot be reached or is overloaded, with growing pauses between them.
        time_limit_s: seconds for a request, its retries included. `reward_workers.time_limit_s` must be at least 2
            seconds longer.
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
    """

    def __init__(
        self,
        url: str | list[str],
        batch_size: int = 16,
        labels: str | None = None,
        columns: list[str] | None = None,
        key: str = "rewards",
        end: str = "",
        api_key_env: str | None = None,
        concurrency: int = 16,
        retries: int = 4,
        time_limit_s: float = 8.0,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
    ) -> None:
        urls = [url] if isinstance(url, str) else url
        super().__init__(weight, correctness, name, urls, api_key_env, concurrency, retries, time_limit_s)
        if batch_size < 1:
            raise UserError(f"batch_size of app.rewards.Remote is {batch_size}, but must be at least 1. Change it.")
        if taken := sorted({*_OWN} & {*(columns or ())}):
            raise UserError(
                f"columns of app.rewards.Remote holds {taken[0]!r}, which is a key of every request. Rename the column."
            )
        self.batch_size, self.labels, self.columns = batch_size, labels, list(columns or ())
        self.key, self.end = key, end

    def __call__(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column
    ) -> Iterator[float | ScoreError | None]:
        if self.labels and completions:
            require_column(self.labels, columns, "labels of app.rewards.Remote")
        for name in self.columns if completions else ():
            require_column(name, columns, "columns of app.rewards.Remote")
        log_metric = columns.get("log_metric")
        starts = range(0, len(completions), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(completions))) for start in starts]
        bodies = [self._body([(prompts[row], completions[row]) for row in rows], rows, columns) for rows in batches]
        with closing(self.answers(bodies)) as answers:
            for rows, answer in zip(batches, answers, strict=True):
                try:
                    if isinstance(answer, EndpointError):
                        raise answer
                    scores = _scores(answer, self.key, len(rows))
                except EndpointError as error:
                    if error.content and len(rows) > 1:
                        raise  # the workers ask again for one completion after the other
                    scores = [error] * len(rows)
                else:
                    if callable(log_metric):
                        for name, values in _numbers(answer.get("extra_logs"), len(rows)).items():
                            for value in values:
                                log_metric(name, value)
                yield from scores

    def _body(self, texts: list[tuple[Any, Any]], rows: range, columns: Mapping[str, Column]) -> dict[str, object]:
        return {
            "query": [_query(prompt, completion) + self.end for prompt, completion in texts],
            "prompts": [whole_text(prompt) for prompt, _ in texts],
            "completions": [whole_text(completion) for _, completion in texts],
            "labels": [self._label(columns, row) for row in rows],
            **{name: [plain(value_at(columns, name, row)) for row in rows] for name in self.columns},
        }

    def _label(self, columns: Mapping[str, Column], row: int) -> object:
        """Return the reference answer of a row; "" for none, as OpenRLHF sends it."""
        names = [self.labels] if self.labels else [name for name in GOLD_COLUMNS if name.split(".")[0] in columns]
        return next((plain(value) for name in names if (value := value_at(columns, name, row)) is not None), "")


def _query(prompt: Any, completion: Any) -> str:
    if isinstance(prompt, str):
        return prompt + whole_text(completion)
    return whole_text([*prompt, *completion])


def _scores(answer: Any, key: str, count: int) -> list[float | ScoreError | None]:
    """Return the scores of an answer. Raises EndpointError if it has no list of `count`."""
    given = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(given, list):
        raise EndpointError(
            f'the answer is {str(answer)[:SHOWN]}, but expected {{"{key}": [...]}} with a number per completion',
            content=True,
        )
    if len(given) != count:
        raise EndpointError(f"the answer has {len(given)} {key} for {count} completions", content=True)
    return [
        score
        if score is None or isinstance(score, int | float)
        else ScoreError(f"{key} holds {str(score)[:SHOWN]!r}, but expected numbers", refused=True)
        for score in given
    ]


def _numbers(logs: Any, count: int) -> dict[str, list[float]]:
    """Return the metrics among what a server logs, which are numbers or lists of one per completion."""
    logs = logs if isinstance(logs, dict) else {}
    lists = {name: value if isinstance(value, list) else [value] * count for name, value in logs.items()}
    return {name: each for name, each in lists.items() if all(isinstance(one, int | float) for one in each)}
