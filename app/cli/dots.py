"""The subcommands of `dots` with a model and data: LightningCLI, one-line errors, and a resume in the same folder."""

from __future__ import annotations

import copy
import gc
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Set before torch and tokenizers are imported by what follows.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import yaml
from huggingface_hub.utils import enable_progress_bars
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers.utils import logging as transformers_logging

from app.cli.commands import COMMANDS, LIGHTNING_COMMANDS
from app.cli.dry_run import DryRun
from app.cli.entry import OF_BENCHMARKS, WHOLE_ANSWERS
from app.cli.failures import stage
from app.cli.parsing import DEBUG_FLAG, DotsArgumentParser, debugging, run_or_exit
from app.cli.trainer import DotsTrainer
from app.import_path import hidden_files, put_user_folder_last
from app.module import GRPOModule
from app.policy.weights import CHECKPOINT_PREFIX
from app.runs import changed_config
from app.runs.checkpoint_files import OnDamage
from app.runs.checkpoint_files import check as check_files
from app.runs.checkpoint_files import read as read_checkpoint
from app.runs.folder import Runs, checkpoint_of, find_last, is_run
from app.runs.identity import check_weights
from app.runs.sharded_checkpoint import read_rest
from callbacks import CompletionsLog, RunCheckpoint, SelectionMonitor, StartValidation
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from datamodules.prompts.benchmarks import BENCHMARKS

_CONFIGURABLE: dict[type[Callback], str] = {
    RunCheckpoint: "checkpoint",
    CompletionsLog: "completions",
    SelectionMonitor: "selection_monitor",
    StartValidation: "start_validation",
}
"""Standard callbacks with options, by the section of the configuration that holds them: `--checkpoint.every 5`."""
DEFAULTS: dict[str, Any] = {
    "model": {"class_path": "app.module.GRPOModule"},
    "data": {
        "class_path": "datamodules.online.OnlinePromptDataModule",
        "init_args": {"train": {"class_path": "datamodules.prompts.PromptFile"}},
    },
}
"""The classes of a run whose config names none."""
_LONGEST_ANSWER, _ROOM_FOR_PROMPTS = 4096, 1024
"""Tokens of a completion where no run and no option says how many, and those of the context that prompts have."""
_GPU = ("gpu", "cuda")
_OWN_SUBCOMMANDS = ("show_data", "describe", "doctor", "export", "select", "serve")


class DotsCLI(LightningCLI):
    """`dots fit|validate|test|predict|describe|doctor|export|select|serve`, models and data named by `class_path`."""

    def __init__(self, args: list[str] | None = None) -> None:
        self._given: list[str] = sys.argv[1:] if args is None else args
        self._tried: DryRun | None = None
        self._is_dry = self._given[:1] == ["fit"] and "--dry_run" in self._given
        if self._is_dry:
            self._given = args = [one for one in self._given if one != "--dry_run"]
        self._fits_completions = WHOLE_ANSWERS in self._given
        if self._fits_completions:
            self._given = args = [one for one in self._given if one != WHOLE_ANSWERS]
        self._asks_for_help = any(one in ("-h", "--help") for one in self._given)
        if self._asks_for_help:
            self._given = args = [*self._given[:1], "--help"]  # whatever else is given: the defaults are shown
        super().__init__(
            trainer_class=DotsTrainer,
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_class=DotsArgumentParser,
            parser_kwargs={
                "prog": "dots",
                "description": "Data-efficient reinforcement fine-tuning of language models.",
            },
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in _OWN_SUBCOMMANDS}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        first = self._given[0] if self._given else None
        if first in self.subcommands() and first != subcommand:
            return self.init_parser(**kwargs)  # its hundred options are of no use to the one that was given
        summary = LIGHTNING_COMMANDS[subcommand.removeprefix("show_")]
        kwargs["description"] = f"{summary[:1].upper()}{summary[1:]}."
        if self._asks_for_help:
            kwargs["usage"] = f"dots {subcommand} [--config FILE ...] [options]"
            parser = self.init_parser(**kwargs)
            parser.add_method_arguments(klass, subcommand, skip=set(self.subcommands()[subcommand]))
            self._add_arguments(parser)
        else:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if not self._asks_for_help:
            assert isinstance(parser, DotsArgumentParser)
            parser.read_before = ("dry_run", "resume") if subcommand == "fit" else ()
            parser.read_before += ("benchmarks",) if subcommand in OF_BENCHMARKS else ()
        if subcommand in OF_BENCHMARKS and self._asks_for_help:
            told = f"in place of the config's prompts and rewards: {', '.join(BENCHMARKS)}, separated by commas"
            parser.add_argument("--benchmarks", metavar="NAMES", help=told)
        if subcommand == "fit" and self._asks_for_help:  # neither is part of a config
            told = "try everything once: a small step, validation, a checkpoint; nothing is kept"
            parser.add_argument("--dry_run", action="store_true", help=told)
            told = "folder of a run to continue, with its own config and its newest checkpoint"
            parser.add_argument("--resume", metavar="RUN", help=told)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self._asks_for_help:
            self._add_arguments_for_help(parser)
            return
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults(copy.deepcopy(DEFAULTS))

    def _add_arguments_for_help(self, parser: LightningArgumentParser) -> None:
        """Add the options of the default classes, which jsonargparse lists only if they cannot be replaced."""
        parser.add_class_arguments(GRPOModule, "model", fail_untyped=False, sub_configs=True)
        parser.add_class_arguments(PromptFile, "data.train", fail_untyped=False)
        parser.add_class_arguments(OnlinePromptDataModule, "data", fail_untyped=False, sub_configs=True, skip={"train"})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with stage("reading the command line and configs"):
            self.config = parser.parse_args(args)

    def _add_instantiators(self) -> None:
        """Do nothing: Lightning would dump the whole config for hyperparameters, which checkpoints do not hold."""

    def _set_seed(self) -> None:
        seed = self.config[self.subcommand].seed_everything
        if not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {seed}, expected 0 to {2**32 - 1}. Change it.")
        super()._set_seed()

    def instantiate_classes(self) -> None:
        with stage("building the model, data and callbacks"):
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:  # the public hook after it is not called when it fails
        with stage(f"running dots {subcommand}"), ExitStack() as owned:
            if self._tried is not None:
                owned.enter_context(self._tried)
            if subcommand in ("validate", "test", "predict") and isinstance(self.trainer, DotsTrainer):
                owned.enter_context(self.trainer.own_folder(subcommand))
            super()._run_subcommand(subcommand)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--on_damaged_checkpoint",
            type=OnDamage,
            default="previous",
            help="what --ckpt_path last does when the newest checkpoint is damaged: resume from the previous one, "
            "with a warning, or stop",
        )
        for kind, name in _CONFIGURABLE.items():
            parser.add_lightning_class_args(kind, name)
        if self._asks_for_help:  # Lightning's hundred options come last
            parser.add_lightning_class_args(DotsTrainer, "trainer")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: a checkpoint holds no hyperparameters, and must not choose which classes are instantiated."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if "weights_only" in config:
            if config.weights_only is False:
                raise UserError(
                    "--weights_only false would unpickle the checkpoint, which runs any code in it. Drop it."
                )
            config.weights_only = True
        if self.subcommand in ("show_data", "describe", "doctor"):
            _describe_here(config)
        _check_trainer(config)
        if self._is_dry:
            self._tried = DryRun(config)
        if self.subcommand == "doctor":  # which looks at the loggers, and where they write
            return
        if self.subcommand in _OWN_SUBCOMMANDS and (config.get("ckpt_path") != "last" or _own_run(config)):
            # They leave no run folder, and only `last` may need the logger to find one. The warm-up of a selection has
            # a logger of its own.
            config.trainer.logger = False

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        listed = config.get("callbacks") or []
        listed = listed if isinstance(listed, list) else [listed]
        if isinstance(self.model, GRPOModule):
            if config.get("enable_checkpointing") is False:
                callbacks = [one for one in callbacks if not isinstance(one, RunCheckpoint)]
            replaced = [one for one in callbacks if any(isinstance(other, type(one)) for other in listed)]
            callbacks = [one for one in callbacks if one not in replaced]
            self._say_unused_options(replaced)
        elif self.subcommand in _OWN_SUBCOMMANDS:
            raise UserError(
                f"The model is {type(self.model).__name__}, but dots {self.subcommand} needs app.module.GRPOModule."
            )
        else:
            self.trainer_class, callbacks = Trainer, []  # pretraining has no rollouts
        if self._tried is not None:
            callbacks = [*callbacks, self._tried.stop]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except UserError:
            raise
        except (ValueError, TypeError) as error:  # Lightning's message about a strategy or an accelerator
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _say_unused_options(self, replaced: list[Callback]) -> None:
        """Name the options of standard callbacks that a listed callback of the same class takes the place of."""
        defaults = self._parser(self.subcommand).get_defaults()
        for name in (_CONFIGURABLE[type(one)] for one in replaced):
            if self.config[self.subcommand][name] != defaults[name]:
                rank_zero_only(print)(
                    f"dots: warning: the options of {name} are not used, because trainer.callbacks lists a callback of "
                    "its class: set its init_args instead, or remove it from the list",
                    file=sys.stderr, flush=True,
                )  # fmt: skip

    def after_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self._fits_completions and isinstance(self.model, GRPOModule):
            most = self.model.fit_completions(_LONGEST_ANSWER, _ROOM_FOR_PROMPTS)
            rank_zero_only(print)(
                f"dots: completions end after {most:,} tokens ({_LONGEST_ANSWER:,}, or what the policy's context "
                "leaves beside a prompt). Set --model.val_sampling.max_completion_length for another limit.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        # The parsed configuration is what is saved and compared, the instantiated one is what the subcommand is given.
        if config.get("ckpt_path") == "last":
            found = self._find_last(config)
            config.ckpt_path = self.config_init[self.subcommand].ckpt_path = found
        elif (given := config.get("ckpt_path")) is not None:
            config.ckpt_path = self.config_init[self.subcommand].ckpt_path = str(checkpoint_of(Path(given)))
        if self.subcommand in _OWN_SUBCOMMANDS and self.subcommand != "doctor":
            self.trainer.loggers = []
        resumed = _read_checkpoint(config)
        if resumed is None:
            return
        if self.subcommand == "fit":
            given = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
            if changed := changed_config.report(Path(config.ckpt_path), given):
                print(changed, file=sys.stderr, flush=True)
        if isinstance(self.model, GRPOModule):
            # The weights of a sharded checkpoint, a folder, are compared when they are read.
            if not Path(config.ckpt_path).is_dir():
                check_weights(self.model.policy.on_meta(), resumed["state_dict"], CHECKPOINT_PREFIX)
            self.model.resumed = resumed.get("run_identity", {})

    def _find_last(self, config: Any) -> str | None:
        """Return the checkpoint of `--ckpt_path last`, and have a training run continue in the folder of its run.

        Without one training starts from the beginning, so that one command serves for every start of a run.
        """
        if not isinstance(self.trainer, DotsTrainer):
            raise UserError(
                f"--ckpt_path last finds runs of app.module.GRPOModule, but the model is {type(self.model).__name__}. "
                "Name the checkpoint's file."
            )
        found = find_last(Runs.of(self.trainer), config.on_damaged_checkpoint, _own_run(config))
        if self.subcommand != "fit" and found.checkpoint is None:
            raise UserError(f"--ckpt_path last: {found.said}. Train one first, or name a file.")
        rank_zero_only(print)(f"--ckpt_path last: {found.said}{found.then}", file=sys.stderr, flush=True)
        if self.subcommand == "fit":
            self.trainer.continued = found.folder
        return None if found.checkpoint is None else str(found.checkpoint)


def _own_run(config: Any) -> Path | None:
    """Return the folder of the run whose own config.yaml is given as --config."""
    given = [Path(str(one)).resolve() for one in config.get("config") or []]
    return next((one.parent for one in reversed(given) if one.name == "config.yaml" and is_run(one.parent)), None)


def _read_checkpoint(config: Any) -> dict[str, Any] | None:
    """Read the checkpoint of --ckpt_path and check it before anything is built; None without one."""
    given = config.get("ckpt_path")
    if not given or "://" in given:
        return None
    path = Path(given)
    if path.is_dir():
        check_files(path)
        return read_rest(path)
    return read_checkpoint(path)


def _check_trainer(config: Any) -> None:
    """Raise UserError for options of Lightning's trainer that the model has its own for."""
    if config.model.class_path != DEFAULTS["model"]["class_path"]:
        return
    for name, default, instead in (
        ("accumulate_grad_batches", 1, "model.max_tokens_per_microbatch, the tokens of a forward and backward pass"),
        ("gradient_clip_val", None, "model.optimization.clip_norm"),
        ("gradient_clip_algorithm", None, "model.optimization.clip_norm"),
    ):
        if config.trainer[name] not in (default, None):
            raise UserError(f"trainer.{name} is {config.trainer[name]}, which GRPO does not use. Set {instead}.")


def _describe_here(config: Any) -> None:
    """Describe a run of any size on this machine: its processes are counted, not started."""
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    if config.get("world_size", 1) is None and isinstance(devices, int | str) and str(devices).isdigit():
        config.world_size = int(devices) * int(nodes)
    if "local_processes" in config:
        used = config.trainer.accelerator in ("gpu", "cuda", "auto") and CUDAAccelerator.is_available()
        config.accelerator = config.accelerator or ("gpu" if used or config.trainer.accelerator in _GPU else "cpu")
        if config.local_processes is None:
            counted = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 0
            config.local_processes = counted or (CUDAAccelerator.auto_device_count() if used else 1)
    if config.trainer.accelerator in _GPU and config.trainer.precision is None:
        config.trainer.precision = "bf16-mixed"  # as it will be there
    config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes = "cpu", 1, 1
    config.trainer.strategy = "auto"


_NOTICES = (
    "litlogger",
    "Tip:",
    "GPU available: False",
    "TPU available: False",
    "Seed set to",
    "`Trainer.fit` stopped:",
)
_WARNINGS = (
    "does not have many workers",
    "Trying to infer the `batch_size`",
    "litlogger",
    "Previous log files in this directory will be deleted",  # they are kept
    "Total length of `list` across ranks is zero",  # a run without validation prompts
)
_LIBRARIES = r"(lightning|torch|transformers|datasets|peft|jsonargparse|tensorboard|matplotlib)(\.|$)"


def quiet() -> None:
    """Drop notices that say nothing about the user's run, and bars of what takes no time.

    Bars of downloads stay.
    """
    for text in _WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}")
    for category in (FutureWarning, DeprecationWarning):  # of one library about its use of another
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not any(one in record.getMessage() for one in _NOTICES))
    transformers_logging.disable_progress_bar()
    enable_progress_bars()


def main(args: list[str] | None = None) -> Path | None:
    """Run the command and return the folder that it has written, if it has one; `args` default to the process's own."""
    given = sys.argv[1:] if args is None else args
    if DEBUG_FLAG not in given and not debugging():
        quiet()
    put_user_folder_last()
    for file, installed in hidden_files():
        rank_zero_only(print)(
            f"dots: warning: {file} in this folder cannot be imported, because {installed} has its name. Rename it if "
            "a config names it.",
            file=sys.stderr,
        )
    done: list[DotsCLI] = []
    if given and given[0] in COMMANDS:
        run_or_exit(lambda: COMMANDS[given[0]].run(given[1:]))
    else:
        run_or_exit(lambda: done.append(DotsCLI(given)))
    trainer = done[0].trainer if done else None
    return trainer.run if isinstance(trainer, DotsTrainer) else None


def measure_each(commands: Sequence[list[str]]) -> None:
    """Run `dots validate`, `test` or `predict` once for each of several policies, and say where the results are."""
    say = rank_zero_only(print)
    folders = []
    for number, command in enumerate(commands, start=1):
        say(f"dots: {command[0]} {number} of {len(commands)}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
        folders.append(main(command))
        gc.collect()  # the policy is held by cycles, and the next one needs its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    say(f"results of each: {' '.join(map(str, folders))}")
    if commands[0][0] == "predict":
        say(f"as records of {len(folders)} policies: dots difficulty fit --outcomes {' '.join(map(str, folders))} ...")
