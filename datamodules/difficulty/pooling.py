"""Pooling of token states into one vector per text: the mean, or as a sentence-transformers folder specifies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from datamodules.errors import UserError

Pooling = Literal["mean", "cls", "lasttoken"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class PoolingRecipe:
    """Settings that turn questions into vectors.

    Attributes:
        model: folder of the transformer.
        pooling: mean over the text's tokens, its first ("cls") or its last token.
        normalize: whether vectors are scaled to unit length.
        max_length: tokens to keep of a text; None for the model's limit.
        prefix: text to put before every question.
        lower: whether to lower-case texts first.
    """

    model: Path
    pooling: Pooling = "mean"
    normalize: bool = False
    max_length: int | None = None
    prefix: str = ""
    lower: bool = False


def read_recipe(folder: Path) -> PoolingRecipe:
    """Read the recipe of a model folder: mean pooling, unless it is a sentence-transformers folder (`modules.json`).

    Raises:
        UserError: a sentence-transformers folder is incomplete or uses an unsupported module or pooling.
    """
    if not (folder / "modules.json").is_file():
        return PoolingRecipe(folder)
    modules = {entry["type"].rsplit(".", 1)[-1]: folder / entry["path"] for entry in _read(folder / "modules.json")}
    unknown = sorted(set(modules) - set(MODULES))
    if unknown or not {"Transformer", "Pooling"} <= set(modules):
        raise UserError(
            f"encoder {folder} is made of the modules {sorted(modules)}, expected {MODULES[0]}, {MODULES[1]} and "
            f"optionally {MODULES[2]}. Choose another sentence-transformers folder or a plain model folder."
        )
    transformer = modules["Transformer"]
    settings = _read(transformer / "sentence_bert_config.json", optional=True)
    prompts = _read(folder / "config_sentence_transformers.json", optional=True)
    prompt = prompts.get("default_prompt_name")
    return PoolingRecipe(
        model=transformer,
        pooling=_read_pooling(modules["Pooling"], folder),
        normalize="Normalize" in modules,
        max_length=settings.get("max_seq_length"),
        prefix=(prompts.get("prompts") or {}).get(prompt, "") if prompt else "",
        lower=bool(settings.get("do_lower_case", False)),
    )


def pool(states: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return vectors `[N, E]` from right-padded token states `[N, L, E]` of texts with `lengths` `[N]` >= 1 tokens."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return torch.where(mask[..., None], states, 0).sum(1) / lengths[:, None]


def _read_pooling(folder: Path, encoder: Path) -> Pooling:
    config = _read(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:  # sentence-transformers before 5.4 has one flag per mode
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        modes = [flag.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for flag in flags]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS or not config.get("include_prompt", True):
        raise UserError(
            f"encoder {encoder} pools by {'+'.join(modes) or 'nothing'} (include_prompt "
            f"{config.get('include_prompt', True)}), expected one of {', '.join(POOLINGS)} over the whole text. "
            "Choose another encoder."
        )
    return cast(Pooling, modes[0])


def _read(path: Path, optional: bool = False) -> Any:
    if optional and not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), expected JSON. The encoder folder is incomplete: download it again."
        ) from None
