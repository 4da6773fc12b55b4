"""Names of all logged scalars, with their meaning and unit."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class MetricName(NamedTuple):
    """A logged scalar.

    Attributes:
        name: exact name, or a pattern in which `*` stands for any text.
        unit: unit of the value; empty for a plain number.
        meaning: what the value measures.
    """

    name: str
    unit: str
    meaning: str


METRIC_NAMES = tuple(
    MetricName(*entry)
    for entry in (
        ("reward", "", "mean reward of the completions trained on"),
        ("reward_std", "", "standard deviation of the rewards within a group, averaged over groups"),
        ("frac_reward_zero_std", "fraction", "groups whose rewards are all equal"),
        ("rewards/timed_out", "scores", "scores that took too long"),
        ("rewards/crashed", "scores", "scores lost to an exception, a dead worker, or a value out of bounds"),
        ("rewards/failed_fraction", "fraction", "completions of a step whose score or environment failed"),
        ("rewards/unscored_fraction", "fraction", "completions of a step to which no correctness reward applies"),
        ("rewards/*/mean", "", "mean of one reward over the completions trained on to which it applies"),
        ("rewards/*/std", "", "its standard deviation"),
        ("rewards/*/*", "", "metric that a reward function logs, averaged over the completions of a step"),
        ("completions/mean_length", "tokens", "mean length of the completions trained on, in generated tokens"),
        ("completions/min_length", "tokens", "their minimum length"),
        ("completions/max_length", "tokens", "their maximum length"),
        ("completions/mean_terminated_length", "tokens", "mean length of those that ended before the limit"),
        ("completions/clipped_ratio", "fraction", "completions truncated at the length limit"),
        ("environment/turns", "turns", "mean number of the policy's turns in a step's conversations (`environment`)"),
        ("environment/failed", "conversations", "conversations of a step whose environment failed or took too long"),
        ("tools/call_frequency", "calls", "tool calls per conversation of a step"),
        ("tools/failure_frequency", "fraction", "tool calls that raised an error or named no tool"),
        ("loss", "", "loss, averaged over the optimizer steps of a batch"),
        ("grad_norm", "", "gradient norm before clipping, averaged over the optimizer steps of a batch"),
        ("learning_rate", "", "learning rate of the last optimizer step"),
        ("entropy", "nats", "mean entropy of the policy's next-token distribution"),
        ("kl", "nats", "mean estimate of the KL divergence to the reference policy"),
        ("updates/reused", "updates", "further updates on the batch (`model.reuse`)"),
        ("updates/reuse_z_score", "", "z-score of the head's gradient norm in the last further update, taken or not"),
        ("updates/skipped", "updates", "optimizer steps left out because loss or gradient was not finite"),
        ("updates/empty", "updates", "optimizer steps without any completion that has an advantage"),
        ("updates/dropout", "", "dropout of the adapters' inputs, which rollouts do not have (`policy.lora.dropout`)"),
        ("updates/zero_advantage_token_fraction", "fraction", "completion tokens that were not read: no advantage"),
        ("updates/padding_fraction", "fraction", "positions of the forward passes that are padding"),
        ("updates/positions_per_token", "", "positions read per token of the sequences, prompts repeated"),
        ("policy/ratio_mean", "", "mean probability ratio that the loss clips"),
        ("policy/ratio_max", "", "largest such ratio"),
        ("policy/approx_kl", "nats", "k3 estimate of the KL divergence of the updated policy from the old one"),
        ("clip_ratio/low_mean", "fraction", "tokens clipped at the lower bound"),
        ("clip_ratio/high_mean", "fraction", "tokens clipped at the upper bound"),
        ("clip_ratio/region_mean", "fraction", "tokens clipped at either bound"),
        ("clip_ratio/capped_mean", "fraction", "tokens at the second bound of the loss (CISPO's cap, dual clip)"),
        ("sampling/importance_sampling_ratio/*", "", "importance weight of old against behaviour policy, as used"),
        ("sampling/effective_sample_fraction", "fraction", "effective sample size of these weights per token"),
        ("sampling/sampling_logp_difference/*", "nats", "absolute log-probability difference of trainer and engine"),
        ("sampling/refills", "rounds", "refill rounds of dynamic sampling"),
        ("sampling/dropped_fraction", "fraction", "groups of a step that dynamic sampling dropped"),
        ("sampling/groups_per_passed", "groups", "groups generated per group that passed"),
        ("sampling/surplus", "groups", "groups that passed beyond what was needed"),
        ("sampling/missing", "groups", "groups that dynamic sampling could not fill"),
        ("pilot/completed_fraction", "fraction", "prompts whose group was completed after its pilot (Pilots)"),
        ("pilot/saved_completions", "completions", "completions that other groups were spared"),
        ("pilot/threshold", "probability", "P(informative) from which the rest of a group was worth it, last"),
        ("group_size/min", "completions", "smallest group of the step's first choice (GroupSizes)"),
        ("group_size/max", "completions", "largest one"),
        ("group_size/informative_forecast", "fraction", "groups that are expected to be informative with these sizes"),
        ("group_size/informative_if_equal", "fraction", "the same with equal sizes"),
        ("replay/size", "groups", "groups in the buffer that the step draws from"),
        ("replay/bytes", "bytes", "memory of these groups"),
        ("replay/fraction", "fraction", "groups of the batch that are replayed"),
        ("replay/age_mean", "steps", "mean age of the replayed groups"),
        ("replay/age_max", "steps", "maximum age of the replayed groups"),
        ("replay/dropped_stale", "groups", "stored groups whose prompt the step has rolled out again"),
        ("replay/dropped_old", "groups", "stored groups evicted because of max_age"),
        ("replay/dropped_used", "groups", "stored groups evicted because of max_uses"),
        ("replay/drift", "nats", "mean distance of log-probabilities from those at generation, of replayed tokens"),
        ("replay/worth", "", "worth of a replayed group, as a fraction of a fresh informative one (share: auto)"),
        ("replay/threshold", "", "worth above which replay saves time, by the run's own seconds (share: auto)"),
        ("replay/share", "fraction", "replayed groups wanted, of the largest number allowed (share: auto)"),
        ("replay/importance_ratio_mean", "", "mean importance weight of tokens from older policies"),
        ("replay/importance_ratio_max", "", "maximum importance weight of these tokens"),
        ("replay/effective_sample_fraction", "fraction", "effective sample size of these weights per token"),
        ("replay/clip_ratio", "fraction", "tokens from older policies that are clipped"),
        ("rollout_ahead/age_mean", "steps", "mean age of the fresh groups trained on (RolloutAhead)"),
        ("rollout_ahead/age_max", "steps", "their maximum age"),
        ("rollout_ahead/in_flight", "groups", "groups with cut completions, which the next step continues"),
        ("rollout_ahead/waiting", "groups", "complete groups that the next step does not train on"),
        ("rollout_ahead/continued_tokens", "tokens", "tokens generated in this step for completions cut before"),
        ("rollout_ahead/aged_out", "groups", "groups given up because no step trained on them in time"),
        ("selection/informative_fraction", "fraction", "groups trained on whose correctness rewards differ"),
        ("selection/fresh_informative_fraction", "fraction", "the same of all prompts chosen, dropped ones included"),
        ("selection/uniform_informative_measured", "fraction", "the same of uniform rollouts, a decaying mean"),
        ("selection/uniform_informative_forecast", "fraction", "the same expected of a uniform choice"),
        ("selection/mean_success", "fraction", "mean success rate of the prompts chosen"),
        ("selection/forecast_mean", "fraction", "mean success rate expected of them"),
        ("selection/forecast_brier", "", "mean squared error of these forecasts"),
        ("selection/forecast_pearson", "", "correlation of these forecasts with the success rates measured"),
        ("selection/explored_fraction", "fraction", "prompts chosen uniformly for exploration"),
        ("selection/fallback_fraction", "fraction", "prompts chosen although a filter or the cool-down excluded them"),
        ("selection/distinct_prompts", "prompts", "different prompts chosen so far"),
        ("selection/distinct_fraction", "fraction", "their fraction of the pool"),
        ("selection/pool_epoch", "passes", "passes over the pool (Uniform, Greso)"),
        ("selection/posterior_mean", "fraction", "posterior mean success rate over the pool (Mopps, Posterior)"),
        ("selection/posterior_std", "fraction", "posterior standard deviation, mean over the pool (Mopps)"),
        ("selection/posterior_std_mean", "fraction", "the same (Posterior)"),
        ("selection/exploration_fraction", "fraction", "chosen prompts that a greedy choice leaves out (Posterior)"),
        ("selection/pool_share", "fraction", "effective share of the pool that the draw spreads over (Aligned)"),
        ("selection/alignment_strength", "", "exponent of the alignment, below 1 where `variety` bounds it (Aligned)"),
        ("selection/alignment_mean", "", "mean cosine expected of a prompt's gradient with the others' (Aligned)"),
        ("selection/alignment_std", "", "standard deviation of these expectations over the pool (Aligned)"),
        ("selection/alignment_pearson", "", "correlation of these expectations with the cosines measured (Aligned)"),
        (
            "selection/informative_calibration_error",
            "probability",
            "expected calibration error of P(informative) over all chosen prompts so far (Posterior)",
        ),
        ("selection/p_easy", "probability", "probability of keeping a prompt after one all-correct group (Greso)"),
        ("selection/p_hard", "probability", "probability of keeping a prompt after one all-wrong group (Greso)"),
        ("selection/skip_fraction", "fraction", "expected fraction of the pool that is skipped (Greso)"),
        ("selection/belief_*", "probability", "mean belief that a prompt is wrong, partly or right (Dps)"),
        ("selection/*_fraction", "fraction", "hard, normal, easy and unseen prompts of the pool (Pools)"),
        ("difficulty/reference_success", "fraction", "mean success rate of the reference prompts"),
        ("difficulty/reference_informative_fraction", "fraction", "reference groups whose correctness rewards differ"),
        ("difficulty/reference_pearson", "", "correlation of forecast and success rate of the reference prompts"),
        ("difficulty/reference_brier", "", "mean squared error of the forecast of the reference prompts"),
        ("difficulty/forecast_mean", "fraction", "mean success rate expected over the pool (Dots)"),
        ("difficulty/calibration_temperature", "", "temperature of the forecast's calibration (Dots)"),
        ("difficulty/calibration_bias", "", "bias of the forecast's calibration (Dots)"),
        ("difficulty/kernel_temperature", "", "temperature of the attention over reference prompts (Dots)"),
        ("difficulty/predictor_used", "", "1 where the trained predictor forecasts, 0 where the kernel does (Dots)"),
        ("difficulty/drift", "logits per step", "estimated drift of all prompts' success (Posterior)"),
        ("difficulty/*_variance", "", "variance components of the model: own, shared, noise, drift (Posterior)"),
        ("difficulty/memory_steps", "steps", "steps after which a prompt's own variation decays to 1/e (Posterior)"),
        ("train/*/chosen_fraction", "fraction", "prompts chosen that belong to one of several training sources"),
        ("train/*/reward", "", "mean reward of the completions trained on, of this source"),
        ("train/*/mean_success", "fraction", "mean success rate of the prompts chosen, of this source"),
        ("train/*/informative_fraction", "fraction", "their groups whose correctness rewards differ, of this source"),
        ("train/*/forecast_mean", "fraction", "mean success rate expected over all prompts of this source"),
        ("num_completions", "completions", "completions rolled out for training so far, reference sets included"),
        ("num_tokens", "tokens", "their completion tokens so far"),
        ("tokens_per_second", "tokens/s", "completion tokens rolled out per second of the step"),
        ("step_time", "s", "duration of the step"),
        ("time/training", "s", "training clock: sum of all steps, without validation and checkpoints"),
        ("time/rollout_overlapped", "s", "generation that updates hid: what RolloutAhead saved"),
        ("time/pilots_dropped", "s", "rollout seconds of pilots that were not completed, by tokens (Pilots)"),
        ("time/environment", "s", "waiting of training rollouts for the environment: nothing was generated"),
        ("time/*", "s", "select, rollout, reference, reward, update or sync; on a GPU until its work is done"),
        ("ranks/update_token_imbalance", "fraction", "excess of the largest rank's tokens over the mean"),
        ("val/accuracy", "fraction", "validation completions that are correct, failed ones not; mean over prompts"),
        ("val/prompts", "prompts", "validation prompts with a scored completion, which val/* is about"),
        ("val/pass@*_prompts", "prompts", "those with k scored completions, which val/pass@k is about"),
        ("val/pass@*", "fraction", "unbiased estimate of pass@k on the validation prompts"),
        ("val/avg@*", "fraction", "accuracy by the name that tells the number of completions per prompt"),
        ("val/maj@*_prompts", "prompts", "prompts with k completions whose answers a reward has found"),
        ("val/maj@*", "fraction", "chance that the most frequent answer of k completions is correct"),
        ("val/rewards/*/mean", "", "mean of one reward over the validation prompts to which it applies"),
        ("val/rewards/*/prompts", "prompts", "these prompts"),
        ("val/failed_fraction", "fraction", "validation completions whose score or environment failed"),
        ("val/unscored_fraction", "fraction", "validation completions to which no correctness reward applies"),
        ("val/reward", "", "mean reward of the validation completions"),
        ("val/completions/mean_length", "tokens", "their mean length"),
        ("val/environment/turns", "turns", "mean number of the policy's turns in validation conversations"),
        ("val/environment/failed", "conversations", "validation conversations whose environment failed"),
        ("val/tools/call_frequency", "calls", "tool calls per validation conversation"),
        ("val/tools/failure_frequency", "fraction", "those that raised an error or named no tool"),
        ("val/*=*/accuracy", "fraction", "accuracy on the prompts with one value of a column (`tags` of the set)"),
        ("val/*=*/prompts", "prompts", "these prompts"),
        ("test/*", "", "as val/*, on the test prompts (`dots test`)"),
        ("epoch", "", "always 0; logged by Lightning"),
        ("train/loss", "nats", "cross-entropy per completion token (pretraining)"),
        ("val/informative_fraction", "fraction", "validation groups with both outcomes (pretraining)"),
        ("val/accuracy_*", "fraction", "accuracy on one task (pretraining)"),
        ("val/*/*", "", "as val/*, of one of several validation sets; val/* is their mean, or sum of counts"),
    )
)  # fmt: skip


def metric_name(tag: str) -> MetricName | None:
    """Return the entry of a logged scalar, or None: an exact name before patterns, these in order."""
    exact = (entry for entry in METRIC_NAMES if entry.name == tag)
    return next(exact, next((entry for entry in METRIC_NAMES if fnmatchcase(tag, entry.name)), None))


def markdown_table() -> str:
    """Return a Markdown table of all names, units and meanings."""
    rows = (f"| `{entry.name}` | {entry.unit} | {entry.meaning} |" for entry in METRIC_NAMES)
    return "\n".join(("| metric | unit | meaning |", "|---|---|---|", *rows)) + "\n"
