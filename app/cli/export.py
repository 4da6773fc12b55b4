"""`dots export`: the policy of a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from app.module import GRPOModule
from app.policy.weights import checkpoint_weights, export
from datamodules.errors import UserError


def export_policy(
    module: GRPOModule,
    checkpoint: Path,
    out: Path,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    *,
    adapter_only: bool,
) -> str:
    """Write the folder, and return a line that says what was written; see `DotsTrainer.export` for the arguments.

    Raises:
        UserError: the folder exists and is not empty or cannot be written, or the checkpoint cannot be read.
    """
    if os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder. Give a new name.")
    module.configure_model()
    module.policy_model.load_state_dict(checkpoint_weights(checkpoint))
    trainable = [one.dtype for one in module.policy_model.parameters() if one.requires_grad]
    trained = max(trainable, key=lambda one: one.itemsize)
    written = module.policy.stored_dtype() if dtype == "auto" else getattr(torch, dtype)
    try:
        export(module.policy_model, module.tokenizer, out, written, adapter_only=adapter_only)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror or error}). Free disk space, make the folder above it "
            "writable, or give another name."
        ) from error
    module.teardown("export")
    told = f"wrote {'the adapters to ' if adapter_only else ''}{out} in {_name(written)}"
    if written.itemsize < trained.itemsize:
        told += f", the dtype of {module.policy_path}" if dtype == "auto" else ""
        told += f"; the trained weights are {_name(trained)}, which --dtype {_name(trained)} writes unrounded"
    return told


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
