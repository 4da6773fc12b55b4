"""The decoding loop of one generation: rows join, get a token each, and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from app.engines.ahead import Groups
from app.engines.base import Completed, Sampling, end_token_ids, limits_of, nonfinite_policy
from app.engines.transformers.cache_layers import StaticLayer, WrittenLayer
from app.engines.transformers.kv_cache import GrowingCache, PrefilledCache, RowCache
from app.engines.transformers.sampler import draw, uniforms
from app.engines.transformers.schedule import DecodingRows, PromptRows, fill_holes, prefill_queue, take_bucket
from app.engines.transformers.shared_cache import SharedContextCache
from app.engines.transformers.step_graphs import StepGraphs, StepShape, capture_on
from app.policy.adapters import causal_lm
from app.policy.model import plain_attention
from app.policy.modes import attending
from datamodules.types import Completion, Prompt

if TYPE_CHECKING:  # the engine makes generations
    from app.engines.transformers.engine import Transformers

CPU_CACHE_TOKENS = 262_144
"""Tokens in the key-value cache on a CPU, whose free memory others may take."""

FREE_MEMORY_SHARE = 0.6
"""Share of a GPU's free memory for keys and values; logits, prefills and CUDA graphs take from the rest."""


class Generation:
    """The state of one `generate` call.

    Args:
        engine: its options, policy and tokenizer.
        prompts: `B` prompts.
        sampling: `G` and the sampling distribution.
        seeds: int64 `[B, G]`.
        limits: int64 `[B, G]`: maximum number of tokens of each completion.
        begun: completions of each prompt that begin at once; None for all `G`.
        longest: maximum number of tokens of what is prefilled later; None if nothing is.
    """

    def __init__(
        self,
        engine: Transformers,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: np.ndarray,
        limits: np.ndarray,
        begun: int | None = None,
        longest: int | None = None,
    ) -> None:
        self.engine, self.sampling, self.device = engine, sampling, engine.model.device
        self.prompts, self.group = prompts, sampling.num_generations
        self.begun = self.group if begun is None else begun
        self.lm = causal_lm(engine.model)
        columns = (longest or max(len(prompt.token_ids) for prompt in prompts)) + sampling.max_completion_length
        tokens = engine.max_cache_tokens or tokens_that_fit(self.lm)
        self.max_rows = min(engine.max_rows, seeds.size, max(1, tokens // columns))
        self.waiting = prefill_queue([one.token_ids for one in prompts], self.group, self.max_rows, range(self.begun))
        self.cache: RowCache = GrowingCache()
        self.graphs: StepGraphs | None = None
        if engine.share_prompts and plain_attention(self.lm):
            capture = capture_on(self.device, engine.model) if engine.cuda_graphs else None
            if capture is not None:
                self.graphs = StepGraphs(self._static_step, capture, self.device, self.max_rows)
            layers = len(DynamicCache(config=self.lm.config).layers)
            # The rest of a group takes the place of its pilot, and a turn that of the one before.
            rest = min(self.group - self.begun, self.max_rows)
            alone = rest == 0 and longest is None
            max_contexts = min(len(self.waiting) if alone else seeds.size, self.max_rows)
            self.cache = SharedContextCache(
                layers, self.max_rows, max_contexts, sampling.max_completion_length,
                rows_per_context=max(rest, *(len(one.samples) for one in self.waiting), 1),
                layer=WrittenLayer if self.graphs is None else StaticLayer,
                # A GPU's buffers stay where they are: its graphs name them, and its memory is not to be fragmented.
                longest=None if self.device.type == "cpu" and self.graphs is None else longest,
            )  # fmt: skip
        self.rows = DecodingRows()
        self.ends = end_token_ids(engine.model, engine.tokenizer)
        self.stop_strings = [string for string in sampling.stop if string]
        # A token adds at least one byte, and some extra tokens keep the string clear of the tail's ragged start.
        self.stop_tail = max((len(string.encode()) for string in self.stop_strings), default=0) + 8
        self.seeds, self.limits = seeds.reshape(-1), limits.reshape(-1)
        self.tokens = np.zeros((seeds.size, sampling.max_completion_length), dtype=np.int32)
        self.logprobs = np.zeros((seeds.size, sampling.max_completion_length), dtype=np.float32)
        self.lengths = np.zeros(seeds.size, dtype=np.int64)
        self.stopped = np.zeros(seeds.size, dtype=bool)

    def run(self) -> None:
        """Generate until nothing is left."""
        while self.waiting or len(self.rows) or self.expects_more:
            self.queue_more()
            self.admit()
            if len(self.rows):
                self.sample(self._step(), first=0)
        if self.graphs is not None and self.graphs.failed:
            self.engine.cuda_graphs = False

    @property
    def expects_more(self) -> bool:
        """Whether `queue_more` will queue something though nothing is waiting or being decoded."""
        return False

    def queue_more(self) -> None:
        """Queue what can begin since the last token."""

    def leave(self, rows: np.ndarray) -> None:
        """Take leave of rows (int64 positions among `self.rows`) whose completions have ended, still in the cache."""

    @property
    def free_rows(self) -> int:
        """Number of rows that can begin."""
        return self.max_rows - len(self.rows)

    def admit(self) -> None:
        """Prefill waiting prompts if many rows are free (joining interrupts decoding) or no row is left."""
        if len(self.rows) and not (self.cache.can_join and self.free_rows >= self.max_rows // 8):
            return
        while bucket := take_bucket(self.waiting, self.free_rows, self.engine.prefill_tokens):
            self.begin_rows(bucket, *self.prefill(bucket))
            if not self.cache.can_join and len(self.rows):
                return

    def prefill(self, bucket: Sequence[PromptRows]) -> tuple[torch.Tensor, PrefilledCache]:
        """Read each prompt once and return the logits `[n, V]` of the token after it, and its keys and values."""
        lengths = np.array([len(prompt.token_ids) for prompt in bucket])
        padded = np.zeros((len(bucket), lengths.max()), dtype=np.int64)
        for row, prompt in enumerate(bucket):
            padded[row, -len(prompt.token_ids) :] = prompt.token_ids
        positions = np.arange(lengths.max()) - (lengths.max() - lengths)[:, None]
        mask = self.to_device((positions >= 0).astype(np.int64)) if (lengths != lengths.max()).any() else None
        prefilled = PrefilledCache(config=self.lm.config)
        position_ids = self.to_device(positions.clip(min=0))
        tokens = self.to_device(padded)
        return self.engine.forward(tokens, position_ids, attention_mask=mask, past_key_values=prefilled), prefilled

    def begin_rows(self, bucket: Sequence[PromptRows], logits: torch.Tensor, prefilled: PrefilledCache) -> None:
        """Admit the samples of prompts that have been read, and draw the first token of each."""
        lengths = np.array([len(prompt.token_ids) for prompt in bucket])
        source = np.repeat(np.arange(len(bucket)), [len(prompt.samples) for prompt in bucket])
        self.cache.admit(prefilled, source, lengths[source])
        self.begin(
            np.concatenate([prompt.samples for prompt in bucket]), lengths[source], logits[self.to_device(source)]
        )

    def begin(self, samples: np.ndarray, lengths: np.ndarray, logits: torch.Tensor) -> None:
        """Draw the first token of samples whose contexts of `lengths` tokens have been read, with `logits` `[n, V]`."""
        first = len(self.rows)
        self.rows.add(samples, lengths)
        self.sample(logits, first)

    def _step(self) -> torch.Tensor:
        """Return the logits `[rows, V]` of the next token of all rows."""
        if self.graphs is not None and isinstance(self.cache, SharedContextCache):
            shape, numbers = self.cache.static_numbers(self.rows.token, self.rows.position)
            return self.graphs(shape, numbers)[: len(self.rows)]
        cached = self.cache.inputs(self.device)
        token, position = self.to_device(np.stack([self.rows.token, self.rows.position]))
        with attending(self.lm, self.cache.attention):
            return self.engine.forward(token[:, None], position[:, None], **cached)

    def _static_step(self, shape: StepShape, numbers: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.cache, SharedContextCache)
        with attending(self.lm, self.cache.attention):
            return self.engine.forward(**self.cache.static_inputs(shape, numbers))

    def sample(self, logits: torch.Tensor, first: int) -> None:
        """Draw a token for all rows from `first` to the last, and remove finished rows."""
        sample, age = self.rows.sample[first:], self.rows.age[first:].copy()
        uniform = self.to_device(uniforms(self.seeds[sample], age))
        drawn, logprob = draw(logits, uniform, self.sampling)
        token, logprobs = drawn.cpu().numpy(), logprob.cpu().numpy()
        if np.isnan(logprobs).any():
            raise nonfinite_policy(self.engine.version)
        self.tokens[sample, age], self.logprobs[sample, age] = token, logprobs
        self.lengths[sample] = age + 1
        self.rows.advance(first, token)
        stopped = np.isin(token, self.ends)
        if self.stop_strings:
            spans = zip(sample, age + 1, strict=True)
            tails = [self.tokens[s, max(0, end - self.stop_tail) : end].tolist() for s, end in spans]
            texts = self.engine.tokenizer.batch_decode(tails)
            stopped |= np.array([any(string in text for string in self.stop_strings) for text in texts], dtype=bool)
        self.stopped[sample] = stopped
        alive = np.ones(len(self.rows), dtype=bool)
        alive[first:] = ~stopped & (age + 1 < self.limits[sample])
        if not alive.all():
            self.leave(np.flatnonzero(~alive))
            order = fill_holes(alive)
            self.cache.keep(order)
            self.rows.keep(order)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """Return an array as a tensor on the policy's device."""
        return torch.from_numpy(array).to(self.device)

    def groups(self) -> Groups:
        """Return the completions of each prompt."""
        of_group = np.arange(self.group)
        return [
            self.completions(b * self.group + of_group[self.lengths[b * self.group + of_group] > 0])
            for b in range(len(self.prompts))
        ]

    def completions(self, samples: np.ndarray) -> tuple[Completion, ...]:
        """Return the completions of some samples, int64 `[n]`."""
        tokens = [self.tokens[one, : self.lengths[one]] for one in samples]
        texts = self.engine.tokenizer.batch_decode([row.tolist() for row in tokens], skip_special_tokens=True)
        return tuple(
            Completion(
                token_ids=row.copy(),
                logprobs=self.logprobs[one, : len(row)].copy(),
                finish_reason="stop" if self.stopped[one] else "length",
                policy_version=self.engine.version,
                text=text,
            )
            for one, row, text in zip(samples, tokens, texts, strict=True)
        )


class PilotGeneration(Generation):
    """A generation whose groups are completed only where their first completions say so.

    Args:
        engine, prompts, sampling, seeds: as for `Generation`.
        pilot: completions of every prompt that are generated first.
        completed: see `RolloutEngine.generate_with_pilots`.
    """

    def __init__(
        self,
        engine: Transformers,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: np.ndarray,
        pilot: int,
        completed: Completed,
    ) -> None:
        super().__init__(engine, prompts, sampling, seeds, limits_of(sampling, seeds, None), begun=pilot)
        self.completed = completed
        self.open = np.full(len(prompts), pilot)
        """int64 `[B]`: completions of each prompt's pilot that have not ended; -1 where it has been judged."""

    @property
    def expects_more(self) -> bool:
        return bool((self.open == 0).any())

    def leave(self, rows: np.ndarray) -> None:
        np.subtract.at(self.open, self.rows.sample[rows] // self.group, 1)

    def queue_more(self) -> None:
        """Queue the rest of those groups that are to be completed, of the pilots that have ended since the last time.

        An eighth of them at a time, because scoring interrupts decoding.
        """
        ended = np.flatnonzero(self.open == 0)
        if not len(ended) or (len(self.rows) and 8 * len(ended) < len(self.prompts)):
            return
        self.open[ended] = -1
        chosen = self.completed({int(b): self.completions(b * self.group + np.arange(self.begun)) for b in ended})
        rest = [
            PromptRows(
                self.prompts[b].token_ids, b * self.group + np.arange(first, min(first + self.max_rows, self.group))
            )
            for b in chosen
            for first in range(self.begun, self.group, self.max_rows)
        ]
        self.waiting = deque(sorted((*rest, *self.waiting), key=lambda one: len(one.token_ids), reverse=True))


def tokens_that_fit(lm: PreTrainedModel) -> int:
    """Return the number of tokens whose keys and values may be kept while decoding with a model."""
    if lm.device.type != "cuda":
        return CPU_CACHE_TOKENS
    free, _ = torch.cuda.mem_get_info(lm.device)
    free += torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
    return max(1, int(free * FREE_MEMORY_SHARE) // cached_bytes(lm))


def cached_bytes(lm: PreTrainedModel) -> int:
    """Return the bytes of one token's keys and values in all layers, in the dtype of the computation."""
    config = lm.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = lm.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lm.dtype
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * dtype.itemsize
