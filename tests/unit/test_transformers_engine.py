"""The engine with tiny random models, compared with plain forwards without a cache."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from app.engines import Sampling, Transformers
from app.engines.transformers import shared_cache, step_graphs
from app.engines.transformers.cache_layers import WrittenLayer
from app.engines.transformers.generation import cached_bytes, tokens_that_fit
from app.engines.transformers.kv_cache import GrowingCache, PrefilledCache, RowCache
from app.engines.transformers.schedule import fill_holes, prefill_queue, take_bucket
from app.engines.transformers.shared_cache import SharedContextCache
from app.policy.fused_layers import fuse_layers
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt
from tests.support.recorded_step import Recorder
from tests.support.tables import few

V, EOS, G = 53, 1, 4
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "bos_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": EOS}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "lora":
        adapted: Any = get_peft_model(_random("qwen2"), LoraConfig(r=4, target_modules="all-linear"))
        return adapted.eval()
    return _random(name).eval()


def _random(name: str) -> PreTrainedModel:
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=256, bos_token_id=None, eos_token_id=EOS
            )
        )
    if name == "sliding":
        return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=8))
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS))


def tokenizer() -> PreTrainedTokenizerFast:
    letters = {"<pad>": 0, "<eos>": EOS} | {chr(63 + i): i for i in range(2, V)}
    backend = Tokenizer(WordLevel(letters, unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def prompts(lengths: list[int]) -> list[Prompt]:
    ids = [tuple(np.random.default_rng(n).integers(2, V, length).tolist()) for n, length in enumerate(lengths)]
    return [Prompt(f"p{n}", n, "", "", token_ids, {}) for n, token_ids in enumerate(ids)]


def engine(model: PreTrainedModel, **options: int) -> Transformers:
    made = Transformers(**options)
    made.setup(model, tokenizer())
    return made


LENGTHS = [3, 17, 9, 30, 3]
SEEDS = np.arange(len(LENGTHS) * G).reshape(-1, G)


def assert_same(left: tuple[Completion, ...], right: tuple[Completion, ...]) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        assert (a.finish_reason, a.text) == (b.finish_reason, b.text)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "sliding"])
@pytest.mark.parametrize("options", [{}, {"max_rows": 6}, {"max_rows": 3, "prefill_tokens": 20}])
def test_logprobs_are_those_of_a_plain_forward(name: str, options: dict[str, int]) -> None:
    model, batch = build(name), prompts(LENGTHS)
    sampling = Sampling(num_generations=G, max_completion_length=40, temperature=0.9)
    for prompt, group in zip(batch, engine(model, **options).generate(batch, sampling, SEEDS), strict=True):
        for completion in group:
            T = len(completion.token_ids)
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
            with torch.no_grad():
                expected = (model(ids).logits[0, -T - 1 : -1] / 0.9).log_softmax(-1).gather(1, ids[0, -T:, None])[:, 0]
            np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=2e-5)
            ended = completion.token_ids[-1] == EOS
            assert EOS not in completion.token_ids[:-1]
            assert completion.finish_reason == ("stop" if ended else "length")
            assert ended or T == 40


@pytest.mark.parametrize("name", ["qwen2", "sliding"])
@pytest.mark.parametrize("sampling", [Sampling(G, 40), Sampling(G, 40, temperature=1.2, top_p=0.9, top_k=20)])
def test_draws_do_not_depend_on_batch_order_or_neighbours(name: str, sampling: Sampling) -> None:
    model, batch = build(name), prompts(LENGTHS)
    together = engine(model).generate(batch, sampling, SEEDS)
    assert len({len(c.token_ids) for group in together for c in group}) > 5  # rows did leave at different times
    for max_rows in (5, 9):
        for left, right in zip(
            together, engine(model, max_rows=max_rows).generate(batch, sampling, SEEDS), strict=True
        ):
            assert_same(left, right)
    order = [4, 0, 2, 1, 3]
    shuffled = engine(model).generate([batch[i] for i in order], sampling, SEEDS[order])
    alone = [engine(model).generate([p], sampling, SEEDS[i : i + 1])[0] for i, p in enumerate(batch)]
    for i, group in zip(order, shuffled, strict=True):
        assert_same(together[i], group)
        assert_same(together[i], alone[i])


def test_the_models_own_attention_draws_the_same() -> None:
    model, batch, sampling = build("qwen2"), prompts(LENGTHS), Sampling(G, 40)
    shared = engine(model, max_rows=9).generate(batch, sampling, SEEDS)
    own = engine(model, max_rows=9, share_prompts=False).generate(batch, sampling, SEEDS)
    for left, right in zip(shared, own, strict=True):
        assert_same(left, right)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "options", "mixed"),
    few(
        [("qwen2", {"max_rows": 9}, False), ("qwen2", {}, True), ("llama", {"max_rows": 3}, False),
         ("gpt2", {}, False), ("qwen2", {"max_rows": 9}, True)], 2,
    ),
)  # fmt: skip
def test_steps_that_are_replayed_draw_the_same(
    name: str, options: dict[str, int], mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded step repeats what the host computed, so all that changes must come from its input tensor."""
    model, batch, sampling = build(name), prompts(LENGTHS), Sampling(G, 70)
    fuse_layers(model)
    recorder = Recorder()
    monkeypatch.setattr(step_graphs, "COLUMNS", 16)
    monkeypatch.setattr(shared_cache, "SLACK", 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        usual = engine(model, **options).generate(batch, sampling, SEEDS)
        monkeypatch.setattr("app.engines.transformers.generation.capture_on", lambda *_: recorder)
        replayed = engine(model, **options).generate(batch, sampling, SEEDS)
        kept = recorder.captured
        off = engine(model, **options, cuda_graphs=False).generate(batch, sampling, SEEDS)
        assert recorder.captured == kept
    assert recorder.captured > 3 and recorder.replayed > 40
    assert len({len(one.token_ids) for group in usual for one in group}) > 5  # rows left at different times
    alike = 0
    for left, right, plain in zip(usual, replayed, off, strict=True):
        for a, b, c in zip(left, right, plain, strict=True):
            same = a.token_ids.tolist() == b.token_ids.tolist()
            assert same or mixed  # half precision may round another sum across a draw
            if same:
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.05 if mixed else 1e-5)
            np.testing.assert_array_equal(a.token_ids, c.token_ids)
            np.testing.assert_array_equal(a.logprobs, c.logprobs)
            alike += same
    assert alike >= 0.9 * SEEDS.size


def test_a_step_that_cannot_be_recorded_is_decoded_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch, sampling = engine(build("qwen2")), prompts(LENGTHS), Sampling(G, 40)
    usual = made.generate(batch, sampling, SEEDS)

    def refuse(step: step_graphs.Step) -> step_graphs.Step:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("app.engines.transformers.generation.capture_on", lambda *_: refuse)
    with pytest.warns(UserWarning, match=r"without CUDA graphs from now on.*is capturing\)\. To") as warned:
        found = made.generate(batch, sampling, SEEDS)
    assert len(warned) == 1 and made.cuda_graphs is False
    for left, right in zip(usual, found, strict=True):
        assert_same(left, right)


def test_a_cpu_and_a_sharded_policy_record_nothing() -> None:
    model = build("qwen2")
    assert step_graphs.capture_on(torch.device("cpu"), model) is None
    sharded = torch.nn.Sequential(torch.nn.Linear(1, 1))
    sharded[0].__class__ = type("Sharded", (FSDPModule, torch.nn.Linear), {})
    assert step_graphs.capture_on(torch.device("cuda"), sharded) is None


@pytest.mark.parametrize(("name", "heads"), [("qwen2", 2), ("gpt2", 2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_follow_the_free_memory_of_a_gpu(
    name: str, heads: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), torch.no_grad():
        cache = PrefilledCache(config=model.config)
        model(torch.arange(2, 9)[None], use_cache=True, past_key_values=cache)
        assert {layer.values.dtype for layer in cache.layers} == {torch.bfloat16 if mixed else torch.float32}
        assert cached_bytes(model) == 2 * sum(layer.values.nbytes for layer in cache.layers) / 7
    assert tokens_that_fit(model) == 262_144
    gpu: Any = SimpleNamespace(device=torch.device("cuda", 1), config=model.config, dtype=torch.bfloat16)
    # 10 MB free on the device, and 3 of 4 MB that torch holds.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**7, 8 * 10**7) if device == gpu.device else None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * 10**6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**6)
    # Two layers, keys and values, heads of 16 (GPT-2) or 8, two bytes: 0.6 * 13 MB of them.
    assert tokens_that_fit(gpu) == int(0.6 * 13e6) // (2 * 2 * heads * (16 if name == "gpt2" else 8) * 2)


def test_greedy_agrees_with_model_generate() -> None:
    model = build("qwen2")
    for prompt in prompts(LENGTHS):
        greedy = Sampling(1, 40, temperature=0)
        [[completion]] = engine(model).generate([prompt], greedy, np.zeros((1, 1), dtype=np.int64))
        ids = torch.tensor([prompt.token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0
        )
        assert completion.token_ids.tolist() == expected[0, len(prompt.token_ids) :].tolist()
        assert (completion.logprobs == 0).all()


def test_stop_strings_cut_at_the_token_that_completes_them() -> None:
    model, batch = build("qwen2"), prompts(LENGTHS)
    free = engine(model).generate(batch, Sampling(G, 60), SEEDS)
    text = free[3][0].text
    stop = text[5:7]
    stopped = engine(model).generate(batch, Sampling(G, 60, stop=[stop, "~none~"]), SEEDS)
    for whole, cut in zip([c for g in free for c in g], [c for g in stopped for c in g], strict=True):
        if stop in whole.text:
            assert cut.text == whole.text[: whole.text.index(stop) + 2]
            assert cut.finish_reason == "stop"
        else:
            assert cut.text == whole.text


def test_end_tokens_of_the_model_and_of_the_tokenizer_both_end() -> None:
    model, batch = build("qwen2"), prompts(LENGTHS)
    model.generation_config.eos_token_id = [5, 6]
    groups = engine(model).generate(batch, Sampling(G, 80), SEEDS)
    last = {int(c.token_ids[-1]) for group in groups for c in group if c.finish_reason == "stop"}
    assert last == {EOS, 5, 6}


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model, batch = build("qwen2"), prompts([4, 6])
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    made = engine(model)
    made.push(iter(()), version=7)
    groups = made.generate(batch, Sampling(2, 8), np.arange(4).reshape(2, 2))
    assert {c.policy_version for group in groups for c in group} == {7}
    assert [module.training for module in model.modules()] == before
    model(torch.tensor([batch[0].token_ids])).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_bfloat16_logprobs_are_float32_and_normalised() -> None:
    model, batch = build("qwen2").bfloat16(), prompts([4, 6])
    groups = engine(model).generate(batch, Sampling(2, 1), np.arange(4).reshape(2, 2))
    logits = model(torch.tensor([batch[0].token_ids])).logits[0, -1].float().detach()
    for completion in groups[0]:
        assert completion.logprobs.dtype == np.float32
        assert completion.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[completion.token_ids[0]]), abs=0.02)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "sliding", "lora"])
def test_mixed_precision_casts_weights_once_and_records_what_the_policy_computes(
    name: str, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(name), prompts(LENGTHS)
    if name in ("qwen2", "llama"):
        fuse_layers(model)
    made, sampling = engine(model, max_rows=9, share_prompts=share), Sampling(G, 12)
    caches: list[RowCache] = []
    admit = SharedContextCache.admit
    monkeypatch.setattr(SharedContextCache, "admit", lambda cache, *given: (caches.append(cache), admit(cache, *given)))
    grown: set[torch.dtype] = set()

    class NotedCache(GrowingCache):
        def keep(self, order: np.ndarray) -> None:
            super().keep(order)
            grown.update(one.dtype for layer in self.past.layers for one in (layer.keys, layer.values))

    monkeypatch.setattr("app.engines.transformers.generation.GrowingCache", NotedCache)

    def errors() -> list[float]:
        """Return how far recorded log-probabilities are from those of a forward pass without a cache."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            groups = made.generate(batch, sampling, SEEDS)
            assert not torch.is_autocast_cache_enabled()
            apart = []
            for prompt, completion in [(p, c) for p, group in zip(batch, groups, strict=True) for c in group]:
                T = len(completion.token_ids)
                ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
                with torch.no_grad():
                    logits = model(ids).logits[0, -T - 1 : -1].float()
                expected = logits.log_softmax(-1).gather(1, ids[0, -T:, None])[:, 0]
                apart += np.abs(completion.logprobs - expected.numpy()).tolist()
        return apart

    assert max(errors()) < 0.02
    for cache in caches:
        assert isinstance(cache, SharedContextCache)
        buffers = [one for layer in [*cache.written, *cache.contexts] for one in (layer.keys, layer.values)]
        assert {one.dtype for one in buffers if one is not None} == {torch.bfloat16}
    assert bool(caches) == (share and name != "sliding")
    assert grown == (set() if caches else {torch.bfloat16})
    with torch.no_grad():  # an update: no weight of before may be left
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert max(errors()) < 0.02


class Casts(TorchDispatchMode):
    """Counts casts of float32 tensors to another type by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_to_copy" and args[0].dtype == torch.float32:
            self.found[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_weights_are_cast_once_per_generation(adapters: bool, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engines.transformers.generation.end_token_ids", lambda *_: np.zeros(0, dtype=np.int64))
    model = build("lora" if adapters else "qwen2")
    needed = [one.requires_grad for one in model.parameters()]
    weights = {tuple(one.shape) for one in model.parameters()}

    def casts(tokens: int) -> Counter[tuple[int, ...]]:
        made = engine(model, share_prompts=share)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Casts() as counted:
            made.generate(prompts(LENGTHS)[:2], Sampling(G, tokens), SEEDS[:2])
        return counted.found

    fewer, more = casts(5), casts(7)
    assert any(fewer[shape] for shape in weights)  # they are seen here
    assert not [shape for shape in weights if more[shape] != fewer[shape]]
    assert [one.requires_grad for one in model.parameters()] == needed


def test_user_errors_and_empty_input() -> None:
    made = engine(build("qwen2"))
    assert made.generate([], Sampling(2), np.zeros((0, 2), dtype=np.int64)) == []
    with pytest.raises(UserError, match=r"'p0' has 100 tokens.*157.*256"):
        made.generate(prompts([100]), Sampling(1, 157), np.zeros((1, 1), dtype=np.int64))
    with pytest.raises(UserError, match="no tokens"):
        made.generate(prompts([0]), Sampling(1, 5), np.zeros((1, 1), dtype=np.int64))
    with pytest.raises(UserError, match="max_rows is 0"):
        Transformers(max_rows=0)


def test_diverged_policy_is_named() -> None:
    model = build("qwen2")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        engine(model).generate(prompts([4]), Sampling(1, 5), np.zeros((1, 1), dtype=np.int64))


def test_schedule_by_hand() -> None:
    waiting = prefill_queue([(1,), (1, 2, 3, 4), (1, 2, 3)], num_generations=3, max_rows=2)
    assert [(len(w.token_ids), w.samples.tolist()) for w in waiting] == [
        (4, [3, 4]), (4, [5]), (3, [6, 7]), (3, [8]), (1, [0, 1]), (1, [2]),
    ]  # fmt: skip
    assert [len(w.token_ids) for w in take_bucket(waiting, free_rows=100, prefill_tokens=12)] == [4, 4, 3]
    assert [len(w.token_ids) for w in take_bucket(waiting, free_rows=100, prefill_tokens=100)] == [3]
    assert take_bucket(waiting, free_rows=1, prefill_tokens=100) == []
    assert fill_holes(np.array([True, False, True, False, True, True])).tolist() == [0, 4, 2, 5]


def test_rows_that_join_for_long_move_the_cache_window_and_keep_their_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rewinds = []
    rewind = WrittenLayer.rewind
    monkeypatch.setattr(WrittenLayer, "rewind", lambda layer: (rewinds.append(layer.first), rewind(layer)))
    model, batch = build("qwen2"), prompts([6] * 40)
    seeds = np.arange(40).reshape(40, 1)
    joined = engine(model, max_rows=3).generate(batch, Sampling(1, 30), seeds)
    assert len(rewinds) > 0
    assert min(rewinds) >= 64
    for left, right in zip(joined, engine(model).generate(batch, Sampling(1, 30), seeds), strict=True):
        assert_same(left, right)
