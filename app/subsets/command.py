"""`dots select`: warm up, measure every prompt, keep the best, write what `dots fit` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from app.module import GRPOModule
from app.subsets.base import OfflineMethod, best
from app.subsets.bench import Bench
from app.subsets.learnalign import LearnAlign, LearnAlignOptions
from app.subsets.measurements import Measurements, Workspace
from app.subsets.report import write_config, write_picture, write_scores
from app.subsets.settings import settings_of
from app.subsets.ufo import Ufo, UfoOptions
from app.subsets.warmup import load_policy, warmed_up
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptSource
from datamodules.prompts.subset import check_subset, subset_options, write_subset
from datamodules.selectors import Uniform


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; see `DotsTrainer.select`."""

    method: str
    keep: int
    out: Path
    learnalign: LearnAlignOptions
    ufo: UfoOptions
    prompts_per_batch: int
    checkpoint: Path | None

    def __post_init__(self) -> None:
        if self.out.suffix != ".jsonl":
            raise UserError(f"--out {self.out}: expected a name that ends in .jsonl")
        for name, given in (("keep", self.keep), ("prompts_per_batch", self.prompts_per_batch)):
            if given < 1:
                raise UserError(f"--{name} {given}: expected at least 1")
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise UserError(f"--ckpt_path {self.checkpoint}: no such file; expected a checkpoint of `dots fit`")

    @property
    def folder(self) -> Path:
        """Where measurements are kept."""
        return self.out.with_suffix(".select")

    @property
    def options(self) -> LearnAlignOptions | UfoOptions:
        return self.learnalign if self.method == "learnalign" else self.ufo

    def make_method(self) -> OfflineMethod:
        return LearnAlign(self.learnalign) if self.method == "learnalign" else Ufo(self.ufo)


def select(trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule, request: Request) -> None:
    """Runs a selection from where it was left, and writes its result.

    Raises UserError for a module or data that cannot be selected for, or a request that does not fit the pool.
    """
    _check_classes(trainer, module, datamodule)
    if request.out.exists() and not request.folder.exists():
        raise UserError(f"--out {request.out}: exists already; give another name")
    pool = _read_pool(trainer, module, datamodule)
    if request.keep > len(pool):
        raise UserError(f"--keep {request.keep}: the training pool has {len(pool)} prompts")
    method = request.make_method()
    method.check(module)
    settings = settings_of(module, datamodule, request.method, request.options, request.checkpoint)
    workspace = Workspace(request.folder, settings)
    try:
        checkpoint = request.checkpoint
        if checkpoint is None and method.warmup_steps:
            checkpoint = warmed_up(trainer, module, datamodule, method.warmup_steps, request.folder)
        measured = _measure(trainer, module, checkpoint, method, pool, workspace, request.prompts_per_batch)
    finally:
        module.teardown("select")
    _write(module, datamodule, method, measured, request)


def _check_classes(trainer: Trainer, module: object, datamodule: object) -> None:
    if not isinstance(module, GRPOModule) or not isinstance(datamodule, OnlinePromptDataModule):
        raise UserError(
            f"dots select needs the model and data of a GRPO run, given {type(module).__name__} and "
            f"{type(datamodule).__name__}: expected app.module.GRPOModule and datamodules.online.OnlinePromptDataModule"
        )
    if trainer.world_size > 1:
        raise UserError(f"dots select runs in one process, {trainer.world_size} asked for: set trainer.devices=1")


def _read_pool(trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> PromptPool:
    """The training pool; a warm-up will choose from it uniformly, whatever the config selects by."""
    trainer.strategy.connect(module)
    module.trainer = trainer
    datamodule.trainer = trainer
    datamodule.selector = Uniform()
    datamodule.setup("fit")
    return datamodule.pools["train"]


def _measure(
    trainer: Trainer,
    module: GRPOModule,
    checkpoint: Path | None,
    method: OfflineMethod,
    pool: PromptPool,
    workspace: Workspace,
    together: int,
) -> Measurements:
    """Measures what is not measured yet."""
    module.to(trainer.strategy.root_device)
    load_policy(module, checkpoint)
    bench = Bench(module, trainer)
    measured = workspace.measurements(method.prepare(bench), len(pool))
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("prompts"), TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("Measuring", total=len(pool), completed=measured.done)
        while measured.done < len(pool):
            last = min(measured.done + together, len(pool))
            measured.append(method.measure(bench, [pool[index] for index in range(measured.done, last)]))
            progress.update(task, completed=measured.done)
    return measured


def _write(
    module: GRPOModule,
    datamodule: OnlinePromptDataModule,
    method: OfflineMethod,
    measured: Measurements,
    request: Request,
) -> None:
    pool, out = datamodule.pools["train"], request.out
    score = method.score(measured.arrays)
    chosen = best(score, request.keep)
    kept = np.zeros(len(pool), dtype=bool)
    kept[chosen] = True
    source = datamodule.sources["train"]
    train = _write_prompts([pool[index] for index in chosen], out, source, module.tokenizer)
    val = None
    if datamodule.sources["val"] is None and "val" in datamodule.pools:
        val = _write_prompts(list(datamodule.pools["val"]), out.with_suffix(".val.jsonl"), source, module.tokenizer)
    write_config(out.with_suffix(".yaml"), type(datamodule), train, val)
    write_scores(out.with_suffix(".scores.parquet"), pool.ids, measured.arrays, score, chosen)
    write_picture(out.with_suffix(".png"), method.draw(measured.arrays, score, kept))
    idle = int(np.sum(score[chosen] <= 0)) if request.method == "learnalign" else 0
    note = f", {idle} of them without a positive score" if idle else ""
    Console(soft_wrap=True, highlight=False).print(
        f"kept {len(chosen)} of {len(pool)} prompts{note}: {out}\n"
        f"train on them: dots fit --config BASE.yaml --config {out.with_suffix('.yaml')}"
    )


def _write_prompts(prompts: list[Any], path: Path, source: PromptSource | None, tokenizer: Any) -> dict[str, Any]:
    """Writes prompts, reads them back, and returns how `PromptFile` reads them."""
    options = subset_options(path, source)
    write_subset(prompts, path)
    check_subset(options, prompts, tokenizer)
    return options
