"""The DataModule: at every step it yields the prompts that the selector chooses then, never earlier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptSource, hold_out, split_pool
from datamodules.seeding import derive_seed, run_seed
from datamodules.selectors import SelectionContext, Selector, Uniform
from datamodules.types import Prompt, TrainBatch

_ENDLESS = 10**9


class OnlineLoader:
    """An endless loader whose state is the number of steps begun.

    It has a length (`trainer.max_steps` ends the run) because Lightning fetches a loader without one a batch ahead,
    and a choice must see the outcomes of the step before it.
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
    """The prompts of a validation, test or prediction pool, in order, `batch_size` at a time."""

    def __init__(self, pool: PromptPool, batch_size: int) -> None:
        self._pool = pool
        self._batch_size = batch_size

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
        tokenizer: folder or hub name; None takes the policy's.
        encoder: folder or hub name whose hidden states embed the questions; None takes the policy's initial weights.
        cache_dir: where embeddings are kept between runs.
        seed: of pools and choices; None takes the run's `seed_everything`.
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
        if prompts_per_step < 1:
            raise UserError(f"data.prompts_per_step={prompts_per_step}: expected at least 1")
        self.sources = {"train": train, "val": val, "test": test}
        self.selector = selector or Uniform()
        self.prompts_per_step = prompts_per_step
        self.val_size = val_size
        self.val_batch_size = val_batch_size
        self.tokenizer_path = tokenizer
        self.encoder = encoder
        self.cache_dir = Path(cache_dir).expanduser()
        self.seed = run_seed() if seed is None else seed
        self.pools: dict[str, PromptPool] = {}
        self.fresh_prompts = prompts_per_step
        """Prompts that the next step asks the selector for; a replay callback lowers it when it will add groups."""
        self.prepared: TrainBatch | None = None
        """The batch of a step that has not begun, whose prompts were chosen ahead."""

    def prepare_data(self) -> None:
        """Sets up before the logger makes the run's folder, so that data that cannot be used leave none behind.

        Lightning calls this in one process; where there are several, they read side by side in `setup`.
        """
        if self.trainer is not None and self.trainer.world_size == 1 and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Reads the pools and prepares the selector. Raises UserError when data cannot be used."""
        if self.pools:
            return
        tokenizer = self._tokenizer()
        train = self._read("train", tokenizer)
        if self.sources["val"] is not None:
            self.pools["val"] = self._read("val", tokenizer)
            train = hold_out(train, self.pools["val"])
        elif self.val_size:
            train, self.pools["val"] = split_pool(train, self.val_size, self.seed)
        self.pools["train"] = train
        if self.sources["test"] is not None:
            self.pools["test"] = self._read("test", tokenizer)
        if stage == "fit":
            if self.prompts_per_step > len(train):
                raise UserError(
                    f"{self.prompts_per_step} prompts per step asked of a pool of {len(train)}: lower "
                    "data.prompts_per_step or add prompts"
                )
            policy = self.encoder or getattr(self._module(), "policy_path", None)
            self.selector.setup(train, SelectionContext(self.seed, policy, self.cache_dir))

    def next_batch(self, step: int) -> TrainBatch:
        """The batch of a step: `fresh_prompts` prompts chosen now, with what the selector expects of them.

        A batch that `prepare` has made for the step is given as it is.
        """
        if self.prepared is not None and self.prepared.step == step:
            batch, self.prepared = self.prepared, None
            return batch
        batch = TrainBatch(step, ())
        if self.fresh_prompts:
            self._choose(batch, self.fresh_prompts, refill=False)
        return batch

    def prepare(self, step: int) -> TrainBatch:
        """Chooses the prompts of a step before it begins, by what the selector knows now."""
        self.prepared = self.next_batch(step)
        return self.prepared

    def add_prompts(self, batch: TrainBatch, n: int) -> tuple[Prompt, ...]:
        """Adds `n` more prompts to a batch that has begun, fewer when the pool holds no others, and returns them."""
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

    def val_dataloader(self) -> FixedLoader | list[Any]:
        return self._fixed("val")

    def test_dataloader(self) -> FixedLoader | list[Any]:
        return self._fixed("test" if "test" in self.pools else "val")

    def predict_dataloader(self) -> FixedLoader | list[Any]:
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: TrainBatch, device: Any, dataloader_idx: int) -> TrainBatch:
        """Prompts and groups stay on the host: the module moves the tensors that it builds from them."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"selector": self.selector.state_dict(), "fresh_prompts": self.fresh_prompts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fresh_prompts = state_dict["fresh_prompts"]
        if "train" in self.pools and self.selector.is_ready:
            self.selector.load_state_dict(state_dict["selector"])

    def _fixed(self, name: str) -> FixedLoader | list[Any]:
        if name not in self.pools:
            return []
        return FixedLoader(self.pools[name], self.val_batch_size)

    def _read(self, name: str, tokenizer: PreTrainedTokenizerBase) -> PromptPool:
        source = self.sources[name]
        assert source is not None
        # Sources that generate their prompts must not generate the same ones for training and validation.
        return source.load(tokenizer, self.seed if name == "train" else derive_seed(self.seed, name))

    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_path is not None:
            return _load_tokenizer(self.tokenizer_path)
        tokenizer = getattr(self._module(), "tokenizer", None)
        if tokenizer is None:
            raise UserError("data.tokenizer is not set and the model has none: set data.tokenizer to a folder or name")
        return tokenizer


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.tokenizer={name}: cannot be loaded ({str(error).strip().splitlines()[0]}); expected a folder or hub "
            "name with a tokenizer, or null for the policy's"
        ) from error
