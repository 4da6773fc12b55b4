"""Conversations whose other side is a function of the tokens so far, without processes."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from app.engines.turns import Conversations, TurnRequest
from datamodules.seeding import derive_seed
from datamodules.types import Completion, Prompt


@dataclass
class Talk:
    """A conversation: its prompt, and each turn with the tokens that were added after it."""

    prompt: Prompt
    seed: int
    turns: list[Completion] = field(default_factory=list)
    replies: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens after the prompt."""
        replies = [*self.replies, *[()] * (len(self.turns) - len(self.replies))]
        return tuple(
            token
            for turn, reply in zip(self.turns, replies, strict=True)
            for token in (*turn.token_ids.tolist(), *reply)
        )


class ScriptedConversations(Conversations):
    """Answers each turn by tokens that follow from its own, until a conversation has had its number of turns.

    Args:
        prompts: `B` prompts.
        seeds: int64 `[B, G]`.
        turns: of conversation n, `1 + n % turns`.
        limit: of a turn.
        longest_reply: tokens; replies are of all lengths up to it.
    """

    def __init__(
        self, prompts: list[Prompt], seeds: np.ndarray, turns: int = 4, limit: int = 8, longest_reply: int = 20
    ) -> None:
        self.talks = [Talk(one, int(seed)) for one, its in zip(prompts, seeds, strict=True) for seed in its]
        self.turns, self.limit, self.longest_reply = turns, limit, longest_reply
        self._asked: set[int] = set()
        self.waits = 0

    def __len__(self) -> int:
        return len(self.talks)

    @property
    def longest(self) -> int:
        return max(len(one.prompt.token_ids) for one in self.talks) + self.turns * (self.limit + self.longest_reply)

    def _request(self, number: int) -> TurnRequest:
        talk = self.talks[number]
        prompt = replace(talk.prompt, token_ids=(*talk.prompt.token_ids, *talk.tokens))
        seed = derive_seed("turn", talk.seed, len(talk.turns)) if talk.turns else talk.seed
        return TurnRequest(number, prompt, seed, self.limit - number % 3)

    def begin(self) -> list[TurnRequest]:
        return [self._request(number) for number in range(len(self.talks))]

    def ended(self, conversation: int, turn: Completion) -> None:
        talk = self.talks[conversation]
        talk.turns.append(turn)
        if len(talk.turns) <= conversation % self.turns:
            self._asked.add(conversation)

    @property
    def outstanding(self) -> int:
        return len(self._asked)

    def next(self, wait: bool = True) -> list[TurnRequest]:
        self.waits += wait
        asked, self._asked = sorted(self._asked), set()
        for number in asked:
            talk = self.talks[number]
            said = int(talk.turns[-1].token_ids.sum()) + number
            talk.replies.append(tuple(2 + (said + place) % 40 for place in range(1 + said % self.longest_reply)))
        return [self._request(number) for number in asked]


class EqualConversations(ScriptedConversations):
    """Conversations that all have the same number of turns and tokens."""

    def _request(self, number: int) -> TurnRequest:
        request = super()._request(number)
        return TurnRequest(number, request.prompt, request.seed, self.limit)

    def ended(self, conversation: int, turn: Completion) -> None:
        self.talks[conversation].turns.append(turn)
        if len(self.talks[conversation].turns) < self.turns:
            self._asked.add(conversation)


@torch.no_grad()
def gap_of_turns(model: torch.nn.Module, talks: ScriptedConversations, temperature: float = 1.0) -> float:
    """Return the largest difference between the turns' log-probabilities and those of a plain forward of the whole."""
    largest, device = 0.0, next(model.parameters()).device
    for talk in talks.talks:
        ids = torch.tensor([[*talk.prompt.token_ids, *talk.tokens]], device=device)
        logits = model(ids).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
        place = len(talk.prompt.token_ids) - 1
        for turn, reply in zip(talk.turns, [*talk.replies, ()], strict=True):
            expected = logprobs[place : place + len(turn.token_ids)].numpy()
            largest = max(largest, float(np.abs(turn.logprobs - expected).max()))
            place += len(turn.token_ids) + len(reply)
    return largest
