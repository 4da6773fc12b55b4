"""Measure what slow tools cost: conversations with a tool that sleeps, in processes of their own.

    python -m tests.benchmarks.slow_tools POLICY [--sleeps 0 0.05 0.5] [--conversations 32] [--turns 4] [--tokens 32]
        [--reply 4] [--prompt_tokens 24] [--times 5]

A call sleeps between 0 and each of `--sleeps` seconds, drawn by conversation and turn. Turns and replies are those of
`tests.benchmarks.conversations`. Besides the engine's rule of waiting, which generates the same batches whatever the
tools take, a rule is measured that lets every conversation go on as soon as its answer is there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from app.engines import Sampling
from app.engines.turns import TurnRequest
from app.environments import ToolCall, Tools
from app.environments.sessions import Sessions
from datamodules.types import Completion, Prompt
from tests.benchmarks.conversations import engine_of
from tests.support.scripted_conversations import EqualConversations

_ENVIRONMENT = '''
import time

class Slow:
    def reset(self, **row):
        pass

    def work(self, seconds: float) -> str:
        """Sleep.

        Args:
            seconds: how long.
        """
        time.sleep(seconds)
        return "done"
'''


class SlowConversations(EqualConversations):
    """Equal conversations, each answer of which waits for a process's tool.

    Args:
        sessions: the processes.
        prompts: `B` prompts.
        seeds: int64 `[B, G]`.
        options: turns, limit of a turn, longest reply.
        sleep: longest sleep of a call, in seconds.
        at_once: whether answers are taken as they come.

    Attributes:
        idle: seconds, added up over conversations, in which one could have gone on while the engine waited.
        slept: seconds that the calls of each conversation slept.
    """

    def __init__(
        self, sessions: Sessions, prompts: list[Prompt], seeds: np.ndarray, *options: int, sleep: float, at_once: bool
    ) -> None:
        super().__init__(prompts, seeds, *options)
        self.sessions, self.sleep, self.at_once = sessions, sleep, at_once
        self.idle, self.slept = 0.0, np.zeros(len(self.talks))
        self._open = set(range(len(self.talks)))
        self._waiting: set[int] = set()

    @property
    def outstanding(self) -> int:
        return len(self._waiting)

    def begin(self) -> list[TurnRequest]:
        for number in self._open:
            self.sessions.open(number, {"prompt": ""}, seed=number)
        self._waiting = set(self._open)
        return self.next()

    def ended(self, conversation: int, turn: Completion) -> None:
        super().ended(conversation, turn)
        self._waiting.add(conversation)
        if conversation in self._asked:
            draw = np.random.default_rng([conversation, len(self.talks[conversation].turns)])
            seconds = float(draw.uniform(0, self.sleep))
            self.slept[conversation] += seconds
            self.sessions.respond(conversation, "", [ToolCall("work", {"seconds": seconds})])
        else:
            self.sessions.finish(conversation)

    def next(self, wait: bool = True) -> list[TurnRequest]:
        found: list[TurnRequest] = []
        running, started, answered = len(self._open - self._waiting), time.perf_counter(), []
        while self._waiting:
            blocks = not self.at_once or not (running or found)
            events = self.sessions.events(None if blocks else 0.0)
            if not events and not blocks:
                break
            for event in events:
                assert event.kind != "failed", event.error
                answered.append(time.perf_counter())
                self._waiting.discard(event.key)
                if event.kind == "finished":
                    self._open.discard(event.key)
                elif event.kind == "opened":
                    found.append(self._request(event.key))
                else:
                    others, self._asked = self._asked - {event.key}, {event.key}
                    found += super().next()
                    self._asked = others
        end = time.perf_counter()
        self.waited += end - started
        self.idle += running * (end - started) + sum(end - at for at in answered)
        return sorted(found, key=lambda one: one.conversation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy")
    parser.add_argument("--sleeps", type=float, nargs="+", default=[0.0, 0.05, 0.5])
    counts = {"conversations": 32, "turns": 4, "tokens": 32, "reply": 4, "prompt_tokens": 24, "times": 5}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = engine_of(given.policy, vllm=False)
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(f"p{n}", n, "", "", tuple(draw.integers(5, 200, given.prompt_tokens).tolist()), {})
        for n in range(given.conversations)
    ]
    seeds = np.arange(given.conversations)[:, None]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "slow.py").write_text(_ENVIRONMENT)
        sessions = Sessions(Tools(f"{folder}/slow.py:Slow", max_sessions=given.conversations))
        try:
            for sleep in given.sleeps:
                for at_once in (False, True):
                    told = []
                    for _ in range(given.times + 1):
                        talks = SlowConversations(
                            sessions, prompts, seeds, given.turns, given.tokens, given.reply, sleep=sleep,
                            at_once=at_once,
                        )  # fmt: skip
                        start = time.perf_counter()
                        engine.converse(talks, Sampling(1, given.tokens))
                        told.append((time.perf_counter() - start, talks.waited, talks.idle / given.conversations))
                        assert all(len(talk.turns) == given.turns for talk in talks.talks)
                    total, waited, idle = np.median(told[1:], axis=0)
                    low, high = np.min(told[1:], axis=0)[0], np.max(told[1:], axis=0)[0]
                    rule = "as they come" if at_once else "the engine's"
                    print(
                        f"sleep 0 to {sleep:g} s, {rule}: {total:.2f} s ({low:.2f} to {high:.2f}), "
                        f"waited {waited:.2f}, a conversation idle {idle:.2f}, slept at most {talks.slept.max():.2f}"
                    )
        finally:
            sessions.close()
    engine.close()


if __name__ == "__main__":
    main()
