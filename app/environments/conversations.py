"""Conversations between the policy and an environment: which tokens follow which."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from app.engines.ahead import Groups
from app.engines.base import Completed, RolloutEngine, Sampling, check_request, end_token_ids, pilots_first
from app.engines.turns import Conversations, TurnRequest
from app.environments.options import EnvironmentOptions
from app.environments.protocols import Protocol
from app.environments.sessions import Event, Sessions
from datamodules.errors import UserError
from datamodules.seeding import derive_seed
from datamodules.types import Completion, FinishReason, Messages, Outcome, Prompt, Turn


@dataclass
class _Conversation:
    """A conversation so far.

    Attributes:
        prompt: as the data has it.
        seed: of the completion.
        context: tokens that the policy reads first: the prompt's, with what the environment has added to it.
        asked: whether the environment has yet to answer.
    """

    prompt: Prompt
    seed: int
    context: tuple[int, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    version: int = 0
    reason: FinishReason = "stop"
    asked: bool = False
    calls: int = 0
    failed_calls: int = 0
    outcome: Outcome | None = None

    def add(self, generated: bool, tokens: Sequence[int], logprobs: Sequence[float], messages: Messages) -> None:
        self.token_ids += tokens
        self.logprobs += logprobs
        self.turns.append(Turn(generated, len(tokens), messages))

    @property
    def generated_turns(self) -> int:
        return sum(turn.generated for turn in self.turns)


class EnvironmentRollouts:
    """Rolls out prompts in an environment, with the interface of an engine's `generate`.

    A completion is a conversation: the policy's turns and the environment's replies, token for token as the policy
    generated and read them. Its seed decides all of its turns. What an environment draws at random is the same in all
    conversations of a prompt, so that they are about the same task.

    Args:
        engine: generates the turns; already set up.
        options: the environment.
        protocol: how tool calls and replies are written.
        tokenizer: the policy's.
        sessions: the environment's processes; started with the first conversation.
        context_length: maximum number of tokens of a prompt and its conversation; None if it is not known.

    Attributes:
        waited: seconds so far in which nothing was generated because the environment had yet to answer.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        options: EnvironmentOptions,
        protocol: Protocol,
        tokenizer: PreTrainedTokenizerBase,
        sessions: Sessions,
        context_length: Callable[[], int | None],
    ) -> None:
        self.engine, self.options, self.protocol = engine, options, protocol
        self.tokenizer, self.sessions, self.context_length = tokenizer, sessions, context_length
        self.waited = 0.0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> Groups:
        """Return `G` conversations of each prompt, in order; see `RolloutEngine.generate`.

        `sampling.max_completion_length` limits a conversation, the environment's tokens included.
        """
        limit = self.context_length()
        check_request(prompts, sampling, seeds, limit, f"the context of {limit} tokens")
        turn = replace(sampling, num_generations=1, stop=[*sampling.stop, *self.protocol.stop])
        ends = frozenset(end_token_ids(self.engine.model, self.tokenizer).tolist())
        if self.protocol.end_ids and not self.protocol.end_ids & ends:
            names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(self.protocol.end_ids))))
            raise UserError(
                f"The chat template ends a turn by {names}, but the policy's generation config and tokenizer name "
                "other end tokens, so that no turn would end. Add it to eos_token_id of its generation_config.json."
            )
        conversations = PolicyConversations(self, prompts, sampling, seeds, ends)
        try:
            self.engine.converse(conversations, turn)
        except BaseException:
            self.sessions.close()  # the next conversation starts them again
            raise
        self.waited += conversations.waited
        size = sampling.num_generations
        completions = conversations.completions()
        return [tuple(completions[first : first + size]) for first in range(0, len(completions), size)]

    def generate_with_pilots(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, pilot: int, completed: Completed
    ) -> Groups:
        """See `RolloutEngine.generate_with_pilots`."""
        return pilots_first(self.generate, prompts, sampling, seeds, pilot, completed)


class PolicyConversations(Conversations):
    """The conversations of one call of `EnvironmentRollouts.generate`.

    Args:
        rollouts: environment, protocol and tokenizer.
        prompts: `B` prompts.
        sampling: `G` and the limit of tokens.
        seeds: int64 `[B, G]`.
        ends: tokens that end a turn.
    """

    def __init__(
        self,
        rollouts: EnvironmentRollouts,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: np.ndarray,
        ends: frozenset[int],
    ) -> None:
        self.options, self.protocol, self.tokenizer = rollouts.options, rollouts.protocol, rollouts.tokenizer
        self.sessions, self.ends, self.limit = rollouts.sessions, ends, sampling.max_completion_length
        self.all = [
            _Conversation(prompt, int(seed)) for prompt, its in zip(prompts, seeds, strict=True) for seed in its
        ]
        self.room = rollouts.context_length()
        self._begun = self._ended = 0

    def __len__(self) -> int:
        return len(self.all)

    @property
    def longest(self) -> int:
        return max((len(one.context or one.prompt.token_ids) for one in self.all), default=1) + self.limit

    @property
    def outstanding(self) -> int:
        return sum(one.asked for one in self.all)

    def begin(self) -> list[TurnRequest]:
        self._open_more()
        return self.next()

    def ended(self, conversation: int, turn: Completion) -> None:
        one, ids = self.all[conversation], turn.token_ids.tolist()
        closed = turn.finish_reason == "stop" and ids[-1] in self.ends
        written = self.tokenizer.decode(ids[: len(ids) - closed])
        assert isinstance(written, str)
        text, calls, malformed = self.protocol.parse(written)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in calls
            ]
        one.version = turn.policy_version if not one.turns else min(one.version, turn.policy_version)
        one.add(True, ids, turn.logprobs.tolist(), [message])
        one.reason, one.asked = turn.finish_reason, True
        if turn.finish_reason == "length":  # in the middle of what it was about to say
            self.sessions.finish(conversation)
        else:
            self.sessions.respond(conversation, text, calls, malformed)

    def next(self, wait: bool = True) -> list[TurnRequest]:
        found: dict[int, TurnRequest] = {}
        while self.outstanding:
            started = time.perf_counter()
            events = self.sessions.events(None if wait else 0.0)
            self.waited += time.perf_counter() - started if wait else 0.0
            for event in events:
                if (request := self._heard(event)) is not None:
                    found[event.key] = request
            if not wait and not events:
                break
        return [found[number] for number in sorted(found)]

    def _open_more(self) -> None:
        """Begin as many conversations as the environment has processes for."""
        until = min(len(self.all), self._ended + self.options.max_sessions)
        for number in range(self._begun, until):
            one = self.all[number]
            one.asked = True
            columns = {**one.prompt.columns, "prompt": one.prompt.prompt}
            self.sessions.open(number, columns, derive_seed("environment", one.prompt.id))
        self._begun = max(self._begun, until)

    def _heard(self, event: Event) -> TurnRequest | None:
        """Take what the environment says, and return the turn that follows, if any."""
        one = self.all[event.key]
        one.asked = False
        if event.kind in ("finished", "failed"):
            one.outcome = event.outcome
            self._ended += 1
            self._open_more()
            return None
        if event.kind == "opened":
            one.context = one.prompt.token_ids
            if event.observation:
                one.context = self._extended(one.prompt, event.observation)
        else:
            assert event.reply is not None
            messages = event.reply.messages
            reply: list[int] = []
            if messages and not event.reply.done:
                last_is_end = one.token_ids[-1] in self.protocol.end_ids
                reply = self.protocol.reply_ids(messages, last_is_end)
            over = not messages or event.reply.done
            full = len(one.token_ids) + len(reply) >= self.limit
            if over or full or one.generated_turns >= self.options.max_turns:
                # What the policy will not read does not become part of the conversation.
                one.reason = "stop" if over else "length"
                one.asked = True
                self.sessions.finish(event.key)
                return None
            one.add(False, reply, [math.nan] * len(reply), messages)
        seed, turn = one.seed, one.generated_turns
        return TurnRequest(
            event.key,
            replace(one.prompt, token_ids=(*one.context, *one.token_ids)),
            derive_seed("turn", seed, turn) if turn else seed,
            self.limit - len(one.token_ids),
        )

    def _extended(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Return the tokens of a prompt with what `reset` has added to its last user message."""
        if prompt.extended is None:
            raise UserError(
                f"The environment's reset returned text for prompt {prompt.id!r}, which is added to the user's last "
                "message, but the prompt ends with another one. Let the data end with the user's, or reset return None."
            )
        context = prompt.extended(text)
        if self.room is not None and len(context) + self.limit > self.room:
            raise UserError(
                f"Prompt {prompt.id!r} has {len(context)} tokens with what the environment's reset added, and "
                f"sampling.max_completion_length is {self.limit}, which together exceed the context of {self.room} "
                "tokens. Lower sampling.max_completion_length, or let reset return less."
            )
        return context

    def completions(self) -> list[Completion]:
        """Return all conversations, which have ended, in order."""
        assert not self.outstanding
        return [self._completion(one) for one in self.all]

    def _completion(self, one: _Conversation) -> Completion:
        text = self.tokenizer.decode(one.token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return Completion(
            token_ids=np.array(one.token_ids, dtype=np.int32),
            logprobs=np.array(one.logprobs, dtype=np.float32),
            finish_reason=one.reason,
            policy_version=one.version,
            text=text,
            turns=tuple(one.turns),
            context=None if one.context in ((), one.prompt.token_ids) else np.array(one.context, dtype=np.int32),
            outcome=one.outcome,
        )
