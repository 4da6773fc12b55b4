"""Rollouts with the policy itself, in the trainer's process: any Hugging Face causal LM, without copying weights."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from app.engines.ahead import Groups
from app.engines.base import (
    Completed,
    RolloutEngine,
    Sampling,
    check_counts,
    check_request,
    end_token_ids,
    limits_of,
    nonfinite_policy,
)
from app.engines.transformers.kv_cache import GrowingCache, PrefilledCache, RowCache
from app.engines.transformers.sampler import draw, uniforms
from app.engines.transformers.schedule import DecodingRows, PromptRows, fill_holes, prefill_queue, take_bucket
from app.engines.transformers.shared_cache import SharedPromptCache, StaticLayer, WrittenLayer
from app.engines.transformers.step_graphs import StepGraphs, StepShape, capture_on
from app.policy.adapters import causal_lm
from app.policy.fused_layers import holding_weights
from app.policy.model import plain_attention
from app.policy.modes import attending, evaluating
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt

CPU_CACHE_TOKENS = 262_144
"""Tokens in the key-value cache on a CPU, whose free memory others may take."""

FREE_MEMORY_SHARE = 0.6
"""Share of a GPU's free memory for keys and values; logits, prefills and CUDA graphs take from the rest."""


class Transformers(RolloutEngine):
    """Generates with the policy's own module, so `push` has nothing to copy.

    If all layers of the policy attend to the whole context, each prompt is prefilled once, and its keys and values are
    stored and read once for all its completions. Finished rows leave the batch immediately, and waiting prompts take
    their place.

    Args:
        max_rows: maximum number of completions decoded together.
        max_cache_tokens: limit on rows x (longest prompt + max_completion_length), and so on the memory of the
            key-value cache; fewer rows are decoded together if they would exceed it. null for what fits in the free
            memory of a GPU, and 262,144 on a CPU.
        prefill_tokens: prompt tokens (including padding) in one forward pass.
        share_prompts: false decodes with the model's own attention and cache, which copies the prompt to every row;
            for policies whose attention needs something that `decode_attention` does not support.
        cuda_graphs: on a GPU, whether the kernels of a token are recorded as CUDA graphs, which are launched together.
            Needs `share_prompts`; sharded policies are decoded without.
    """

    uses_policy = True

    def __init__(
        self,
        max_rows: int = 256,
        max_cache_tokens: int | None = None,
        prefill_tokens: int = 16_384,
        share_prompts: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        self.max_rows, self.max_cache_tokens, self.prefill_tokens = max_rows, max_cache_tokens, prefill_tokens
        self.share_prompts, self.cuda_graphs = share_prompts, cuda_graphs
        check_counts("engine", self, "max_rows", "max_cache_tokens", "prefill_tokens")
        self.version = 0

    def prepare(self) -> None:
        lm = causal_lm(self.model)
        accepted = inspect.signature(lm.forward).parameters
        if "past_key_values" not in accepted:
            raise UserError(
                f"{type(lm).__name__} has no key-value cache (its forward does not accept past_key_values), but "
                "engines.Transformers needs one. Choose another policy or engine."
            )
        self._accepts_positions = "position_ids" in accepted
        self._accepts_logits_to_keep = "logits_to_keep" in accepted

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """Record the version; the weights are the policy's own."""
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Groups:
        return self._run(prompts, sampling, seeds, limits, None)

    def generate_with_pilots(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, pilot: int, completed: Completed
    ) -> Groups:
        """See `RolloutEngine.generate_with_pilots`. The rest of a group is decoded beside the pilots of others."""
        return self._run(prompts, sampling, seeds, None, (pilot, completed))

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: np.ndarray,
        limits: np.ndarray | None,
        pilots: tuple[int, Completed] | None,
    ) -> Groups:
        if len(prompts) == 0:
            return []
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        check_request(prompts, sampling, seeds, limit, f"the model's {limit} positions", limits)
        with _generating(self.model):
            return _Generation(self, prompts, sampling, seeds, limits_of(sampling, seeds, limits), pilots).run()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **cached: object) -> torch.Tensor:
        """Return the logits `[n, V]` at the last position of `[n, T]` tokens, whose context is `cached`."""
        optional: dict[str, object] = {"position_ids": position_ids} if self._accepts_positions else {}
        optional |= {"logits_to_keep": 1} if self._accepts_logits_to_keep else {}
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=True, **cached, **optional).logits
        return logits[:, -1]


class _Generation:
    """The state of one `generate` call."""

    def __init__(
        self,
        engine: Transformers,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: np.ndarray,
        limits: np.ndarray,
        pilots: tuple[int, Completed] | None,
    ) -> None:
        self.engine, self.sampling, self.device = engine, sampling, engine.model.device
        self.prompts, self.group = prompts, sampling.num_generations
        # Without pilots, every group begins as a whole.
        self.begun = self.group if pilots is None else pilots[0]
        self.completed = None if pilots is None else pilots[1]
        self.lm = causal_lm(engine.model)
        columns = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_completion_length
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
            # The rest of a group takes the place of its pilot.
            rest = min(self.group - self.begun, self.max_rows)
            max_prompts = min(len(self.waiting) if rest == 0 else len(prompts) * self.group, self.max_rows)
            self.cache = SharedPromptCache(
                layers, self.max_rows, max_prompts, sampling.max_completion_length,
                rows_per_prompt=max(rest, *(len(one.samples) for one in self.waiting)),
                layer=WrittenLayer if self.graphs is None else StaticLayer,
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
        self.open = np.full(len(prompts), self.begun)
        """int64 `[B]`: completions of each prompt's pilot that have not ended; -1 where it has been judged."""

    def run(self) -> Groups:
        while self.waiting or len(self.rows) or (self.completed is not None and (self.open == 0).any()):
            self._judge()
            self._admit()
            if len(self.rows):
                self._sample(self._step(), first=0)
        if self.graphs is not None and self.graphs.failed:
            self.engine.cuda_graphs = False
        return self._groups()

    def _judge(self) -> None:
        """Queue the rest of those groups that are to be completed, of the pilots that have ended since the last time.

        An eighth of them at a time, because scoring interrupts decoding.
        """
        ended = np.flatnonzero(self.open == 0)
        if self.completed is None or not len(ended) or (len(self.rows) and 8 * len(ended) < len(self.prompts)):
            return
        self.open[ended] = -1
        chosen = self.completed({int(b): self._completions(b * self.group + np.arange(self.begun)) for b in ended})
        rest = [
            PromptRows(
                self.prompts[b].token_ids, b * self.group + np.arange(first, min(first + self.max_rows, self.group))
            )
            for b in chosen
            for first in range(self.begun, self.group, self.max_rows)
        ]
        self.waiting = deque(sorted((*rest, *self.waiting), key=lambda one: len(one.token_ids), reverse=True))

    def _step(self) -> torch.Tensor:
        """Return the logits `[rows, V]` of the next token of all rows."""
        if self.graphs is not None and isinstance(self.cache, SharedPromptCache):
            shape, numbers = self.cache.static_numbers(self.rows.token, self.rows.position)
            return self.graphs(shape, numbers)[: len(self.rows)]
        cached = self.cache.inputs(self.device)
        token, position = self._to_device(np.stack([self.rows.token, self.rows.position]))
        with attending(self.lm, self.cache.attention):
            return self.engine.forward(token[:, None], position[:, None], **cached)

    def _static_step(self, shape: StepShape, numbers: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.cache, SharedPromptCache)
        with attending(self.lm, self.cache.attention):
            return self.engine.forward(**self.cache.static_inputs(shape, numbers))

    def _admit(self) -> None:
        """Prefill waiting prompts if many rows are free (joining interrupts decoding) or no row is left."""
        free = self.max_rows - len(self.rows)
        if len(self.rows) and not (self.cache.can_join and free >= self.max_rows // 8):
            return
        while bucket := take_bucket(self.waiting, self.max_rows - len(self.rows), self.engine.prefill_tokens):
            first = len(self.rows)
            self._sample(self._prefill(bucket), first)
            if not self.cache.can_join and len(self.rows):
                return

    def _prefill(self, bucket: list[PromptRows]) -> torch.Tensor:
        """Read each prompt once and return the logits `[samples, V]` of every sample's first token."""
        lengths = np.array([len(prompt.token_ids) for prompt in bucket])
        padded = np.zeros((len(bucket), lengths.max()), dtype=np.int64)
        for row, prompt in enumerate(bucket):
            padded[row, -len(prompt.token_ids) :] = prompt.token_ids
        positions = np.arange(lengths.max()) - (lengths.max() - lengths)[:, None]
        mask = self._to_device((positions >= 0).astype(np.int64)) if (lengths != lengths.max()).any() else None
        prefilled = PrefilledCache(config=self.lm.config)
        position_ids = self._to_device(positions.clip(min=0))
        tokens = self._to_device(padded)
        logits = self.engine.forward(tokens, position_ids, attention_mask=mask, past_key_values=prefilled)
        source = np.repeat(np.arange(len(bucket)), [len(prompt.samples) for prompt in bucket])
        self.cache.admit(prefilled, source, lengths[source])
        self.rows.add(np.concatenate([prompt.samples for prompt in bucket]), lengths[source])
        return logits[self._to_device(source)]

    def _sample(self, logits: torch.Tensor, first: int) -> None:
        """Draw a token for all rows from `first` to the last, and remove finished rows."""
        sample, age = self.rows.sample[first:], self.rows.age[first:].copy()
        uniform = self._to_device(uniforms(self.seeds[sample], age))
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
            np.subtract.at(self.open, self.rows.sample[~alive] // self.group, 1)
            order = fill_holes(alive)
            self.cache.keep(order)
            self.rows.keep(order)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _groups(self) -> Groups:
        of_group = np.arange(self.group)
        return [
            self._completions(b * self.group + of_group[self.lengths[b * self.group + of_group] > 0])
            for b in range(len(self.prompts))
        ]

    def _completions(self, samples: np.ndarray) -> tuple[Completion, ...]:
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


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Switch to evaluation mode, without gradients; under autocast each weight is cast once and not for every token."""
    # Not inference_mode: tensors that a model caches during generation (rotary tables) must work with autograd.
    # Autocast caches weights cast without gradient; a later forward with gradient must not find them.
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    # It caches only what requires a gradient, which frozen weights under adapters don't.
    autocast = torch.is_autocast_enabled(model.device.type)
    frozen = [one for one in model.parameters() if autocast and not one.requires_grad and one.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with torch.no_grad(), evaluating(model), holding_weights(causal_lm(model)):
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()
