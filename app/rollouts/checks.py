"""What of the data cannot be rolled out, scored or measured, found before the first rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from transformers import PreTrainedTokenizerBase

from app.engines import Sampling
from app.environments.sessions import Sessions
from app.policy.model import Policy
from app.reporting.validation import ValidationMetrics
from app.rewards import Environment, RewardScorer
from app.rewards.answers import check_answers, gold_columns
from app.rewards.code.reward import Code
from datamodules.errors import UserError
from datamodules.mixture import Mixture
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.prompts.reading import reward_columns
from datamodules.validation import ValidationSet

_USUAL_K = 4


def metrics_of_sets(
    data: OnlinePromptDataModule,
    rewards: Sequence[str],
    sampling_of: Callable[[ValidationSet], Sampling],
    pass_at_k: int | list[int] | None,
) -> dict[str, ValidationMetrics]:
    """Return the metrics of each validation and test set, by the name of the set.

    Args:
        data: the pools and sets, read.
        rewards: names of the rewards.
        sampling_of: the sampling of a set.
        pass_at_k: the k of a set that has none of its own; None is 4, or the completions of a prompt if these are less.

    Raises:
        UserError: a k is below 1 or above the completions of a prompt.
    """
    found = {}
    for name, one in data.sets.items():
        generations = sampling_of(one).num_generations
        asked, where = pass_at_k, "model.pass_at_k"
        if one.pass_at_k is not None:
            asked, where = one.pass_at_k, f"data.{name.replace('/', '.', 1)}.pass_at_k"
        ks = [min(_USUAL_K, generations)] if asked is None else [asked] if isinstance(asked, int) else asked
        for k in ks:
            if not 1 <= k <= generations:
                raise UserError(
                    f"{where} asks for pass@{k}, but {name} samples {generations} completions per prompt: expected "
                    f"1 to {generations}. Raise num_generations of its sampling, or change {where}."
                )
        found[name] = ValidationMetrics(ks, generations, rewards, data.tags[name])
    return found


def check_rewards(data: OnlinePromptDataModule, scorer: RewardScorer, sessions: Sessions | None) -> None:
    """Read the answers of every source and set, and score the answer of its first prompt.

    Args:
        data: the pools and sets, read.
        scorer: has the rewards.
        sessions: the environment's; None without one.

    Raises:
        UserError: a reward cannot read the answers, cannot work (see `RewardScorer.try_out`), or is that of an
            environment which has none.
    """
    tried = []
    for name, pool in data.pools.items():
        for part, its in (pool.parts if isinstance(pool, Mixture) else {"": pool}).items():
            if not len(its):
                continue
            where = f"data.{name}.{part}".rstrip(".").replace("/", ".", 1)
            rewards = [scorer.rewards[place] for place in scorer.applying_to(its[0], where)]
            if sessions is not None and (own := [one for one in rewards if isinstance(one, Environment)]):
                _check_scores_itself(own[0].name, its, sessions, where)
            rows = reward_columns(its, gold_columns(rewards))
            check_answers(rewards, its.ids, rows, f"the {part or name} prompts")
            for reward in rewards:
                if isinstance(reward, Code):
                    reward.check_tests(its.ids, reward_columns(its, reward.columns_read), f"the {part or name} prompts")
            tried.append(its[0])
    scorer.try_out(tried)


def _check_scores_itself(reward: str, pool: PromptPool, sessions: Sessions, where: str) -> None:
    """Raise UserError if prompts that the environment is to score are of one that has no reward of its own."""
    if not (unscored := sessions.unscored()):
        return
    names = {str(columns.get("environment")) for columns in reward_columns(pool, ["environment"])}
    if "" in unscored:  # the only one
        which = ""
    elif lacking := sorted(names & unscored):
        which = f" {lacking[0]!r}, which prompts of {where} name,"
    else:
        return
    raise UserError(
        f"Reward {reward!r} is what the environment's get_reward returns, but the environment{which} has no "
        "get_reward. Give it one, or choose rewards that score the conversation."
    )


def check_tokens(data: OnlinePromptDataModule, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a prompt holds a token that the model has no embedding of."""
    if not (unknown := policy.unknown_tokens(tokenizer)):
        return
    for prompt in chain.from_iterable(data.pools.values()):
        if found := [unknown[token] for token in prompt.token_ids if token in unknown]:
            raise UserError(
                f"Prompt {prompt.id!r} holds the token {found[0]!r}, which the tokenizer of {policy.path} has but its "
                "model has no embedding of. Resize the model's embedding to its tokenizer (resize_token_embeddings), "
                "or leave the token out of prompts and templates."
            )
