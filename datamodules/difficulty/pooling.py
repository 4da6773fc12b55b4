"""How token states become one vector per text: plain mean pooling, or as a sentence-transformers folder says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from datamodules.errors import UserError

Pooling = Literal["mean", "cls", "lasttoken"]
POOLINGS: tuple[str, ...] = ("mean", "cls", "lasttoken")
MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class PoolingRecipe:
    """From questions to vectors.

    Attributes:
        model: folder of the transformer.
        pooling: mean over the text's tokens, its first ("cls") or its last token.
        normalize: whether vectors are scaled to unit length.
        max_length: tokens kept of a text, None for as many as the model reads.
        prefix: put before every text.
        lower: whether texts are lower-cased first.
    """

    model: Path
    pooling: Pooling = "mean"
    normalize: bool = False
    max_length: int | None = None
    prefix: str = ""
    lower: bool = False


def read_recipe(folder: Path) -> PoolingRecipe:
    """The recipe of a model folder: mean pooling, unless it is a sentence-transformers folder (`modules.json`).

    Raises:
        UserError: a sentence-transformers folder asks for a module or a pooling that is not supported here.
    """
    if not (folder / "modules.json").is_file():
        return PoolingRecipe(folder)
    modules = {entry["type"].rsplit(".", 1)[-1]: folder / entry["path"] for entry in _read(folder / "modules.json")}
    unknown = sorted(set(modules) - set(MODULES))
    if unknown or not {"Transformer", "Pooling"} <= set(modules):
        raise UserError(
            f"encoder {folder} is made of the modules {sorted(modules)}, expected {MODULES[0]}, {MODULES[1]} and maybe "
            f"{MODULES[2]}: choose another sentence-transformers folder, or a plain model folder"
        )
    transformer = modules["Transformer"]
    settings = _read_if_there(transformer / "sentence_bert_config.json")
    return PoolingRecipe(
        model=transformer,
        pooling=_read_pooling(modules["Pooling"], folder),
        normalize="Normalize" in modules,
        max_length=settings.get("max_seq_length"),
        prefix=_read_prefix(folder),
        lower=bool(settings.get("do_lower_case", False)),
    )


def pool(states: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Vectors `[N, E]` from right-padded token states `[N, L, E]` of texts with `lengths` `[N]` >= 1 tokens."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return torch.where(mask[..., None], states, 0).sum(1) / lengths[:, None]


def _read_pooling(folder: Path, encoder: Path) -> Pooling:
    config = _read(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:  # releases before 5.4 wrote one flag per mode
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        modes = [flag.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for flag in flags]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS or not config.get("include_prompt", True):
        raise UserError(
            f"encoder {encoder} pools by {'+'.join(modes) or 'nothing'} (include_prompt "
            f"{config.get('include_prompt', True)}), expected one of {', '.join(POOLINGS)} over the whole text: "
            "choose another encoder"
        )
    return cast(Pooling, modes[0])


def _read_prefix(folder: Path) -> str:
    config = _read_if_there(folder / "config_sentence_transformers.json")
    name = config.get("default_prompt_name")
    return (config.get("prompts") or {}).get(name, "") if name else ""


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): the encoder folder is incomplete, get it again") from None
