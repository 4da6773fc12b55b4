"""`dots select`: warm up, measure every prompt, keep the best, and write what `dots fit` reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from app.module import GRPOModule
from app.subsets.base import OfflineMethod, best
from app.subsets.frozen_policy import FrozenPolicy
from app.subsets.learnalign import LearnAlign, LearnAlignOptions
from app.subsets.measurements import Measurements, claim_folder, replacing
from app.subsets.report import write_config, write_scores
from app.subsets.settings import settings_of
from app.subsets.ufo import Ufo, UfoOptions
from app.subsets.warmup import WarmupTrainer, load_policy, warmed_up
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.prompts.subset import check_subset, subset_options, write_subset
from datamodules.selectors import Uniform
from datamodules.types import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """The user's request; see `DotsTrainer.select`."""

    method: str
    keep: int
    out: Path
    learnalign: LearnAlignOptions
    ufo: UfoOptions
    prompts_per_batch: int
    checkpoint: Path | None

    def __post_init__(self) -> None:
        if self.out.suffix != ".jsonl":
            raise UserError(f"--out is {self.out}; choose a name that ends in .jsonl.")
        for name, given in (("keep", self.keep), ("prompts_per_batch", self.prompts_per_batch)):
            if given < 1:
                raise UserError(f"--{name} is {given}; set it to 1 or more.")
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise UserError(f"--ckpt_path is {self.checkpoint}: no such file. Name a checkpoint of `dots fit`.")

    @property
    def folder(self) -> Path:
        """Folder of the measurements."""
        return self.out.with_suffix(".select")


def select(
    trainer: Trainer,
    module: GRPOModule,
    datamodule: OnlinePromptDataModule,
    request: Request,
    warmup_trainer: WarmupTrainer,
) -> None:
    """Run a selection, or resume one, and write its result. The trainer provides device and precision.

    Raises:
        UserError: a module or data without a selection, or a request that does not fit the pool.
    """
    if not isinstance(module, GRPOModule) or not isinstance(datamodule, OnlinePromptDataModule):
        raise UserError(
            f"dots select was given {type(module).__name__} and {type(datamodule).__name__}. Use the model and data of "
            "a GRPO run: app.module.GRPOModule and datamodules.online.OnlinePromptDataModule."
        )
    if trainer.world_size > 1:
        raise UserError(f"dots select runs in one process, not in {trainer.world_size}. Set trainer.devices=1.")
    if module.environment is not None:
        raise UserError("dots select measures single turns, but model.environment is set. Set it to null.")
    if request.out.exists() and not request.folder.exists():
        raise UserError(f"--out is {request.out}, which exists. Choose another name.")
    trainer.strategy.connect(module)
    module.trainer = trainer
    datamodule.trainer = trainer
    # A warm-up chooses its prompts uniformly under any config.
    datamodule.selector = Uniform()
    datamodule.setup("fit")
    pool = datamodule.pools["train"]
    if request.keep > len(pool):
        raise UserError(f"--keep is {request.keep}, but the training pool has {len(pool)} prompts. Lower --keep.")
    method = LearnAlign(request.learnalign) if request.method == "learnalign" else Ufo(request.ufo)
    method.check(module)
    checkpoint = request.checkpoint
    claim_folder(request.folder, settings_of(module, datamodule, request.method, method.options, checkpoint))
    try:
        if checkpoint is None and method.warmup_steps:
            checkpoint = warmed_up(module, datamodule, warmup_trainer, method.warmup_steps, request.folder)
        module.to(trainer.strategy.root_device)
        load_policy(module, checkpoint)
        policy = FrozenPolicy(module, trainer)
        measured = Measurements(request.folder, method.prepare(policy), len(pool))
        _measure(policy, method, pool, measured, request.prompts_per_batch)
    finally:
        module.teardown("select")
    _write(module, datamodule, method, measured, request)


def _measure(
    policy: FrozenPolicy, method: OfflineMethod, pool: PromptPool, measured: Measurements, together: int
) -> None:
    """Measure the prompts that have no measurements yet, with a progress bar."""
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("prompts"), TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("Measuring", total=len(pool), completed=measured.done)
        while measured.done < len(pool):
            last = min(measured.done + together, len(pool))
            measured.append(method.measure(policy, [pool[index] for index in range(measured.done, last)]))
            progress.update(task, completed=measured.done)


def _write(
    module: GRPOModule,
    datamodule: OnlinePromptDataModule,
    method: OfflineMethod,
    measured: Measurements,
    request: Request,
) -> None:
    """Score the pool, and write the subset, its config, the scores and the picture."""
    pool, out = datamodule.pools["train"], request.out
    score = method.score(measured.arrays)
    chosen = best(score, request.keep)
    kept = np.zeros(len(pool), dtype=bool)
    kept[chosen] = True

    def write_prompts(prompts: Iterable[Prompt], path: Path, name: str) -> dict[str, Any]:
        """Write prompts of a source, verify that they read back unchanged, and return the arguments that read them."""
        source = datamodule.train_sources[name]
        options = subset_options(path, source)
        written = [replace(one, id=one.id.removeprefix(f"{name}/")) if name else one for one in prompts]
        write_subset(written, path)
        check_subset(options, written, module.tokenizer)
        return options | {"weight": source.weight, "rewards": source.rewards}

    def write_sources(prompts: Sequence[Prompt], path: Path) -> dict[str, dict[str, Any]]:
        """Write a file per source, and return the arguments by the name of the source; a single one has the name ""."""
        found = {}
        for name in datamodule.train_sources:
            its = [prompt for prompt in prompts if prompt.dataset == name]
            if its:
                found[name] = write_prompts(its, path.with_suffix(f".{name}.jsonl") if name else path, name)
        return found

    train = write_sources([pool[index] for index in chosen], out)
    val = None
    if held := [name for name in datamodule.measured("val") if name not in datamodule.given_sets]:
        prompts = [prompt for name in held for prompt in datamodule.pools[name]]
        val = write_sources(prompts, out.with_suffix(".val.jsonl"))
    write_config(out.with_suffix(".yaml"), type(datamodule), train, val)
    write_scores(out.with_suffix(".scores.parquet"), pool.ids, measured.arrays, score, chosen)
    with replacing(out.with_suffix(".png")) as temporary:
        method.draw(measured.arrays, score, kept).savefig(temporary, dpi=110, format="png")
    unlearnable = int(np.sum(score[chosen] <= 0)) if request.method == "learnalign" else 0
    note = f", {unlearnable} of them without a positive score" if unlearnable else ""
    Console(soft_wrap=True, highlight=False).print(
        f"kept {len(chosen)} of {len(pool)} prompts{note}: {out}\n"
        f"train on them: dots fit --config BASE.yaml --config {out.with_suffix('.yaml')}"
    )
