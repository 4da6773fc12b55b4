"""What a run asks for, from its configuration files and the options of `dots plan`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.cli.given_config import read
from app.engines import Sampling
from app.objective.packing import plan_microbatches
from app.objective.shared_prompt import plan_shared
from app.policy.model import Lora, Policy
from app.studies.plan_memory import MicroBatch, Precision
from datamodules.errors import UserError, nearest

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ENGINES = ("auto", "transformers", "vllm")


@dataclass(frozen=True, slots=True)
class Run:
    """A training step's work.

    Attributes:
        model: size, folder or hub name.
        dtype: of the stored weights.
        precision: `trainer.precision`.
        lora_rank: 0 for full fine-tuning.
        checkpointing: whether activations are computed again.
        prompts: per step, replayed ones among them.
        rolled_out: of these, the ones that get fresh completions.
        references: prompts of the reference set, per step on average.
        generations: completions of a prompt.
        prompt_length: tokens, of the longest.
        completion_length: tokens, at most.
        mean_length: of a completion, on average.
        mini_batches: optimizer steps per step.
        max_tokens: of a micro-batch.
        share_prompts: read a prompt once for all its completions, where the policy allows it.
        reference_policy: whether there is a KL term (beta above 0).
        max_rows: completions that the transformers engine decodes together.
        max_cache_tokens: bound on its cache.
        prefill_tokens: that it reads in one pass.
    """

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    precision: str = "bf16-mixed"
    lora_rank: int = 0
    checkpointing: bool = False
    prompts: int = 64
    rolled_out: float = 64
    references: float = 0
    generations: int = 8
    prompt_length: int = 512
    completion_length: int = 2048
    mean_length: float = 1024
    mini_batches: int = 1
    max_tokens: int = 16384
    share_prompts: bool = True
    reference_policy: bool = False
    max_rows: int = 256
    max_cache_tokens: int = 262_144
    prefill_tokens: int = 16_384

    def __post_init__(self) -> None:
        counts = (
            "prompts", "generations", "prompt_length", "completion_length", "mini_batches", "max_tokens", "max_rows",
            "max_cache_tokens", "prefill_tokens",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.precision not in _PRECISIONS:
            raise UserError(f"precision={self.precision}: {nearest(self.precision, _PRECISIONS)}")
        if self.dtype not in _BYTES:
            raise UserError(f"dtype={self.dtype}: {nearest(self.dtype, _BYTES)}")
        if not 0 < self.mean_length <= self.completion_length:
            raise UserError(
                f"mean_length={self.mean_length:g}: expected above 0 and at most completion_length="
                f"{self.completion_length}"
            )
        if not 0 < self.rolled_out <= self.prompts:
            raise UserError(f"rolled_out={self.rolled_out:g}: expected above 0 and at most prompts={self.prompts}")
        if self.lora_rank < 0 or self.references < 0:
            raise UserError(f"lora_rank={self.lora_rank}, references={self.references:g}: expected 0 or more")

    @property
    def lora(self) -> Lora | None:
        return Lora(rank=self.lora_rank) if self.lora_rank else None

    @property
    def half(self) -> bool:
        """Whether layers compute in two bytes."""
        return self.precision != "32-true" or _BYTES[self.dtype] < 4

    def numbers(self, sharded: bool) -> Precision:
        """In how many bytes numbers are kept; FSDP2 casts weights as it gathers them, so that nothing is autocast."""
        if self.precision.endswith("-mixed"):
            return Precision(_BYTES[self.dtype], 2, autocast=not sharded and _BYTES[self.dtype] == 4)
        width = 2 if self.precision != "32-true" else _BYTES[self.dtype]
        return Precision(width, width)

    @property
    def shares(self) -> bool:
        """As `scoring.can_share_prompts`: not with checkpointing."""
        return self.share_prompts and not self.checkpointing

    def microbatches(self, trainers: int, completion_length: float | None = None) -> tuple[MicroBatch, int]:
        """The largest micro-batch of a rank with most prompts in a mini-batch, and how many it passes over.

        All prompts and completions have the given lengths; the trainer's own planning deals them out.
        """
        length = max(1, round(completion_length or self.completion_length))
        prompts = math.ceil(self.prompts / self.mini_batches / trainers)
        completions = prompts * self.generations
        if self.shares:
            owner = [row // self.generations for row in range(completions)]
            plan = plan_shared(owner, [self.prompt_length] * prompts, [length] * completions, self.max_tokens)
            read = len({row // self.generations for row in plan[0]})
        else:
            plan = plan_microbatches([self.prompt_length + length] * completions, self.max_tokens)
            read = 0
        rows = len(plan[0])
        return MicroBatch(read or rows, rows, self.prompt_length, length, self.shares), len(plan)


DEFAULTS = {one.name: one.default for one in dataclasses.fields(Run)}
"""By attribute of `Run`."""


def read_run(files: list[str], given: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    """The run that configuration files describe, with the options that were given in their place.

    Args:
        files: as `dots fit --config` takes them, in order.
        given: values by attribute of `Run`; None where the option was not given.

    Returns:
        The run, and what the files say of the machine: `gpus`, `engine`, `tensor_parallel`, `gpu_share` where known.

    Raises:
        UserError: no model, or values that cannot be.
    """
    tree = _Tree(read([part for file in files for part in ("--config", file)]))
    found = _of_config(tree, given.get("model")) if files else {}
    found |= {name: value for name, value in given.items() if value is not None}
    if "model" not in found:
        raise UserError("no model: give --model 7B, --model FOLDER or --config FILE")
    # What follows from another value unless it was given itself.
    prompts = found.get("prompts", DEFAULTS["prompts"])
    found["rolled_out"] = found.get("rolled_out", found.pop("fresh_fraction", 1.0) * prompts)
    found.pop("fresh_fraction", None)
    length = found.setdefault("completion_length", DEFAULTS["completion_length"])
    found.setdefault("mean_length", length / 2)
    return Run(**found), tree.machine() if files else {}


class _Tree:
    """Values of a merged configuration by dotted path; `init_args` are gone through."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, path: str, default: Any = None) -> Any:
        node: Any = self._values
        for key in path.split("."):
            if isinstance(node, Mapping) and isinstance(node.get("init_args"), Mapping):
                node = node["init_args"]
            node = node.get(key) if isinstance(node, Mapping) else None
        return default if node is None else node

    def callback(self, name: str) -> _Tree | None:
        """Options of a callback, by the end of its class path."""
        for each in self.get("trainer.callbacks", []):
            if isinstance(each, Mapping) and str(each.get("class_path", "")).endswith(f".{name}"):
                return _Tree(each.get("init_args") or {})
        return None

    def machine(self) -> dict[str, Any]:
        """What a configuration says of GPUs and engines."""
        devices, nodes = self.get("trainer.devices"), self.get("trainer.num_nodes", 1)
        found: dict[str, Any] = {}
        if str(devices).isdigit():
            found["gpus"] = int(devices) * int(nodes)
        engine = self.get("model.engine")
        if engine is not None:
            name = engine.get("class_path", "") if isinstance(engine, Mapping) else engine
            found["engine"] = "vllm" if "Vllm" in str(name) else "transformers"
        options = {
            "tensor_parallel": ("tensor_parallel_size", int), "gpu_share": ("gpu_memory_utilization", float),
        }  # fmt: skip
        for name, (option, kind) in options.items():
            for path in (f"model.engine.{option}", f"model.engine.server.{option}"):
                if (value := self.get(path)) is not None:
                    found[name] = kind(value)
        return found


def _of_config(tree: _Tree, instead: str | None) -> dict[str, Any]:
    """Values of `Run` as a configuration or the classes' own defaults give them; `instead` of its model another."""
    model = tree.get("model.policy.path")
    dtype = tree.get("model.policy.dtype", "auto")
    if dtype == "auto":
        known = model is not None and instead is None
        dtype = str(Policy(str(model)).stored_dtype()).removeprefix("torch.") if known else None
    completion = tree.get("model.sampling.max_completion_length", Sampling().max_completion_length)
    lora = tree.get("model.policy.lora")
    values: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "precision": _precision(tree.get("trainer.precision")),
        "lora_rank": (lora.get("rank", Lora().rank) if isinstance(lora, Mapping) else 0),
        "checkpointing": tree.get("model.policy.gradient_checkpointing", False),
        "prompts": tree.get("data.prompts_per_step"),
        "generations": tree.get("model.sampling.num_generations", Sampling().num_generations),
        "prompt_length": tree.get("data.train.max_prompt_length"),
        "completion_length": completion,
        "mini_batches": tree.get("model.mini_batches", 1),
        "max_tokens": tree.get("model.max_tokens_per_microbatch"),
        "share_prompts": tree.get("model.share_prompts", True),
        "reference_policy": bool(tree.get("model.surrogate.beta", 0)),
    }
    if (replay := tree.callback("RolloutReplay")) is not None:
        values["fresh_fraction"] = float(replay.get("fresh_fraction", 0.5))
    if (references := tree.callback("ReferenceRollouts")) is not None:
        values["references"] = references.get("size", 256) / references.get("every", 2)
    return {name: value for name, value in values.items() if value is not None}


def _precision(given: object) -> str:
    names = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    return names.get(str(given), str(given))
