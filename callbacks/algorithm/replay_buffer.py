"""First-in, first-out buffer of rollout groups with one entry per prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from datamodules.group_codec import LogprobDtype, PackedGroup, join, pack, split, unpack
from datamodules.pool import PromptPool
from datamodules.selectors.sampling import gumbel, top_k
from datamodules.types import REWARD_TOLERANCE, RolloutGroup

Draw = Literal["uniform", "advantage", "drift"]


def draw_weight(rewards: np.ndarray) -> float:
    """Return the relative probability with which `draw: advantage` draws a group of these rewards `[G]`.

    This is the mean squared advantage before any division by a standard deviation, `mean_g (r_g - mean r)^2`, to which
    the expected squared gradient of a prompt is proportional (DOTS, arXiv 2506.05316, theorem 1). Fatemi (arXiv
    2601.02648) uses it as a replay priority in GRPO. Equal rewards have a weight of exactly 0.
    """
    if not len(rewards) or np.ptp(rewards) <= REWARD_TOLERANCE:
        return 0.0
    return float(np.var(rewards, dtype=np.float64))


@dataclass(slots=True)
class Past:
    """What has become of a stored group.

    Attributes:
        uses: how often it was drawn.
        drift: mean `|log pi - log mu|` of its tokens when it was last trained on, in nats; 0 at its birth.
        step: step of that measurement.
    """

    uses: int
    drift: float
    step: int


class ReplayBuffer:
    """Buffer of rollout replay (arXiv 2506.05316, algorithm 1): the newest `capacity` groups, the newest per prompt.

    A prompt's older entry goes before the buffer is cut to its capacity. The authors' code cuts first, and so may keep
    fewer and other groups.

    Args:
        capacity: number of groups kept, `C`.
        max_bytes: limit in bytes of their arrays; None for no limit. Prompts belong to the pool and do not count.
        max_age: age limit in steps since generation; None for no limit.
        max_uses: number of draws after which a group is removed; None for no limit.
        draw_by: "uniform"; "advantage": in proportion to `draw_weight`; "drift": in proportion to
            `exp(-drift / drift_scale)` of the drift expected now, see `expected_drift`.
        drift_scale: in nats per token.
        logprob_dtype: dtype of the stored behaviour log-probabilities; see `group_codec.pack` for the error of float16.

    Attributes:
        nbytes: number of bytes of all stored arrays.
        drift_rate: growth of the drift of replayed groups, in nats per step, as measured: a decaying mean.
    """

    def __init__(
        self,
        capacity: int,
        *,
        max_bytes: int | None = None,
        max_age: int | None = None,
        max_uses: int | None = None,
        draw_by: Draw = "uniform",
        drift_scale: float = 0.1,
        logprob_dtype: LogprobDtype = "float32",
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.max_uses = max_uses
        self.draw_by = draw_by
        self.drift_scale = drift_scale
        self.drift_rate = 0.0
        self.logprob_dtype = logprob_dtype
        self._entries: OrderedDict[str, PackedGroup] = OrderedDict()
        self._past: dict[str, Past] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def groups(self) -> list[RolloutGroup]:
        """The stored groups, oldest first."""
        return [unpack(entry) for entry in self._entries.values()]

    def insert(self, groups: Iterable[RolloutGroup]) -> list[RolloutGroup]:
        """Store groups one after the other, replacing entries of the same prompt and evicting the oldest entries.

        Returns:
            Groups that are not stored because each alone is larger than `max_bytes`.
        """
        refused = []
        for group in groups:
            self.discard([group.prompt.id])
            entry = pack(group, self.logprob_dtype)
            if self.max_bytes is not None and entry.nbytes > self.max_bytes:
                refused.append(group)
                continue
            self._add(entry)
            while len(self) > self.capacity or (self.max_bytes is not None and self.nbytes > self.max_bytes):
                self._remove(next(iter(self._entries)))
        return refused

    def discard(self, prompt_ids: Iterable[str]) -> int:
        """Remove the entries of these prompts and return their number."""
        found = set(prompt_ids) & self._entries.keys()
        for name in found:
            self._remove(name)
        return len(found)

    def expire(self, step: int) -> int:
        """Remove the entries that are older than `max_age` in this step and return their number."""
        if self.max_age is None:
            return 0
        return self.discard([name for name, entry in self._entries.items() if step - entry.birth_step > self.max_age])

    def expected_drift(self, name: str, step: int) -> float:
        """Return the drift of a prompt's entry that is expected in a step, in nats per token.

        That is the drift that its tokens had when they were last trained on, or 0 at its birth, plus `drift_rate` for
        every step since.
        """
        past = self._past[name]
        return past.drift + self.drift_rate * (step - past.step)

    def measured(self, drifts: Mapping[str, float], step: int) -> None:
        """Note the drift of replayed groups, by prompt, as their training in a step has measured it."""
        rates = []
        for name, drift in drifts.items():
            if (past := self._past.get(name)) is not None:
                rates.append((drift - past.drift) / max(1, step - past.step))
                past.drift, past.step = drift, step
        if rates:
            new = max(0.0, float(np.mean(rates)))
            self.drift_rate = new if self.drift_rate == 0 else 0.9 * self.drift_rate + 0.1 * new

    def used_up(self) -> int:
        """Remove the entries that were drawn `max_uses` times and return their number."""
        if self.max_uses is None:
            return 0
        return self.discard([name for name, past in self._past.items() if past.uses >= self.max_uses])

    def draw(
        self, n: int, generator: np.random.Generator, last: Collection[str] = (), step: int = 0
    ) -> list[RolloutGroup]:
        """Draw `min(n, len(self))` different groups, which stay in the buffer (see `used_up`).

        Groups of the prompts in `last` are drawn only when there are no others. With `draw_by` "advantage", each next
        group is drawn with a probability proportional to its weight among the remaining ones; groups of weight 0 are
        drawn when no others remain. `step` is the present one, to which drift is reckoned.
        """
        stored = list(self._entries.values())
        picked = self._pick([entry for entry in stored if entry.prompt.id not in last], n, generator, step)
        picked += self._pick([entry for entry in stored if entry.prompt.id in last], n - len(picked), generator, step)
        for entry in picked:
            self._past[entry.prompt.id].uses += 1
        return [unpack(entry) for entry in picked]

    def _pick(
        self, entries: Sequence[PackedGroup], n: int, generator: np.random.Generator, step: int
    ) -> list[PackedGroup]:
        size = min(n, len(entries))
        if size <= 0:
            return []
        if self.draw_by == "uniform":
            positions = generator.choice(len(entries), size=size, replace=False)
        elif self.draw_by == "drift":
            drifts = np.array([self.expected_drift(entry.prompt.id, step) for entry in entries])
            positions = top_k(gumbel(-drifts / self.drift_scale, generator), size, generator)
        else:
            weights = np.array([draw_weight(entry.rewards) for entry in entries])
            with np.errstate(divide="ignore"):
                positions = top_k(gumbel(np.log(weights), generator), size, generator)
        return [entries[position] for position in positions]

    def _add(self, entry: PackedGroup) -> None:
        self._entries[entry.prompt.id] = entry
        self._past[entry.prompt.id] = Past(0, 0.0, entry.birth_step)
        self.nbytes += entry.nbytes

    def _remove(self, name: str) -> None:
        self.nbytes -= self._entries.pop(name).nbytes
        del self._past[name]

    def state_dict(self) -> dict[str, Any]:
        past = [self._past[name] for name in self._entries]
        return join(list(self._entries.values())) | {
            "uses": [one.uses for one in past],
            "drifts": [[one.drift, one.step] for one in past],
            "drift_rate": self.drift_rate,
        }

    def load_state_dict(self, state: dict[str, Any], pool: PromptPool) -> None:
        """Restore all entries. Limits that are now lower take effect with the next insertion."""
        self._entries, self._past, self.nbytes = OrderedDict(), {}, 0
        entries = split(state, pool, self.logprob_dtype)
        for entry in entries:
            self._add(entry)
        if "uses" in state:  # a checkpoint of an older version has none
            for entry, uses, (drift, step) in zip(entries, state["uses"], state["drifts"], strict=True):
                self._past[entry.prompt.id] = Past(uses, drift, step)
            self.drift_rate = state["drift_rate"]
