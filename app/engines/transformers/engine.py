"""Rollouts with the policy itself, in its own process: any Hugging Face causal LM, no copy of the weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from app.engines.base import RolloutEngine, Sampling, Weights
from app.engines.checks import check_request
from app.engines.stopping import StopStrings, end_token_ids
from app.engines.transformers.kv_cache import GrowingCache, RowCache
from app.engines.transformers.sampler import draw, uniforms
from app.engines.transformers.schedule import Rows, Work, fill_holes, plan, take_bucket
from app.engines.transformers.shared_cache import SharedPromptCache
from app.policy.model import attending, causal_lm, plain_attention
from app.ranks import Ranks
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt


class Transformers(RolloutEngine):
    """Generates with the policy's own module, so that `push` has nothing to copy.

    Every prompt is read once, and its keys and values are kept and read once for all its completions, where the
    policy's layers attend to the whole context; finished rows leave the batch at once, and waiting prompts take their
    places.

    Args:
        max_rows: completions decoded together.
        max_cache_tokens: bound on rows x (longest prompt + max_completion_length), and so on the memory of the
            key-value cache; fewer rows are decoded together when it would be exceeded.
        prefill_tokens: prompt tokens (padding included) read in one forward pass.
        share_prompts: false decodes with the model's own attention and cache, which copies the prompt to every row;
            for a policy whose attention wants something that `decode_attention` does not do.
    """

    uses_policy = True

    def __init__(
        self,
        max_rows: int = 256,
        max_cache_tokens: int = 262_144,
        prefill_tokens: int = 16_384,
        share_prompts: bool = True,
    ) -> None:
        for name, given in (
            ("max_rows", max_rows),
            ("max_cache_tokens", max_cache_tokens),
            ("prefill_tokens", prefill_tokens),
        ):
            if given < 1:
                raise UserError(f"engine {name}={given}: expected at least 1")
        self.max_rows, self.max_cache_tokens, self.prefill_tokens = max_rows, max_cache_tokens, prefill_tokens
        self.share_prompts = share_prompts
        self.version = 0

    def setup(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        weights: Weights | None = None,
        folder: Path | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008  # frozen
    ) -> None:
        """Raises UserError for a model whose forward takes no `past_key_values`."""
        super().setup(model, tokenizer, weights=weights, folder=folder, ranks=ranks)
        lm = causal_lm(model)
        self._accepted = set(inspect.signature(lm.forward).parameters)
        if "past_key_values" not in self._accepted:
            raise UserError(
                f"{type(lm).__name__} keeps no key-value cache (its forward takes no past_key_values): "
                "the Transformers engine needs one, choose another model or engine"
            )

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """The weights are shared; only their version is noted."""
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray
    ) -> list[tuple[Completion, ...]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: a prompt has no tokens, or no room for a completion in the model's positions.
            FloatingPointError: the policy's logits are NaN or infinite.
        """
        if len(prompts) == 0:
            return []
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        check_request(prompts, sampling, seeds, limit, f"the model's {limit} positions")
        # Not inference_mode: what a model caches in itself during generation (rotary tables) must suit autograd.
        with torch.no_grad(), _evaluating(self.model):
            return _Generation(self, prompts, sampling, seeds).run()

    def _forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        **cached: Any,
    ) -> torch.Tensor:
        """Logits `[n, V]` of the last position of `[n, T]` tokens, whose context is `cached`."""
        optional = {"position_ids": position_ids, "logits_to_keep": 1}
        output = self.model(
            input_ids=input_ids,
            use_cache=True,
            **cached,
            **{name: value for name, value in optional.items() if name in self._accepted},
        )
        return output.logits[:, -1]


class _Generation:
    """The state of one `generate` call; nothing of it outlives the call."""

    def __init__(self, engine: Transformers, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> None:
        self.engine, self.sampling, self.device = engine, sampling, engine.model.device
        self.lm = causal_lm(engine.model)
        self.config = self.lm.config
        columns = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_completion_length
        self.max_rows = min(engine.max_rows, seeds.size, max(1, engine.max_cache_tokens // columns))
        self.waiting = plan([prompt.token_ids for prompt in prompts], sampling.num_generations, self.max_rows)
        self.cache = self._new_cache()
        self.rows = Rows()
        self.ends = end_token_ids(engine.model, engine.tokenizer)
        self.stops = StopStrings(sampling.stop, engine.tokenizer)
        self.seeds = seeds.reshape(-1)
        self.tokens = np.zeros((seeds.size, sampling.max_completion_length), dtype=np.int32)
        self.logprobs = np.zeros((seeds.size, sampling.max_completion_length), dtype=np.float32)
        self.lengths = np.zeros(seeds.size, dtype=np.int64)
        self.stopped = np.zeros(seeds.size, dtype=bool)

    def _new_cache(self) -> RowCache:
        if not (self.engine.share_prompts and plain_attention(self.lm)):
            return GrowingCache()
        layers = len(DynamicCache(config=self.config).layers)
        prompts = min(len(self.waiting), self.max_rows)
        return SharedPromptCache(layers, self.max_rows, prompts, self.sampling.max_completion_length)

    def run(self) -> list[tuple[Completion, ...]]:
        while self.waiting or len(self.rows):
            self._admit()
            if len(self.rows):
                self._record(self._step(), first=0)
        return self._completions()

    def _admit(self) -> None:
        """Prefills waiting prompts when many rows are free (each joining interrupts decoding) or none is left."""
        free = self.max_rows - len(self.rows)
        if len(self.rows) and not (self.cache.can_join and free >= self.max_rows // 8):
            return
        while bucket := take_bucket(self.waiting, self.max_rows - len(self.rows), self.engine.prefill_tokens):
            first = len(self.rows)
            self._record(self._prefill(bucket), first)
            if not self.cache.can_join and len(self.rows):
                return

    def _prefill(self, bucket: list[Work]) -> torch.Tensor:
        """Reads the prompts once each; logits `[samples, V]` of every sample's first token."""
        lengths = np.array([len(work.token_ids) for work in bucket])
        padded = np.zeros((len(bucket), lengths.max()), dtype=np.int64)
        for row, work in enumerate(bucket):
            padded[row, -len(work.token_ids) :] = work.token_ids
        positions = np.arange(lengths.max()) - (lengths.max() - lengths)[:, None]
        mask = self._to_device((positions >= 0).astype(np.int64)) if (lengths != lengths.max()).any() else None
        prefilled = DynamicCache(config=self.config)
        position_ids = self._to_device(positions.clip(min=0))
        logits = self.engine._forward(
            self._to_device(padded), position_ids, attention_mask=mask, past_key_values=prefilled
        )
        source = np.repeat(np.arange(len(bucket)), [len(work.samples) for work in bucket])
        self.cache.admit(prefilled, source, lengths[source])
        self.rows.add(np.concatenate([work.samples for work in bucket]), lengths[source])
        return logits[self._to_device(source)]

    def _step(self) -> torch.Tensor:
        """Logits `[n, V]` after the last token of every row."""
        cached = self.cache.inputs(self.device)
        token, position = self._to_device(np.stack([self.rows.token, self.rows.position]))
        with attending(self.lm, self.cache.attention):
            return self.engine._forward(token[:, None], position[:, None], **cached)

    def _record(self, logits: torch.Tensor, first: int) -> None:
        """Draws a token for the rows from `first` on and lets finished rows go."""
        sample, age = self.rows.sample[first:], self.rows.age[first:].copy()
        uniform = self._to_device(uniforms(self.seeds[sample], age))
        drawn, logprob = draw(logits, uniform, self.sampling)
        token, logprobs = drawn.cpu().numpy(), logprob.cpu().numpy()
        if np.isnan(logprobs).any():
            raise FloatingPointError(
                f"the policy's logits are NaN or infinite (version {self.engine.version}): "
                "its weights have diverged or its dtype overflows"
            )
        self.tokens[sample, age], self.logprobs[sample, age] = token, logprobs
        self.lengths[sample] = age + 1
        self.rows.advance(first, token)
        stopped = np.isin(token, self.ends)
        stopped |= self.stops.completed([self.tokens[s, : a + 1] for s, a in zip(sample, age, strict=True)])
        self.stopped[sample] = stopped
        alive = np.ones(len(self.rows), dtype=bool)
        alive[first:] = ~stopped & (age + 1 < self.sampling.max_completion_length)
        if not alive.all():
            order = fill_holes(alive)
            self.cache.keep(order)
            self.rows.keep(order)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _completions(self) -> list[tuple[Completion, ...]]:
        tokens = [row[:length] for row, length in zip(self.tokens, self.lengths, strict=True)]
        texts = self.engine.tokenizer.batch_decode([row.tolist() for row in tokens], skip_special_tokens=True)
        completions = [
            Completion(
                token_ids=row.copy(),
                logprobs=self.logprobs[i, : len(row)].copy(),
                finish_reason="stop" if self.stopped[i] else "length",
                policy_version=self.engine.version,
                text=texts[i],
            )
            for i, row in enumerate(tokens)
        ]
        group = self.sampling.num_generations
        return [tuple(completions[b : b + group]) for b in range(0, len(completions), group)]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout; gradient checkpointing would switch the cache off), then each module's own again."""
    modes = [(module, module.training) for module in model.modules()]
    # Weights that autocast casts without a gradient must not be found in its cache by a later forward with one.
    torch.clear_autocast_cache()
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        torch.clear_autocast_cache()
