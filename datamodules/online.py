"""The DataModule, which yields the prompts that the selector chooses for a step, when the step begins."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from lightning.pytorch import LightningDataModule, Trainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.loaders import FixedLoader, OnlineLoader
from datamodules.mixture import Mixture, Rule, floors_of, named
from datamodules.policy_source import PolicySource
from datamodules.pool import PromptPool
from datamodules.prompts.benchmarks import Benchmark
from datamodules.prompts.file import PromptSource
from datamodules.prompts.splits import hold_out, split_pool
from datamodules.seeding import derive_seed, run_seed
from datamodules.selectors import SelectionContext, Selector, Uniform
from datamodules.types import Prompt, TrainBatch
from datamodules.validation import ValidationSet, as_set

Measured = PromptSource | ValidationSet | dict[str, PromptSource | ValidationSet]
"""One validation or test set, or several by name."""
_NAME = re.compile(r"[\w.-]+")


class OnlinePromptDataModule(LightningDataModule):
    """Reads the prompt pools and lets a selector decide what is rolled out next.

    Args:
        train: where the training prompts come from: a source, or several by name.
        val: validation prompts: a source, a `ValidationSet`, or several by name, which are measured apart; training
            prompts with the same question are dropped. When None, `val_size` of the training prompts are held out.
        test: prompts of `dots test` and `dots predict`, given as `val`; when None, the validation prompts.
        selector: the selection method; None is `Uniform`, which makes the run plain GRPO.
        prompts_per_step: prompt groups in a training batch, `B`, replayed ones included.
        mixture: what becomes of the shares of several sources in the prompts that the selector chooses. "keep" gives
            every source its `weight` divided by the sum of all, or its share of all prompts where none has a weight.
            "floor" gives it at least its weight, a fraction of the prompts. "free" uses no weights: the selector
            chooses over all prompts alike.
        val_size: prompts held out of `train` when `val` is None.
        val_batch_size: prompts of one validation batch.
        tokenizer: folder or hub name; None uses the policy's.
        encoder: folder or hub name of the model whose hidden states embed the questions; None uses the policy's
            initial weights.
        cache_dir: where embeddings are cached between runs.
        seed: of pools and choices; None uses the run's `seed_everything`.

    Attributes:
        train_sources: the training sources by name; a single one has the name "".
        sets: the validation and test sets by the prefix of their metrics: `val`, or `val/NAME` where they are named.
        given_sets: those of `sets` that were not held out of the training prompts.
        pools: the prompts by the same names, and those of training as `train`; test prompts alone for `dots test` and
            `dots predict` where the config names some.
        tags: the columns by which each set is measured, by the same names.
    """

    def __init__(
        self,
        train: PromptSource | dict[str, PromptSource],
        val: Measured | None = None,
        test: Measured | None = None,
        selector: Selector | None = None,
        prompts_per_step: int = 32,
        mixture: Rule = "keep",
        val_size: int = 0,
        val_batch_size: int = 64,
        tokenizer: str | None = None,
        encoder: str | None = None,
        cache_dir: str = "~/.cache/dots",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, given in (("prompts_per_step", prompts_per_step), ("val_batch_size", val_batch_size)):
            if given < 1:
                raise UserError(f"data.{name} is {given}, expected at least 1. Raise it.")
        for name, source in (("train", train), ("val", val), ("test", test)):
            for one in source.values() if isinstance(source, Mapping) else [source]:
                if one is not None and not isinstance(one, PromptSource | ValidationSet):
                    raise UserError(
                        f"OnlinePromptDataModule was given {name}={source!r}, expected a source of prompts such as "
                        "datamodules.prompts.PromptFile('my.jsonl'), or several in a dict by name."
                    )
        self.train_sources = {"": train} if isinstance(train, PromptSource) else train
        if not self.train_sources:
            raise UserError("data.train is an empty mapping, expected at least one source. Add one by its name.")
        _check_names("train", {} if isinstance(train, PromptSource) else train)
        self.given_sets = {**_sets("val", val), **_sets("test", test)}
        self.sets = dict(self.given_sets)
        self.selector = selector or Uniform()
        self.prompts_per_step, self.mixture = prompts_per_step, mixture
        self.val_size, self.val_batch_size = val_size, val_batch_size
        self.tokenizer_path, self.encoder = tokenizer, encoder
        self.cache_dir = Path(cache_dir).expanduser()
        self.seed = run_seed() if seed is None else seed
        self.pools: dict[str, PromptPool] = {}
        self.tags: dict[str, tuple[str, ...]] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        """The tokenizer of the prompts; None before the pools are read."""
        self.fresh_prompts = prompts_per_step
        """Prompts that the selector chooses for the next step; a replay callback lowers it when it will add groups."""
        self.prepared: TrainBatch | None = None
        """The batch of a step that has not begun yet, whose prompts were chosen ahead."""
        self.in_flight: frozenset[str] = frozenset()
        """Ids of prompts that were chosen and wait for the end of their rollouts: they are not chosen again."""
        self._measured_at: dict[str, int] = {}
        """Steps done when each set was last measured in training."""

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """Return the data module of a run. Raises UserError unless it is of this class."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        if not isinstance(data, cls):
            raise UserError(
                f"The data of the run is {type(data).__name__}, expected {cls.__name__}. Set data.class_path to "
                f"datamodules.online.{cls.__name__} or to a subclass of it."
            )
        return data

    def prepare_data(self) -> None:
        """Set up before the logger creates the run's folder, so that unusable data leaves no folder.

        Lightning calls this in one process; with several, each reads the data in `setup`.
        """
        if self.trainer is not None and self.trainer.world_size == 1 and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Read the pools and prepare the selector. Raises UserError when data cannot be used."""
        command = None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        tested = {name: one for name, one in self.given_sets.items() if name.split("/")[0] == "test"}
        tests_alone = command in ("test", "predict") and bool(tested)
        if "train" in self.pools or (tests_alone and self.pools):
            self._setup_selector(stage)
            return
        self.pools, self.sets = {}, tested if tests_alone else dict(self.given_sets)
        module: object = None if self.trainer is None else self.trainer.lightning_module
        policy = module if isinstance(module, PolicySource) else None
        if self.tokenizer_path is not None:
            tokenizer = _load_tokenizer(self.tokenizer_path)
        elif policy is not None:
            tokenizer = policy.tokenizer
        else:
            raise UserError(
                "data.tokenizer is not set and the model has no tokenizer, expected one of the two. Set data.tokenizer "
                "to a folder or hub name."
            )
        self.tokenizer = tokenizer
        if len(self.train_sources) == 1:
            for one in self.sets.values():
                if isinstance(one.source, Benchmark):
                    one.source.ask_as(next(iter(self.train_sources.values())))
        if tests_alone:  # which may be where the training prompts are not
            self._measured_pools("test", tokenizer, policy)
            return
        whole = self._measured_pools("val", tokenizer, policy)
        if self.val_size and not whole:
            parts = self._training_pools(
                tokenizer, policy, [None, ValidationSet(next(iter(self.train_sources.values())))]
            )
            train, held = split_pool(Mixture(parts) if "" not in parts else parts[""], self.val_size, self.seed)
            for name, pool in (held.parts if isinstance(held, Mixture) else {"": held}).items():
                if len(pool):
                    self._add_set(f"val/{name}".rstrip("/"), ValidationSet(self.train_sources[name]), pool)
        else:
            parts = self._training_pools(tokenizer, policy, [None])
            train = hold_out(Mixture(parts) if "" not in parts else parts[""], *whole)
        if isinstance(train, Mixture):
            weights = {name: source.weight for name, source in self.train_sources.items()}
            train.floors = floors_of(self.mixture, weights, train.parts)
        self.pools = {"train": train, **self.pools}
        self._measured_pools("test", tokenizer, policy)
        if command in ("validate", "test", "predict") and not self.measured("val" if command == "validate" else "test"):
            raise UserError(
                f"The config has no prompts that dots {command} could measure. Set data.val or data.test to a source "
                "of them, or data.val_size to the number that is held out of data.train."
            )
        self._setup_selector(stage)

    def measured(self, stage: Literal["val", "test"]) -> list[str]:
        """Return the names of the sets of validation or, for "test", of test and prediction, in order."""
        found = [name for name in self.sets if name.split("/")[0] == stage]
        return found if found or stage == "val" else self.measured("val")

    def _training_pools(
        self, tokenizer: PreTrainedTokenizerBase, policy: PolicySource | None, uses: Sequence[ValidationSet | None]
    ) -> dict[str, PromptPool]:
        """Read the training sources; `uses` is what their prompts are for, None for training."""
        parts = {}
        for name, source in self.train_sources.items():
            if policy is not None:
                source.tools = policy.tools
                limits = [policy.prompt_limit(use, "data.val") for use in uses]
                source.context_limit = min((one for one in limits if one is not None), default=None)
            # Sources that generate their prompts must not generate the same ones.
            seed = derive_seed(self.seed, "source", name) if name else self.seed
            parts[name] = named(source.load(tokenizer, seed), name, source.rewards)
        return parts

    def _measured_pools(
        self, stage: Literal["val", "test"], tokenizer: PreTrainedTokenizerBase, policy: PolicySource | None
    ) -> list[PromptPool]:
        """Read the sets of a stage, and return their pools before `size` has left prompts out."""
        found = []
        for name in [one for one in self.sets if one.split("/")[0] == stage]:
            one = self.sets[name]
            if policy is not None:
                one.source.context_limit, one.source.tools = policy.prompt_limit(one, _option(name)), policy.tools
            # Sources that generate their prompts must not generate the same ones for training and validation.
            pool = one.source.load(tokenizer, derive_seed(self.seed, name))
            found.append(named(pool, name.partition("/")[2], one.source.rewards))
            self._add_set(name, one, one.chosen(found[-1]))
        return found

    def _add_set(self, name: str, one: ValidationSet, pool: PromptPool) -> None:
        self.sets[name], self.pools[name] = one, pool
        self.tags[name] = one.tags_of(pool, _option(name))

    def _setup_selector(self, stage: str) -> None:
        """Prepare the selector for training, unless it is: a validation before needs none."""
        if stage != "fit" or self.selector.is_ready:
            return
        train = self.pools["train"]
        if self.prompts_per_step > len(train):
            raise UserError(
                f"data.prompts_per_step is {self.prompts_per_step} but the pool has only {len(train)} prompts. "
                "Lower data.prompts_per_step or add prompts."
            )
        if isinstance(train, Mixture):
            for name, floor in train.floors.items():
                if (most := math.ceil(floor * self.prompts_per_step)) > len(train.parts[name]):
                    raise UserError(
                        f"data.train.{name} has {len(train.parts[name])} prompts, but its share of the "
                        f"{self.prompts_per_step} prompts of a step is up to {most}. Lower its weight or "
                        "data.prompts_per_step, add prompts, or set data.mixture=free."
                    )
        module: object = None if self.trainer is None else self.trainer.lightning_module
        encoder = self.encoder or (module.policy_path if isinstance(module, PolicySource) else None)
        self.selector.setup(train, SelectionContext(self.seed, encoder, self.cache_dir))

    def next_batch(self, step: int) -> TrainBatch:
        """Return the batch of a step: `fresh_prompts` prompts chosen now, with the selector's forecast of them.

        A batch that `prepare` has made for the step is returned as it is.
        """
        if self.prepared is not None and self.prepared.step == step:
            batch, self.prepared = self.prepared, None
            return batch
        batch = TrainBatch(step, ())
        if self.fresh_prompts:
            self._choose(batch, self.fresh_prompts, refill=False)
        return batch

    def prepare(self, step: int, n: int) -> TrainBatch:
        """Choose `n` prompts for a step before it begins, given what the selector knows now, and return its batch."""
        self.prepared = TrainBatch(step, ())
        if n:
            self._choose(self.prepared, n, refill=False)
        return self.prepared

    def add_prompts(self, batch: TrainBatch, n: int) -> tuple[Prompt, ...]:
        """Add `n` prompts to a batch in progress, or fewer if the pool has no others, and return them."""
        return self._choose(batch, n, refill=True)

    def _choose(self, batch: TrainBatch, n: int, *, refill: bool) -> tuple[Prompt, ...]:
        pool = self.pools["train"]
        with batch.ledger.phase("select"):
            excluded = self.in_flight | {prompt.id for prompt in batch.prompts}
            positions = pool.positions(self.selector.choose(n, excluded, refill))
            forecast = self.selector.forecast()
            if forecast is not None and not refill:
                batch.pool_forecast = forecast.copy()
            prompts = tuple(pool[index] for index in positions)
            batch.add_prompts(prompts, None if forecast is None else forecast[positions])
            batch.explored |= self.selector.explored_ids
        return prompts

    def train_dataloader(self) -> OnlineLoader:
        return OnlineLoader(self.next_batch)

    def val_dataloader(self) -> list[FixedLoader]:
        return self._fixed("val")

    def test_dataloader(self) -> list[FixedLoader]:
        return self._fixed("test")

    def predict_dataloader(self) -> list[FixedLoader]:
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: TrainBatch, device: object, dataloader_idx: int) -> TrainBatch:
        """Leave the batch on the host: the module moves the tensors that it builds from prompts and groups."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"selector": self.selector.state_dict(), "measured_at": dict(self._measured_at)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "train" in self.pools and self.selector.is_ready:
            saved = state_dict["selector"]
            try:
                self.selector.load_state_dict(saved)
            except KeyError as missing:
                raise UserError(
                    f"Cannot resume: another version of Dots saved the checkpoint, whose selectors.{saved['selector']} "
                    f"did not save {missing}. Resume with that version, or start a new run."
                ) from missing
            self._measured_at = dict(state_dict.get("measured_at", {}))

    def _fixed(self, stage: Literal["val", "test"]) -> list[FixedLoader]:
        return [
            FixedLoader(self.pools[name], self.val_batch_size, partial(self._is_due, name))
            for name in self.measured(stage)
        ]

    def _is_due(self, name: str) -> bool:
        """Return whether a set is measured in the validation that begins, and note it if it is."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != "fit":
            return True
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        due = trainer.should_stop or done - self._measured_at.get(name, -self.sets[name].every) >= self.sets[name].every
        if due:
            self._measured_at[name] = done
        return due


def _sets(stage: str, given: Measured | None) -> dict[str, ValidationSet]:
    """Return the sets that `data.val` or `data.test` gives, by the prefix of their metrics."""
    if given is None:
        return {}
    if isinstance(given, PromptSource | ValidationSet):
        return {stage: as_set(given)}
    _check_names(stage, given)
    return {f"{stage}/{name}": as_set(one) for name, one in given.items()}


def _option(name: str) -> str:
    """Return the option that gives a set."""
    return f"data.{name.replace('/', '.', 1)}"


def _check_names(option: str, given: Mapping[str, object]) -> None:
    for name in given:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"data.{option} names a source {name!r}, expected letters, digits, '.', '_' and '-': the name is part "
                "of metrics and prompt ids. Rename it."
            )


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.tokenizer is {name}, which cannot be loaded ({str(error).strip().splitlines()[0]}). Give a folder "
            "or hub name with a tokenizer, or null for the policy's."
        ) from error
