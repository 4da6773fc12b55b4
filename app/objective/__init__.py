"""The GRPO objective as pure functions of tensors: nothing here knows a trainer, a model or a configuration.

A mini-batch passes through the files in this order:

1. `advantages`: rewards `[N]` of groups -> one advantage per completion.
2. `weights`: lengths `[N]` -> what each completion token counts in the loss.
3. `packing`: prompts and completions -> token-budget micro-batches; each is a padded rectangle for the model and flat
   per-token tensors for everything else.
4. `logprobs`: hidden states at the predicting positions -> log-probability and entropy of every completion token.
5. `surrogate.policy_loss`: -> a weighted sum over tokens, to be added up over micro-batches, and `statistics` of it.
   `options` says which loss; `ratios`, `forms` and `kl` are its parts.

Legend, beyond the project's letters (`datamodules.types`):

- `N` sequences, `n` sequences of one micro-batch, `L` padded length, `T` completion tokens of all its sequences laid
  end to end ("flat"), `V` vocabulary, `H` hidden size.
- `pi` the policy being updated, `pi_old` the policy before this update, `mu` the behaviour policy that generated the
  tokens, `ref` a frozen reference. Every log-probability is of one token given what precedes it, in nats.
- `w = pi / pi_old` the update's ratio, `rho = pi / mu` the ratio to the behaviour policy, `rho_old = pi_old / mu` the
  importance weight that links them: `rho = w * rho_old`.
"""
