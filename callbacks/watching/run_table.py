"""Print what a run will do, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from app.engines import Transformers
from app.engines.transformers.generation import CPU_CACHE_TOKENS
from app.engines.transformers.shared_cache import SLACK
from app.module import GRPOModule
from app.policy.adapters import causal_lm
from app.policy.model import plain_attention
from app.policy.scoring import can_share_prompts
from app.policy.weights import count_parameters
from app.reporting.memory import Part, Precision, StepSizes, memory_parts
from callbacks.algorithm.dynamic_sampling import DynamicSampling
from callbacks.algorithm.group_sizes import GroupSizes
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.replay import RolloutReplay
from callbacks.algorithm.rollout_ahead import RolloutAhead
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.sharded_policy import ShardedPolicy
from datamodules.mixture import Mixture
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.prompts import PromptSource

_SHOWN = 1000  # characters of a prompt
_PROMPT_LENGTH = 512  # assumed where the data set no limit

Row = tuple[str, str, str]


class RunTable(StepCallback):
    """Prints the table of the run before the first step."""

    stage = Stage.WATCH

    def on_fit_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if trainer.is_global_zero:
            datamodule: OnlinePromptDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
            print_run_table(trainer, pl_module, datamodule, pl_module.policy_model, trainer.world_size)


def print_run_table(
    trainer: Trainer,
    module: GRPOModule,
    datamodule: OnlinePromptDataModule,
    policy: nn.Module,
    world_size: int,
    *,
    with_memory: bool = False,
) -> None:
    """Print the prompts, completions, tokens and steps of a run of `world_size` processes.

    The run need not have started, and `policy` may be on the meta device. `with_memory` adds the estimated memory of a
    process (`app.reporting.memory`).
    """
    table = Table(title=f"{module.policy_path} with {type(datamodule.selector).__name__}", title_justify="left")
    table.add_column("")
    table.add_column(f"per rank ({world_size})", justify="right")
    table.add_column("in all", justify="right")
    for name, count in zip(("policy parameters", "  trained"), count_parameters(policy), strict=True):
        table.add_row(name, "", f"{count:,}")
    for name, pool in datamodule.pools.items():
        table.add_row(f"{name} prompts", "", f"{len(pool):,}")
    for row in (*_source_rows(datamodule), *_set_rows(module, datamodule)):
        table.add_row(*row)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    stored, held = module.policy.stored_dtype(), module.policy.weights_dtype()
    for row in (
        ("weights" if held == stored else f"weights (in the file {_name(stored)})", "", _name(held)),
        ("precision of computation (trainer.precision)", "", str(trainer.precision)),
        *_run_rows(module, datamodule, callbacks, world_size, trainer.max_steps),
        *_validation_row(trainer),
    ):
        table.add_row(*row)
    if with_memory:
        table.add_section()
        for row in _memory_rows(trainer, module, datamodule, policy, world_size):
            table.add_row(*row)
    Console().print(table)
    lm = causal_lm(policy)
    if isinstance(module.engine, Transformers) and module.engine.share_prompts and not plain_attention(lm):
        Console().print(
            f"slow path: the attention of {type(lm).__name__} cannot share a prompt among its completions, so that "
            "each keeps a copy in rollouts and updates, which are slower. The engine Vllm rolls out without this limit",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    if module.environment is not None:
        Console().print(_environment_line(module), highlight=False, markup=False, soft_wrap=True)
    for name, pool in datamodule.pools.items():
        for source, part in (pool.parts if isinstance(pool, Mixture) else {"": pool}).items():
            if part.report is not None:
                Console().print(f"{name} {source}".rstrip() + f": {part.report}", highlight=False, markup=False)
    train = datamodule.pools.get("train")
    if train is not None and datamodule.tokenizer is not None:
        for name, part in (train.parts if isinstance(train, Mixture) else {"": train}).items():
            text = _first_prompt(part, datamodule.train_sources[name], name, datamodule.tokenizer)
            Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _environment_line(module: GRPOModule) -> str:
    """Return what the policy talks to: the environment, its tools by environment, and its limits."""
    environment, tools = module.environment, module.tools
    assert environment is not None
    assert tools is not None
    named = [
        f"{name}: {its}" if name else its
        for name, schemas in tools.items()
        if (its := ", ".join(str(one["function"]["name"]) for one in schemas))
    ]
    return (
        f"environment {type(environment).__name__}: {'tools ' + '; '.join(named) if named else 'no tools'}; up to "
        f"{environment.max_turns} turns, {environment.time_limit_s:g} s for an answer, {environment.max_sessions} "
        "conversations at a time"
    )


def _source_rows(datamodule: OnlinePromptDataModule) -> list[Row]:
    """Return a row for each of several training sources: its prompts and its share of those chosen."""
    rows, pool = [], datamodule.pools.get("train")
    for name, source in datamodule.train_sources.items():
        parts = [] if source.weight is None else [f"weight {source.weight:g}"]
        if isinstance(pool, Mixture):
            parts.insert(0, f"{len(pool.parts[name]):,} prompts")
            share = {"keep": f"{pool.floors[name]:.1%} of", "floor": f"at least {pool.floors[name]:.1%} of"}
            parts.append(f"{share.get(datamodule.mixture, 'any number of')} those chosen")
        rows.append((f"  source {name} (mixture {datamodule.mixture})", "", ", ".join(parts)))
    return [] if "" in datamodule.train_sources else rows


def _set_rows(module: GRPOModule, datamodule: OnlinePromptDataModule) -> list[Row]:
    """Return a row for each named validation or test set: how it is measured."""
    rows = []
    for name, one in datamodule.sets.items():
        if "/" in name:
            sampling = module.sampling_of(one)
            every = f", every {one.every} steps" if one.every > 1 else ""
            drawn = f"{sampling.num_generations} at T {sampling.temperature:g}"  # a column of 14 letters
            rows.append((f"  {name}, completions{every}", "", drawn))
    return rows


def _first_prompt(pool: PromptPool, source: PromptSource, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first prompt of a source as the policy reads it, special tokens included, and what rendered it."""
    tokens = pool[0].token_ids
    text = tokenizer.decode(list(tokens), skip_special_tokens=False)
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"
    renderer = source.renderer(tokenizer)
    by = "without a template"
    if renderer.uses_chat_template:
        by = "rendered by the tokenizer's chat template"
    elif renderer.template is not None:
        by = "rendered by the data's template"
        by += ", in place of the tokenizer's chat template" if tokenizer.chat_template is not None else ""
    return f"first prompt{f' of {name}' if name else ''}, {len(tokens)} tokens, {by}:\n{text}"


def _run_rows(
    module: GRPOModule, datamodule: OnlinePromptDataModule, callbacks: list[Callback], world_size: int, max_steps: int
) -> list[Row]:
    """Return rows (quantity, per rank, in all): prompts, completions and tokens of a step, and the run's steps."""

    def shared(name: str, total: int) -> Row:
        return name, f"{-(-total // world_size):,}", f"{total:,}"

    prompts, generations = datamodule.prompts_per_step, module.sampling.num_generations
    fresh = prompts - _replayed(callbacks, prompts)
    rows = [
        shared("prompts per step", prompts),
        shared("  rolled out", fresh),
        shared("  replayed (buffer full)", prompts - fresh),
        shared("completions per step", prompts * generations),
        shared("  generated", fresh * generations),
        shared("completion tokens generated, at most", fresh * generations * module.sampling.max_completion_length),
        ("mini-batches per step", "", str(module.mini_batches)),
        shared("completions per mini-batch", prompts * generations // module.mini_batches),
        ("tokens per micro-batch, at most", f"{module.max_tokens_per_microbatch:,}", ""),
    ]
    for one in callbacks:
        if isinstance(one, GroupSizes):
            least, most = one.bounds(generations)
            rows.append((f"completions of a prompt, {generations} on average", "", f"{least} to {most}"))
        elif isinstance(one, ReferenceRollouts):
            rows.append(shared(f"reference completions, every {one.every}", one.size * generations))
        elif isinstance(one, DynamicSampling):
            rows.append(("refills of what a filter drops, at most", "", str(one.max_refills)))
    if max_steps > 0:
        steps = -(-max_steps // module.mini_batches)
        rows.append(("steps", "", f"{steps:,}"))
        rows.append((f"optimizer steps (trainer.max_steps {max_steps:,})", "", f"{steps * module.mini_batches:,}"))
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _validation_row(trainer: Trainer) -> list[Row]:
    interval = trainer.val_check_interval
    return [("steps between validations", "", f"{interval:,}")] if isinstance(interval, int) else []


def _replayed(callbacks: list[Callback], prompts: int) -> int:
    """Return the prompts of a step that a full buffer replays."""
    return max((one.replayed_per_step(prompts) for one in callbacks if isinstance(one, RolloutReplay)), default=0)


def step_memory(
    trainer: Trainer,
    module: GRPOModule,
    datamodule: OnlinePromptDataModule,
    policy: nn.Module,
    world_size: int,
    device: str | None = None,
) -> tuple[int, list[Part]]:
    """Return the length of prompts that is assumed, and the parts of a process's memory on a type of device.

    The device is that of the trainer by default. Raises ValueError for a policy whose memory isn't estimated.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    sharded = next((one for one in callbacks if isinstance(one, ShardedPolicy)), None)
    references = max((one.size for one in callbacks if isinstance(one, ReferenceRollouts)), default=0)
    prompts, engine = datamodule.prompts_per_step, module.engine
    fresh = prompts - _replayed(callbacks, prompts)
    ahead = max((one.prompts_ahead(fresh) for one in callbacks if isinstance(one, RolloutAhead)), default=0)
    limits = [source.max_prompt_length for source in datamodule.train_sources.values()]
    limit = max((one for one in limits if one is not None), default=None) if None not in limits else None
    stored, half = causal_lm(policy).dtype.itemsize, "16" in trainer.precision
    precision = Precision(
        weights=stored,
        compute=2 if half or (sharded is not None and sharded.compute_dtype is not None) else stored,
        # FSDP2 casts weights as it gathers them, so nothing is autocast.
        autocast=trainer.precision.endswith("mixed") and sharded is None and stored == 4,
    )
    sizes = StepSizes(
        processes=world_size,
        shards=1 if sharded is None else sharded.shard_size or world_size,
        device=device or trainer.strategy.root_device.type,
        prompts=-(-prompts // module.mini_batches),
        rolled_out=max(fresh, ahead, references),
        generations=module.sampling.num_generations,
        prompt_length=limit or _PROMPT_LENGTH,
        completion_length=module.sampling.max_completion_length,
        max_tokens=module.max_tokens_per_microbatch,
        shared=module.options.share_prompts and can_share_prompts(policy),
        has_reference=module.options.surrogate.beta > 0,
    )
    if isinstance(engine, Transformers):
        sizes = replace(
            sizes, max_rows=engine.max_rows, max_cache_tokens=engine.max_cache_tokens or CPU_CACHE_TOKENS,
            prefill_tokens=engine.prefill_tokens, spare_columns=SLACK,
        )  # fmt: skip
    return sizes.prompt_length, memory_parts(policy, precision, sizes)


def _memory_rows(
    trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule, policy: nn.Module, world_size: int
) -> list[Row]:
    """Return rows (part, bytes per rank, phase that holds it), the largest sum of parts held together first."""
    try:
        prompt_length, parts = step_memory(trainer, module, datamodule, policy, world_size)
    except ValueError as error:
        return [(f"memory is not estimated: {error}", "", "")]
    held: Counter[str] = Counter()
    for part in parts:
        held[part.phase] += part.bytes
    always = held.pop("always")
    phase, most = held.most_common(1)[0]
    unit, name = (2**30, "GiB") if always + most >= 2**30 else (2**20, "MiB")
    rows = [(f"estimated memory, prompts of {prompt_length:,} tokens", always + most, phase)]
    rows += [(f"  {part.name}", part.bytes, part.phase) for part in parts]
    return [(text, f"{size / unit:,.2f} {name}", when) for text, size, when in rows]
