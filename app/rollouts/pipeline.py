"""From prompts to scored groups: generate, score, account."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np

from app.engines import RolloutEngine, Sampling
from app.engines.ahead import Ahead, Groups
from app.environments.conversations import EnvironmentRollouts
from app.ranks import Ranks, deal
from app.rewards import RewardScorer, TrainerState
from app.rollouts.exchange import Rolled, exchange
from app.rollouts.in_flight import InFlight, SegmentRequest
from datamodules.errors import UserError
from datamodules.ledger import Ledger
from datamodules.seeding import sample_seeds
from datamodules.types import Completion, Prompt, RolloutGroup, Source


@dataclass(frozen=True, slots=True, eq=False)
class RolloutRequest:
    """Prompts that are rolled out for one purpose.

    Attributes:
        purpose: separates the random numbers and the counts of training, reference and validation rollouts.
        source: set on the groups.
        sizes: number of completions of each prompt; None is `num_generations` of the sampling for all.
        begun: completions that its group already has, to which these are added.
        step: the step that the completions are for, which seeds them; None is the one in progress.
    """

    prompts: Sequence[Prompt]
    purpose: str
    source: Source = "fresh"
    sizes: Sequence[int] | None = None
    begun: int = 0
    step: int | None = None

    def seeds(self, run_seed: int, prompt: Prompt, size: int, step: int) -> np.ndarray:
        """Return the seeds of `size` completions of a prompt, int64 `[size]`."""
        its = step if self.step is None else self.step
        return sample_seeds(run_seed, self.purpose, its, [prompt.id], self.begun + size)[0, self.begun :]

    def sizes_by(self, sampling: Sampling) -> Sequence[int]:
        """Return the number of completions of each prompt."""
        return [sampling.num_generations] * len(self.prompts) if self.sizes is None else self.sizes


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Segments of completions in progress, as returned by `RolloutPipeline.start`.

    Attributes:
        flights: the prompts.
        shares: positions of the prompts that each rank generates for.
        requests: this rank's requests to the engine, with the positions of their prompts.
        ahead: the generation.
    """

    flights: list[InFlight]
    shares: list[list[int]]
    requests: list[tuple[int, SegmentRequest]]
    ahead: Ahead


class RolloutPipeline:
    """Rolls out prompts with an engine and scores the completions.

    Each rank rolls out and scores its share of the prompts, all completions of a prompt on one rank; every rank gets
    all groups.

    Args:
        engine: generates completions; already set up with the policy.
        scorer: computes the rewards of completions.
        seed: the run's seed, from which the seed of every sample is derived.
        precision: context that generation runs in (autocast under mixed precision), as in the update.
        trainer_state: state of the run that reward functions may read.
        ranks: the processes that share the work.
        whole_policy: context in which a sharded policy is whole and can generate. Collective.
        environment: generates conversations in place of the engine's completions; None without an environment.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        scorer: RewardScorer,
        seed: int,
        precision: Callable[[], AbstractContextManager[None]],
        trainer_state: Callable[[], TrainerState] = TrainerState,
        ranks: Ranks = Ranks(),  # noqa: B008  # frozen
        whole_policy: Callable[[], AbstractContextManager[None]] | None = None,
        environment: EnvironmentRollouts | None = None,
    ) -> None:
        self.engine, self.scorer, self.seed, self.ranks = engine, scorer, seed, ranks
        self.precision, self.trainer_state = precision, trainer_state
        self._whole_policy = whole_policy if engine.uses_policy else None
        self.generator, self._environment = environment or engine, environment

    @property
    def _waited(self) -> float:
        """Seconds so far that the engine waited for the environment."""
        return 0.0 if self._environment is None else self._environment.waited

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Gather a sharded policy for an engine that generates with it. Collective."""
        if self._whole_policy is None:
            yield
            return
        # Before the gather, so that a lost rank is named.
        self.ranks.barrier("rollouts")
        with self._whole_policy():
            yield

    def roll(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        ledger: Ledger,
        *,
        purpose: str,
        step: int,
        source: Source = "fresh",
        sizes: Sequence[int] | None = None,
    ) -> list[RolloutGroup]:
        """Roll out prompts and return their groups, in order.

        The first completions of a group are those of a smaller group of the same prompt.

        Args:
            prompts: `B` prompts.
            sampling: `G` and the sampling distribution.
            ledger: records the seconds of the phases, the counts (`<purpose>/prompts`, `/completions`, `/tokens`, and
                the scorer's failures), and the metrics that reward functions log.
            purpose: separates the random numbers of training, reference and validation rollouts.
            step: the training step; part of the seed of every sample.
            source: set on the groups.
            sizes: number of completions of each prompt; None is `G` for all.
        """
        [groups] = self.roll_together([RolloutRequest(prompts, purpose, source, sizes)], sampling, ledger, step=step)
        return groups

    def roll_together(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, ledger: Ledger, *, step: int
    ) -> list[list[RolloutGroup]]:
        """Roll out the prompts of several requests in one call of the engine, and return the groups of each, in order.

        Samples have the seeds that they have in a call of their own. The seconds of the call are divided between the
        requests' phases by tokens. What training rollouts wait for the environment is a phase of its own; reference
        sets and validation keep theirs. For the arguments see `roll`.
        """
        prompts = [prompt for request in requests for prompt in request.prompts]
        ends = np.cumsum([len(request.prompts) for request in requests]).tolist()
        sizes = [size for request in requests for size in request.sizes_by(sampling)]
        shares = self._shares(prompts, sampling, sizes)
        places = [
            [position for position in shares[self.ranks.rank] if end - len(request.prompts) <= position < end]
            for request, end in zip(requests, ends, strict=True)
        ]
        mine = [[prompts[position] for position in its] for its in places]
        seeds = [
            request.seeds(self.seed, prompts[position], sizes[position], step)
            for request, its in zip(requests, places, strict=True)
            for position in its
        ]
        phase = _phase(requests[0].purpose)
        spent, waited = -ledger.seconds[phase], -self._waited
        # Ranks without a share enter the contexts too: these may be collective.
        with ledger.phase(phase), self._gathered(), self.precision(), _finite(step):
            completions = self._generated([one for its in mine for one in its], sampling, seeds, set(sizes))
        spent += ledger.seconds[phase]
        waited += self._waited
        rolled, first = Rolled(), 0
        for its, request in zip(mine, requests, strict=True):
            if its:
                written = completions[first : first + len(its)]
                scored = self._scored(its, written, ledger, request.purpose, step, request.source)
                if request.begun:  # prompts that have been counted
                    scored = replace(scored, counts={**scored.counts, f"{request.purpose}/prompts": 0})
                rolled = rolled.joined(scored)
                first += len(its)
        if self.ranks.size > 1:
            spent -= ledger.seconds[phase]
            with ledger.phase(phase):
                rolled = exchange(self.ranks, prompts, shares, rolled)
            spent += ledger.seconds[phase]
        tokens = [rolled.counts.get(f"{request.purpose}/tokens", 0) for request in requests]
        rest = [written_tokens / max(1, sum(tokens)) for written_tokens in tokens[1:]]
        for share, request in zip([1 - sum(rest), *rest], requests, strict=True):
            its_phase = _phase(request.purpose)
            ledger.move(spent * share, phase, its_phase)
            if waited and its_phase == "rollout":
                ledger.move(waited * share, its_phase, "environment")
        groups = rolled.account(ledger)
        if requests[0].purpose != "validate":  # whose batches may be as small as one prompt
            self.stop_if_a_reward_fails(ledger, f"Step {step}")
        return [groups[end - len(request.prompts) : end] for request, end in zip(requests, ends, strict=True)]

    def roll_with_pilots(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        ledger: Ledger,
        *,
        step: int,
        pilot: int,
        completed: Callable[[RolloutGroup], bool],
    ) -> list[RolloutGroup]:
        """Roll out training prompts, the rest of each group only if its pilot says so, and return the groups, in order.

        A completed group is the one that `roll` returns, others are its first completions.

        Args:
            prompts: `B` prompts.
            sampling: as for `roll`.
            ledger: as for `roll`.
            step: as for `roll`.
            pilot: completions of every prompt that are generated and scored first.
            completed: whether a group is to be completed, given these completions. Called on one rank for each prompt,
                in any order.
        """
        shares = self._shares(prompts, sampling)
        mine = [prompts[position] for position in shares[self.ranks.rank]]
        rolled, groups = Rolled(), dict[int, RolloutGroup]()

        def judge(pilots: Mapping[int, tuple[Completion, ...]]) -> list[int]:
            nonlocal rolled
            if not pilots:
                return []
            asked = [mine[place] for place in pilots]
            scored = self._scored(asked, list(pilots.values()), ledger, "train", step, "fresh")
            rolled = rolled.joined(scored)
            groups.update(zip(pilots, scored.groups, strict=True))
            return [place for place in pilots if completed(groups[place])]

        seeds, waited = self._seeds(mine, sampling, "train", step), -self._waited
        with ledger.phase("rollout"), self._gathered(), self.precision(), _finite(step):
            completions = self.generator.generate_with_pilots(mine, sampling, seeds, pilot, judge)
        if waited := waited + self._waited:
            ledger.move(waited, "rollout", "environment")
        rest = {place: its[pilot:] for place, its in enumerate(completions) if len(its) > pilot}
        if rest:
            asked = [mine[place] for place in rest]
            scored = self._scored(asked, list(rest.values()), ledger, "train", step, "fresh")
            rolled = rolled.joined(replace(scored, counts={**scored.counts, "train/prompts": 0}))
            for place, group in zip(rest, scored.groups, strict=True):
                groups[place] = groups[place].joined(group)
        rolled = replace(rolled, groups=[groups[place] for place in range(len(mine))])
        if self.ranks.size > 1:
            with ledger.phase("rollout"):
                rolled = exchange(self.ranks, prompts, shares, rolled)
        found = rolled.account(ledger)
        self.stop_if_a_reward_fails(ledger, f"Step {step}")
        return found

    def start(self, flights: Sequence[InFlight], sampling: Sampling, limits: Sequence[int], *, step: int) -> Segments:
        """Start to generate the next segment of every unfinished completion with the current policy, for `collect`.

        Each rank generates its share of the prompts. An engine that does not run ahead has generated them on return.

        Args:
            flights: `N` prompts in flight, none of them complete.
            sampling: the distribution of whole completions.
            limits: `N` limits on the new tokens of each of their completions.
            step: the step in progress.
        """
        asked = [one.requests(sampling, limit) for one, limit in zip(flights, limits, strict=True)]
        # An engine generates equally many completions of every prompt: of `G` if all begin, and else one.
        together = not any(one.segments for one in flights)
        if not together:
            asked = [[part for one in requests for part in one.apart()] for requests in asked]
        sizes = [
            sum(len(one.prompt.token_ids) + len(one.samples) * one.limit for one in requests) for requests in asked
        ]
        shares = deal(sizes, self.ranks.size)
        mine = [(position, one) for position in shares[self.ranks.rank] for one in asked[position]]
        size = sampling.num_generations if together else 1
        seeds = [flights[position].seeds(self.seed, one.samples) for position, one in mine]
        longest = max((one.limit for requests in asked for one in requests), default=1)
        apart = any(one.limit < longest for requests in asked for one in requests)
        with self._gathered(), self.precision(), _finite(step):
            ahead = self.engine.start(
                [one.prompt for _, one in mine],
                replace(sampling, num_generations=size, max_completion_length=longest),
                np.array(seeds, dtype=np.int64).reshape(len(mine), size),
                *([np.array([[one.limit] * size for _, one in mine], np.int64).reshape(-1, size)] if apart else []),
            )
        return Segments(list(flights), shares, mine, ahead)

    def collect(self, started: Segments, sampling: Sampling, ledger: Ledger, *, step: int) -> list[InFlight]:
        """Wait for the segments that `start` began, and return the prompts with them, in order, on every rank.

        Args:
            started: as `start` returned it.
            sampling: as it was given to `start`.
            ledger: that of the step that the completions are for.
            step: the step in progress.
        """
        new: dict[int, dict[int, Completion]] = {position: {} for position in started.shares[self.ranks.rank]}
        flights = list(started.flights)
        with ledger.phase("rollout"), _finite(step):
            for (position, one), segments in zip(started.requests, started.ahead.result(), strict=True):
                new[position].update(zip(one.samples, segments, strict=True))
            for position, its in new.items():
                flights[position] = flights[position].grown(its, sampling, self.engine.tokenizer)
            if self.ranks.size > 1:
                prompts = [one.group.prompt for one in flights]
                mine = Rolled([flights[position].group for position in new])
                everything = exchange(self.ranks, prompts, started.shares, mine).groups
                flights = [
                    replace(one, group=group, segments=before.segments + 1)
                    for one, before, group in zip(flights, started.flights, everything, strict=True)
                ]
        continued = [
            after.group.completion_tokens - before.group.completion_tokens
            for before, after in zip(started.flights, flights, strict=True)
            if before.segments
        ]
        ledger.count("continued_tokens", sum(continued))
        return flights

    def score(
        self, groups: Sequence[RolloutGroup], sampling: Sampling, ledger: Ledger, *, step: int
    ) -> list[RolloutGroup]:
        """Return groups whose completions were generated ahead with their rewards, in order, on every rank.

        Args:
            groups: complete groups without rewards; the same on every rank.
            sampling: that of their completions.
            ledger: that of the step that they are for.
            step: the step in progress.
        """
        prompts = [group.prompt for group in groups]
        shares = self._shares(prompts, sampling)
        mine = shares[self.ranks.rank]
        rolled = Rolled()
        if mine:
            completions = [groups[position].completions for position in mine]
            rolled = self._scored([prompts[one] for one in mine], completions, ledger, "train", step, "fresh")
        if self.ranks.size > 1:
            with ledger.phase("rollout"):
                rolled = exchange(self.ranks, prompts, shares, rolled)
        scored = rolled.account(ledger)
        self.stop_if_a_reward_fails(ledger, f"Step {step + 1}")
        return [replace(one, birth_step=group.birth_step) for one, group in zip(scored, groups, strict=True)]

    def _shares(
        self, prompts: Sequence[Prompt], sampling: Sampling, sizes: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Return the positions of the prompts that each rank rolls out."""
        # Only the bound of a completion's length is known: prompts are dealt by completions, after their own length.
        sizes = [sampling.num_generations] * len(prompts) if sizes is None else sizes
        written = [size * sampling.max_completion_length for size in sizes]
        return deal(
            [len(prompt.token_ids) + its for prompt, its in zip(prompts, written, strict=True)], self.ranks.size
        )

    def _generated(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[np.ndarray], sizes: set[int]
    ) -> Groups:
        """Generate a completion of each prompt for every one of its seeds; `sizes` are those of all ranks' groups."""
        # An engine generates equally many completions of every prompt: where sizes differ, each is a request.
        size = sizes.pop() if len(sizes) == 1 else 1
        asked = [prompt for prompt, its in zip(prompts, seeds, strict=True) for _ in range(len(its) // size)]
        drawn = np.concatenate([np.zeros(0, np.int64), *seeds]).reshape(-1, size)
        found = iter(self.generator.generate(asked, replace(sampling, num_generations=size), drawn))
        return [tuple(one for _ in range(len(its) // size) for one in next(found)) for its in seeds]

    def _seeds(self, prompts: Sequence[Prompt], sampling: Sampling, purpose: str, step: int) -> np.ndarray:
        return sample_seeds(self.seed, purpose, step, [prompt.id for prompt in prompts], sampling.num_generations)

    def _scored(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[tuple[Completion, ...]],
        ledger: Ledger,
        purpose: str,
        step: int,
        source: Source,
    ) -> Rolled:
        phase = _phase(purpose)
        with ledger.phase("reward" if phase == "rollout" else phase):
            result = self.scorer.score(
                prompts, completions, source=source, step=step, state=self.trainer_state(),
                measured=purpose == "validate",
            )  # fmt: skip
        counts = {
            f"{purpose}/prompts": len(prompts),
            f"{purpose}/completions": sum(len(group) for group in completions),
            f"{purpose}/tokens": sum(one.generated_tokens for group in completions for one in group),
            "rewards/completions": sum(len(group) for group in completions),
            "rewards/timed_out": result.timed_out,
            "rewards/crashed": result.crashed,
            "rewards/failed": result.failed,
            "rewards/unscored": result.unscored,
            "rewards/dropped": result.dropped,
            **_environment_counts(completions),
        }
        counts |= {f"rewards/failed/{name}": failed for name, failed in result.failed_by_reward.items()}
        for name, (asked, its) in result.asked_by_reward.items():
            counts |= {f"rewards/asked_prompts/{name}": asked, f"rewards/asked/{name}": its}
        return Rolled(result.groups, counts, result.logged)

    def stop_if_a_reward_fails(self, ledger: Ledger, where: str) -> None:
        """End the run when all conversations, or every score of a reward, that a ledger counts have failed.

        Args:
            ledger: of a step or a validation.
            where: the beginning of the message, e.g. "Step 3".

        Raises:
            UserError: names the first cause. The same on every rank, which knows the causes of its own share.
        """
        conversations = int(ledger.counts["environment/conversations"])
        if conversations > 1 and ledger.counts["environment/failed"] == conversations:
            cause = self.scorer.incidents.first_environment or "on another rank, whose message tells the cause"
            raise UserError(
                f"{where}: the environment failed in all {conversations} conversations; first in that of {cause}. "
                "Correct the environment, or raise the limit that is named, and start again or resume: checkpoints of "
                "earlier steps are kept."
            )
        for name in self.scorer.names:
            count = int(ledger.counts[f"rewards/asked/{name}"])
            # A reward that is asked about some prompts only may fail on the one prompt of a step.
            enough = ledger.counts[f"rewards/asked_prompts/{name}"] > 1 or count == ledger.counts["rewards/completions"]
            if count and enough and ledger.counts[f"rewards/failed/{name}"] == count:
                cause = self.scorer.incidents.first_cause(name) or "on another rank, whose message tells the cause"
                raise UserError(
                    f"{where}: every score of reward {name!r} failed, those of {count} completions; first on {cause}. "
                    "Correct the reward or the data, or raise the limit that is named, and start again or resume: "
                    "checkpoints of earlier steps are kept."
                )


def _environment_counts(completions: Sequence[tuple[Completion, ...]]) -> dict[str, int]:
    """Return the counts of conversations with an environment: turns of the policy, tool calls, failures."""
    found = [(one.outcome, one.turns) for group in completions for one in group if one.outcome is not None]
    if not found:
        return {}
    return {
        "environment/conversations": len(found),
        "environment/turns": sum(turn.generated for _, turns in found for turn in turns),
        "environment/failed": sum(bool(outcome.error) for outcome, _ in found),
        "tools/calls": sum(outcome.calls for outcome, _ in found),
        "tools/failed_calls": sum(outcome.failed_calls for outcome, _ in found),
    }


@contextmanager
def _finite(step: int) -> Iterator[None]:
    """Turn an engine's error about a policy that is not finite into a UserError."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(
            f"Step {step}: {error}. Give a policy with finite weights, or resume with a lower "
            "model.optimization.learning_rate or with --trainer.precision 32-true."
        ) from error


def _phase(purpose: str) -> str:
    return purpose if purpose in ("reference", "validate") else "rollout"
