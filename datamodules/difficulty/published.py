"""Predictors in the file layout of DOTS' authors (torch files of their `adaptive_difficulty_prediction`)."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from datamodules.difficulty.attention import AttentionPredictor, PredictorConfig
from datamodules.difficulty.calibration import CalibrationName
from datamodules.errors import UserError

STATE, PREFIX = "model_state_dict", "regressor."
_ADAPTERS = {"sim_head.query_proj.": "query.", "sim_head.ref_proj.": "reference."}


def read_published(path: Path, encoder: str) -> AttentionPredictor:
    """Read a predictor that the authors' code saved: `{"model_state_dict": {"regressor....": tensor}, ...}`.

    Its adapters are `sim_head.query_proj` and `sim_head.ref_proj`, its calibration `mlp` (group logit temperature),
    `scale` and `res_scale` (Platt), `scale` alone (temperature) or nothing. Weights of an encoder trained along are not
    read. Their head divides the references' deviation by K - 1, ours by K.

    Args:
        path: torch file; nothing in it is executed.
        encoder: text encoder that the predictor was trained with, stored with it.

    Raises:
        UserError: the file cannot be read, or is not such a predictor.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of their training
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise _refused(
            path, f"cannot be read as a torch file of weights ({str(error).strip().splitlines()[0]})"
        ) from None
    state = content.get(STATE) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise _refused(path, f"holds {keys[:100]}")
    found = {
        str(name).removeprefix(PREFIX): value.float()
        for name, value in state.items()
        if str(name).startswith(PREFIX) and isinstance(value, Tensor)
    }
    weights = {
        ours + name.removeprefix(theirs): value
        for name, value in found.items()
        for theirs, ours in _ADAPTERS.items()
        if name.startswith(theirs)
    }
    linear = [value for name, value in weights.items() if re.fullmatch(r"query\.\d+\.weight", name) and value.ndim == 2]
    if not linear:
        raise _refused(path, f"holds {', '.join(map(str, state))[:100] or 'no weights'} in {STATE}")
    calibration: CalibrationName = "none"
    if "mlp.0.weight" in found:
        calibration = "group_logit_temperature"
        weights |= {f"head.network.{n.removeprefix('mlp.')}": v for n, v in found.items() if n.startswith("mlp.")}
    elif "res_scale" in found:
        calibration = "platt"
        weights |= {"head.slope": found["scale"].reshape(()), "head.bias": found["res_scale"].reshape(())}
    elif "scale" in found:
        calibration = "temperature"
        weights["head.log_temperature"] = found["scale"].reshape(()).log()
    width, features = linear[0].shape
    predictor = AttentionPredictor(
        PredictorConfig(features, width, depth=len(linear), calibration=calibration, encoder=encoder)
    )
    inputs = {f"inputs.{name}": tensor for name, tensor in predictor.inputs.state_dict().items()}
    try:
        predictor.load_state_dict(weights | inputs)
    except RuntimeError as error:
        raise _refused(path, f"has weights that do not fit together ({' '.join(str(error).split())[:200]})") from None
    return predictor.eval().requires_grad_(False)


def _refused(path: Path, fault: str) -> UserError:
    return UserError(
        f"{str(path)!r} {fault}, expected the authors' predictor: a torch file with {STATE} whose names start with "
        f"{PREFIX}sim_head.query_proj. Name the file that their training wrote (model_final.pt)."
    )
