"""The memory formulas against the peaks of torch's allocator: the tiny policy, and SmolLM2-135M's shape."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from app.engines import Sampling, Transformers
from app.engines.transformers.shared_cache import SLACK
from app.objective.logprobs import CPU_TILE_BYTES
from app.policy.model import Policy
from app.policy.scoring import completion_logprobs
from app.reporting import memory
from app.reporting.memory import DecoderShape, MicroBatch, Precision
from datamodules.types import Prompt
from tests.support.allocations import peak_bytes
from tests.support.command import ROOT
from tests.support.policies import TINY
from tests.unit.test_memory import PRECISIONS, layout, model_of

pytestmark = pytest.mark.slow

WITHIN = 0.15
SMOLLM = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
DDP = """
import sys, torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import FileStore, init_process_group
from app.policy.model import Policy
from app.runs.lightning_internals import train_without_wrapper
from tests.support.allocations import held_bytes
init_process_group("gloo", store=FileStore(sys.argv[1]), rank=int(sys.argv[2]), world_size=2)
module, strategy = LightningModule(), DDPStrategy(parallel_devices=[torch.device("cpu")])
module.policy_model = Policy("configs/tiny_policy").load()
with torch.no_grad():
    for parameter in module.parameters():
        parameter.add_(float(sys.argv[2]))
strategy._lightning_module = strategy.model = module
train_without_wrapper(strategy)
# gloo's thread may be the last to let go of a broadcast's bytes, and the profiler does not see what it frees
held = min(held_bytes(strategy.configure_ddp) for _ in range(20))
total = sum(float(one.double().sum()) for one in module.parameters())
wrapping = DDPStrategy(parallel_devices=[torch.device("cpu")])._setup_model
wrapped = min(held_bytes(lambda: wrapping(module)) for _ in range(10))
print(held, strategy.model is module, repr(total), wrapped)
"""

SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM
from app.policy.scoring import completion_logprobs
from app.policy.sharding import Sharding
from app.reporting.memory import MicroBatch
from tests.support.allocations import peak_bytes
from tests.unit.test_memory import layout
dist.init_process_group("gloo")
dtype = torch.bfloat16 if sys.argv[2] == "bfloat16" else None
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.float32).train()
Sharding(torch.device("cpu"), 2, MixedPrecisionPolicy(dtype, torch.float32)).shard(model)
def update():
    completion_logprobs(model, layout(MicroBatch(1, 2, 20, 30, True), 1000), 1.0, with_entropy=True)[0].sum().backward()
update()
peaks = []
for _ in range(5):  # the processor is shared: where one rank falls behind, the other holds gradients until it comes
    dist.barrier()
    peaks.append(peak_bytes(update))
print(min(peaks))
"""
WIDE = LlamaConfig(
    vocab_size=1000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
"""Few tokens and wide layers: what is gathered takes most of the memory."""


def config_of(name: str) -> PreTrainedConfig:
    return SMOLLM if name == "smollm" else AutoConfig.from_pretrained(TINY)


def assert_peak(name: str, mode: str, way: str, lora: int) -> None:
    checkpointing = way == "checkpointing"
    model = model_of(config_of(name), mode, checkpointing=checkpointing, lora=lora)
    shape, numbers = DecoderShape.of(model), PRECISIONS[mode]
    prompts, completions = (1, 4) if name == "smollm" else (4, 32)
    shared = way == "shared"
    batch = MicroBatch(prompts if shared else completions, completions, 60, 100, shared, checkpointing)

    def update() -> None:
        packed = layout(batch, shape.vocabulary)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if mode == "mixed" else nullcontext():
            logprobs, _ = completion_logprobs(model, packed, 1.0, with_entropy=True)
            logprobs.sum().backward()

    update()  # from here on gradients are there
    measured = peak_bytes(update)
    found = memory.update_peak(shape, numbers, batch, CPU_TILE_BYTES)
    print(f"\n{name} {mode} {way} rank {lora}: {measured / 2**20:.1f} MiB, predicted {found / measured - 1:+.1%}")
    assert found == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("way", ["shared", "bucketed", "checkpointing"])
@pytest.mark.parametrize("mode", ["32", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("true", "mixed"))])
def test_an_update_of_the_tiny_policy(mode: str, way: str, lora: int) -> None:
    assert_peak("tiny", mode, way, lora)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["shared", "bucketed", "checkpointing"])
def test_an_update_of_smollm2s_shape(way: str) -> None:
    assert_peak("smollm", "32", way, 0)  # in bfloat16 a CPU without matrix units for it takes minutes


def test_rollouts_of_the_tiny_policy() -> None:
    policy = Policy(str(TINY))
    engine, shape = Transformers(max_rows=48), DecoderShape.of(policy.on_meta())
    engine.setup(policy.load(), policy.load_tokenizer())
    ids = np.random.default_rng(0).integers(5, 262, (16, 60))
    prompts = [Prompt(str(row), row, "", "", tuple(tokens.tolist()), {}) for row, tokens in enumerate(ids)]
    sampling = Sampling(num_generations=4, max_completion_length=120)
    seeds = np.arange(64).reshape(16, 4)
    engine.generate(prompts, sampling, seeds)
    measured = peak_bytes(lambda: engine.generate(prompts, sampling, seeds))
    cache = 4 * shape.cached * (48 * (120 + SLACK) + 16 * 60)
    found = cache + memory.decode_workspace(shape, 4, 48, 180, 12 * 60, cache)
    print(f"\nrollouts: {measured / 2**20:.1f} MiB, {cache / 2**20:.1f} of them cache, {found / measured - 1:+.1%}")
    assert found == pytest.approx(measured, rel=WITHIN)


@pytest.mark.ranks
def test_ddp_holds_no_buckets_and_starts_from_the_weights_of_rank_0(tmp_path: Path) -> None:
    """The wrapper, which is not used, holds as much as the gradients: the control."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(tmp_path / "store"), str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    found = [process.communicate(timeout=200)[0].splitlines()[-1].split() for process in processes]
    policy = Policy(str(TINY))
    _, gradients, _ = memory.training_states(DecoderShape.of(policy.on_meta()), PRECISIONS["32"])
    expected = sum(float(one.double().sum()) for one in policy.load().parameters())
    for held, unwrapped, total, wrapped in found:
        assert (int(held), unwrapped, float(total)) == (0, "True", expected)
        assert int(wrapped) == pytest.approx(gradients, rel=WITHIN)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_fsdp2_holds_two_layers_and_the_root(tmp_path: Path, dtype: str) -> None:
    WIDE.save_pretrained(tmp_path)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(tmp_path), dtype], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | address | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    measured = [int(process.communicate(timeout=200)[0].splitlines()[-1]) for process in processes]
    shape = DecoderShape.of(Policy(str(tmp_path)).on_meta())
    numbers = Precision(4, 2 if dtype == "bfloat16" else 4)
    batch = MicroBatch(1, 2, 20, 30, True)
    update = memory.update_peak(shape, numbers, batch, CPU_TILE_BYTES)
    found = update + memory.unsharded_layers(shape, numbers)
    print(f"\nFSDP2 {dtype}: {measured[0] / 2**20:.1f} MiB, predicted {found / measured[0] - 1:+.1%}")
    assert found == pytest.approx(max(measured), rel=WITHIN)
