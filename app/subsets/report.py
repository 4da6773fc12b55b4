"""The output of a selection next to its prompt file: scores, and a config for `dots fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from app.subsets.measurements import replacing, write_whole


def write_scores(
    path: Path, ids: Sequence[str], measured: Mapping[str, np.ndarray], score: np.ndarray, chosen: np.ndarray
) -> None:
    """Write a parquet table with one row per prompt of the pool, in the pool's order.

    Args:
        path: the file.
        ids: `Q` prompt ids.
        measured: the method's measurements; columns with several numbers per prompt are left out.
        score: float64 `[Q]`.
        chosen: int64 `[N]`, positions of the kept prompts, best first.
    """
    rank = np.full(len(ids), -1, dtype=np.int64)
    rank[chosen] = np.arange(len(chosen))
    columns: dict[str, Any] = {"id": list(ids)}
    columns |= {name: np.asarray(values) for name, values in measured.items() if values.ndim == 1}
    columns |= {"score": score, "kept": rank >= 0, "rank": pa.array(rank, mask=rank < 0)}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def write_config(
    path: Path, data_class: type, train: dict[str, dict[str, Any]], val: dict[str, dict[str, Any]] | None
) -> None:
    """Write an overlay for `dots fit --config BASE --config PATH` that trains on the subset.

    `data_class` is that of the DataModule; `train` and `val` are the arguments of the `PromptFile`s of the subset and
    of the validation prompts, if those were held out of the pool, by the name of their source.
    """

    def option(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        found = {
            name: {"class_path": "datamodules.prompts.PromptFile", "init_args": arguments}
            for name, arguments in files.items()
        }
        return found.get("", found)

    options: dict[str, Any] = {"train": option(train)}
    if val is not None:
        options |= {"val": option(val), "val_size": 0}
    overlay = {"data": {"class_path": f"{data_class.__module__}.{data_class.__qualname__}", "init_args": options}}
    head = f"# The subset of `dots select`: dots fit --config BASE.yaml --config {path}\n"
    write_whole(path, head + yaml.safe_dump(overlay, sort_keys=False, allow_unicode=True, width=120))
