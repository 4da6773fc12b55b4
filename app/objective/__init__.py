"""The GRPO objective as pure functions: tensors in, tensors out, without a trainer, a model or a configuration.

A mini-batch passes through the files in this order:

1. `advantages`: rewards `[N]` of groups -> one advantage per completion.
2. `ratios.token_weights`: lengths `[N]` -> the weight of each completion token in the loss.
3. `packing`: prompts and completions -> micro-batches within a token budget. Each has a layout for the model (a padded
   rectangle, or the single row of `shared_prompt`) and flat per-token tensors for the loss.
4. `logprobs`: hidden states at the predicting positions -> log-probability and entropy of every generated token;
   its backward pass can add up `sketches` of each group's gradient with respect to the head.
5. `forms`: the objective of a token whose probability has moved since it was sampled.
6. `surrogate.policy_loss`: per-token tensors -> a weighted sum over tokens, to be added up over micro-batches, and its
   `statistics`. The ratios between policies and the KL estimates are in `ratios`.

Notation, in addition to the letters of `datamodules.types`:

- `N` sequences, `n` sequences of one micro-batch, `L` padded length, `T` generated tokens of all its sequences laid
  end to end ("flat"), `V` vocabulary, `H` hidden size.
- `pi` the policy being updated, `pi_old` the policy before this update, `mu` the behaviour policy that generated the
  tokens, `ref` a frozen reference. Every log-probability is of one token given its predecessors, in nats.
- `w = pi / pi_old` the update's ratio, `rho = pi / mu` the ratio to the behaviour policy, `rho_old = pi_old / mu` the
  importance weight that links them: `rho = w * rho_old`.
"""
