"""The two endpoints of a vLLM server that complete token ids, and which of them a request is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.engines.requests import Answer
from datamodules.errors import UserError

EndpointChoice = Literal["auto", "tokens", "completions"]

_FLOOR = -9999.0
"""What vLLM sends for a log-probability of minus infinity, and the endpoint for token ids for NaN too.

No sampled token has one as low: float32 holds no probability below exp(-104).
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path, and the form of its requests and answers.

    Attributes:
        path: of the requests, which are posted.
        body: given a prompt's token ids and the settings of a sample, returns what is sent as JSON.
        logprobs: given one choice of an answer, returns its log-probabilities as they were sent.
    """

    path: str
    body: Callable[[Sequence[int], Mapping[str, object]], dict[str, object]]
    logprobs: Callable[[Any], list[Any]]

    def read(self, answer: Any) -> Answer:
        """Return the one sample of an answer.

        Raises:
            KeyError, IndexError, TypeError, ValueError, OverflowError: the answer has another form.
        """
        (choice,) = answer["choices"]
        sent = self.logprobs(choice)
        logprobs = [math.nan if one is None or one <= _FLOOR else float(one) for one in sent]
        if not all(type(one) is int for one in choice["token_ids"]):
            raise TypeError("token_ids holds more than whole numbers")
        return Answer(list(choice["token_ids"]), logprobs, str(choice["finish_reason"]))


COMPLETIONS = Endpoint(
    "/v1/completions",
    lambda token_ids, settings: {"prompt": list(token_ids), **settings, "return_token_ids": True},
    lambda choice: choice["logprobs"]["token_logprobs"],
)
"""Every server has it. The server decodes every token and writes three lists per token besides those that are read."""

TOKENS = Endpoint(
    "/inference/v1/generate",
    lambda token_ids, settings: {
        "token_ids": list(token_ids),
        "sampling_params": {**settings, "detokenize": bool(settings["stop"])},
    },
    lambda choice: [one["logprob"] for one in choice["logprobs"]["content"]],
)
"""Servers have it with `--enable-scale-out`. Text is made only to find stop strings."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where completions are requested.

    Attributes:
        without_stop: those without stop strings.
        with_stop: those with stop strings, for which a server makes text at either endpoint.
    """

    without_stop: Endpoint
    with_stop: Endpoint


def choose_endpoints(asked: EndpointChoice, lacking: Sequence[str]) -> Endpoints:
    """Return the cheapest endpoints that servers have, or those that the user asks for.

    Args:
        asked: the user's choice.
        lacking: URLs of the servers that do not offer TOKENS.

    Raises:
        UserError: a server does not offer what was asked for.
    """
    if asked == "completions":
        return Endpoints(COMPLETIONS, COMPLETIONS)
    if asked == "tokens":
        if lacking:
            raise UserError(
                f"engine.endpoint is tokens, but {lacking[0]} does not list {TOKENS.path} in its /openapi.json. "
                "Start it with --enable-scale-out, as dots serve does, or set engine.endpoint to auto."
            )
        return Endpoints(TOKENS, TOKENS)
    return Endpoints(COMPLETIONS if lacking else TOKENS, COMPLETIONS)
