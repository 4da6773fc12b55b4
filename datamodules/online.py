"""The DataModule, which yields the prompts that the selector chooses for a step, when the step begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from lightning.pytorch import LightningDataModule, Trainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptSource
from datamodules.prompts.splits import hold_out, split_pool
from datamodules.seeding import derive_seed, run_seed
from datamodules.selectors import SelectionContext, Selector, Uniform
from datamodules.types import Prompt, TrainBatch

_ENDLESS = 10**9


@runtime_checkable
class PolicySource(Protocol):
    """A LightningModule that has a policy, whose tokenizer and initial weights are the defaults of the data."""

    @property
    def policy_path(self) -> str:
        """Folder or hub name of the initial weights."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""

    def prompt_limit(self, *, training: bool) -> int | None:
        """Return the most tokens of a prompt that leave room for a completion in training or validation, or None."""


class OnlineLoader:
    """An endless loader whose state is the number of steps begun.

    It has a length (`trainer.max_steps` ends the run) because Lightning fetches a loader without one a batch ahead, and
    a choice must depend on the outcomes of the previous step.
    """

    def __init__(self, datamodule: OnlinePromptDataModule) -> None:
        self._datamodule = datamodule
        self._step = 0

    def __len__(self) -> int:
        return _ENDLESS

    def __iter__(self) -> Iterator[TrainBatch]:
        while True:
            self._step += 1
            yield self._datamodule.next_batch(self._step - 1)

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step = state["step"]


class FixedLoader:
    """Loader of a validation, test or prediction pool, in order, `batch_size` prompts at a time."""

    def __init__(self, pool: PromptPool, batch_size: int) -> None:
        self._pool, self._batch_size = pool, batch_size

    def __len__(self) -> int:
        return -(-len(self._pool) // self._batch_size)

    def __iter__(self) -> Iterator[TrainBatch]:
        for position in range(len(self)):
            first = position * self._batch_size
            last = min(first + self._batch_size, len(self._pool))
            yield TrainBatch(position, [self._pool[index] for index in range(first, last)])


class OnlinePromptDataModule(LightningDataModule):
    """Reads the prompt pools and lets a selector decide what is rolled out next.

    Args:
        train: where the training prompts come from.
        val: validation prompts; training prompts with the same question are dropped. When None, `val_size` of the
            training prompts are held out.
        test: prompts of `dots test` and `dots predict`; when None, the validation prompts.
        selector: the selection method; None is `Uniform`, which makes the run plain GRPO.
        prompts_per_step: prompt groups in a training batch, `B`, replayed ones included.
        val_size: prompts held out of `train` when `val` is None.
        val_batch_size: prompts of one validation batch.
        tokenizer: folder or hub name; None uses the policy's.
        encoder: folder or hub name of the model whose hidden states embed the questions; None uses the policy's
            initial weights.
        cache_dir: where embeddings are cached between runs.
        seed: of pools and choices; None uses the run's `seed_everything`.
    """

    def __init__(
        self,
        train: PromptSource,
        val: PromptSource | None = None,
        test: PromptSource | None = None,
        selector: Selector | None = None,
        prompts_per_step: int = 32,
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
        self.sources = {"train": train, "val": val, "test": test}
        self.selector = selector or Uniform()
        self.prompts_per_step, self.val_size, self.val_batch_size = prompts_per_step, val_size, val_batch_size
        self.tokenizer_path, self.encoder = tokenizer, encoder
        self.cache_dir = Path(cache_dir).expanduser()
        self.seed = run_seed() if seed is None else seed
        self.pools: dict[str, PromptPool] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        """The tokenizer of the prompts; None before the pools are read."""
        self.fresh_prompts = prompts_per_step
        """Prompts that the selector chooses for the next step; a replay callback lowers it when it will add groups."""
        self.prepared: TrainBatch | None = None
        """The batch of a step that has not begun yet, whose prompts were chosen ahead."""

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """Return the data module of a run. Raises UserError unless it is of this class."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning declares it nowhere
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
        if self.pools:
            self._setup_selector(stage)
            return
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
        if policy is not None:
            limits = {one: policy.prompt_limit(training=one == "train") for one in ("train", "val")}
            if self.sources["val"] is None and self.val_size:
                limits["train"] = min((one for one in limits.values() if one is not None), default=None)
            for name, source in self.sources.items():
                if source is not None:
                    source.context_limit = limits["train" if name == "train" else "val"]
        train = self._read("train", tokenizer)
        if self.sources["val"] is not None:
            self.pools["val"] = self._read("val", tokenizer)
            train = hold_out(train, self.pools["val"])
        elif self.val_size:
            train, self.pools["val"] = split_pool(train, self.val_size, self.seed)
        self.pools["train"] = train
        if self.sources["test"] is not None:
            self.pools["test"] = self._read("test", tokenizer)
        self._setup_selector(stage)

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

    def prepare(self, step: int) -> TrainBatch:
        """Choose the prompts of a step before it begins, given what the selector knows now."""
        self.prepared = self.next_batch(step)
        return self.prepared

    def add_prompts(self, batch: TrainBatch, n: int) -> tuple[Prompt, ...]:
        """Add `n` prompts to a batch in progress, or fewer if the pool has no others, and return them."""
        return self._choose(batch, n, refill=True)

    def _choose(self, batch: TrainBatch, n: int, *, refill: bool) -> tuple[Prompt, ...]:
        pool = self.pools["train"]
        with batch.ledger.phase("select"):
            positions = pool.positions(self.selector.choose(n, refill=refill))
            forecast = self.selector.forecast()
            if forecast is not None and not refill:
                batch.pool_forecast = forecast.copy()
            prompts = tuple(pool[index] for index in positions)
            batch.add_prompts(prompts, None if forecast is None else forecast[positions])
            batch.explored = self.selector.explored_ids
        return prompts

    def train_dataloader(self) -> OnlineLoader:
        return OnlineLoader(self)

    def val_dataloader(self) -> FixedLoader | list[TrainBatch]:
        return self._fixed("val")

    def test_dataloader(self) -> FixedLoader | list[TrainBatch]:
        return self._fixed("test" if "test" in self.pools else "val")

    def predict_dataloader(self) -> FixedLoader | list[TrainBatch]:
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: TrainBatch, device: object, dataloader_idx: int) -> TrainBatch:
        """Leave the batch on the host: the module moves the tensors that it builds from prompts and groups."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"selector": self.selector.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "train" in self.pools and self.selector.is_ready:
            self.selector.load_state_dict(state_dict["selector"])

    def _fixed(self, name: str) -> FixedLoader | list[TrainBatch]:
        return FixedLoader(self.pools[name], self.val_batch_size) if name in self.pools else []

    def _read(self, name: str, tokenizer: PreTrainedTokenizerBase) -> PromptPool:
        source = self.sources[name]
        assert source is not None
        # Sources that generate their prompts must not generate the same ones for training and validation.
        return source.load(tokenizer, self.seed if name == "train" else derive_seed(self.seed, name))


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.tokenizer is {name}, which cannot be loaded ({str(error).strip().splitlines()[0]}). Give a folder "
            "or hub name with a tokenizer, or null for the policy's."
        ) from error
