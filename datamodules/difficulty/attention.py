"""The trained difficulty predictor: attention over reference prompts (DOTS, arXiv 2506.05316, section 4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # torch's own name for it

from datamodules.difficulty.cache import cached_embeddings, hash_texts
from datamodules.difficulty.calibration import BOUNDS, HEADS, CalibrationName
from datamodules.errors import UserError

CHUNK = 8192
ROWS = 2048
SAME = 1e-4
"""Squared distance below which an input counts as a centre, with room for float32 rounding."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class InputScale(nn.Module):
    """`(x - shift) * scale` per component, the identity at first; drops components in training."""

    shift: Tensor
    scale: Tensor

    def __init__(self, features: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.dropout = dropout

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.dropout((embeddings - self.shift) * self.scale, self.dropout, self.training)


class KernelRidgeAdapter(nn.Module):
    """Adapter from kernel ridge regressions: their centred forecast, followed by components of the text.

    Maps scaled embeddings `u` `[N, E]` to `[N, 1 + R]`: first
    `gain * (sum_m sum_j a_mj exp(-sum_b t_mb |u_b - c_jb|^2 / 2) - own)` over members m, centres j and blocks b of
    components, then `u @ basis`.

    With this adapter for queries and references, attention weighs reference i by `exp(f_q f_i)`: the references'
    success rates, tilted towards the side of the question's own forecast f_q. A training question's forecast has seen
    its own outcome, which would overstate the spread of the references' forecasts; `own`, the contribution of that
    outcome, is therefore subtracted. The basis of the reference adapter is zero: attention does not read the
    components, only selectors that compare prompts by their query vectors do. `width` is `1 + R`.
    """

    centres: Tensor
    coefficients: Tensor
    precision: Tensor
    own: Tensor
    basis: Tensor
    gain: Tensor

    def __init__(self, centres: int, features: int, width: int, blocks: Sequence[int], members: int) -> None:
        super().__init__()
        self.blocks = list(blocks)
        self.register_buffer("centres", torch.zeros(centres, features))
        self.register_buffer("coefficients", torch.zeros(members, centres))
        self.register_buffer("precision", torch.ones(members, len(blocks)))
        self.register_buffer("own", torch.zeros(centres))
        self.register_buffer("basis", torch.zeros(features, width - 1))
        self.register_buffer("gain", torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        parts = []
        for rows in inputs.split(ROWS):
            squared = torch.stack(
                [
                    ((u**2).sum(1, keepdim=True) + (c**2).sum(1) - 2 * u @ c.T).clamp(min=0)
                    for u, c in zip(rows.split(self.blocks, 1), self.centres.split(self.blocks, 1), strict=True)
                ]
            )
            same = (squared.sum(0) < SAME).float()
            forecast = -same @ self.own
            for precision, coefficients in zip(self.precision, self.coefficients, strict=True):
                forecast += torch.exp(-0.5 * torch.einsum("b,bnk->nk", precision, squared)) @ coefficients
            parts.append(torch.cat([self.gain * forecast[:, None], rows @ self.basis], dim=1))
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """Shape of a predictor.

    Attributes:
        in_features: components `E` of its embeddings.
        width: hidden and output width `D` of the adapters.
        depth: linear layers of an adapter.
        dropout: dropout probability in the adapters during training.
        input_dropout: dropout probability of embedding components during training.
        centres: 0 for DOTS' adapters; else both adapters are kernel ridge regressions on this many training questions,
            with `width - 1` principal components of the text.
        blocks: components of each encoder that was joined into the embeddings of a kernel ridge regression; empty for
            one block.
        members: regressions that are added up.
        calibration: head trained with it.
        encoder: text encoder of its embeddings (see `encoders.py`); None for the policy's initial weights.
    """

    in_features: int
    width: int = 896
    depth: int = 3
    dropout: float = 0.1
    input_dropout: float = 0.0
    centres: int = 0
    blocks: Sequence[int] = ()
    members: int = 1
    calibration: CalibrationName = "group_logit_temperature"
    encoder: str | None = None


def _adapter(config: PredictorConfig) -> nn.Module:
    """Return DOTS' adapter (LayerNorm, linear layers with GELU and dropout in between, LayerNorm) or the ridge one."""
    features, width = config.in_features, config.width
    if config.centres:
        return KernelRidgeAdapter(config.centres, features, width, config.blocks or [features], config.members)
    layers: list[nn.Module] = [nn.LayerNorm(features)]
    for _ in range(config.depth - 1):
        layers += [nn.Linear(features, width), nn.GELU(), nn.Dropout(config.dropout)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, width), nn.LayerNorm(width))


class AttentionPredictor(nn.Module):
    """`d_hat_q = softmax_i(z_q . z_i / sqrt(D)) @ d`, followed by a calibration head.

    Query and reference adapters are separate. The weights sum to one, so averaging success rates instead of
    difficulties gives `1 - d_hat`; all values here are success rates. In training a reference has one dropout mask for
    all questions of a batch, where the authors draw one for each pair of question and reference.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs = InputScale(config.in_features, config.input_dropout)
        self.query, self.reference = _adapter(config), _adapter(config)
        self.head = HEADS[config.calibration]()

    def weights(self, queries: Tensor, references: Tensor) -> Tensor:
        """Return the weights `[N, K]` of the references `[K, E]` for the queries `[N, E]`; rows sum to one."""
        keys = self.reference(self.inputs(references))
        return torch.softmax(self.query(self.inputs(queries)) @ keys.T / self.config.width**0.5, dim=-1)

    def forward(self, queries: Tensor, references: Tensor, rates: Tensor) -> Tensor:
        """Return calibrated success rates `[N]` from embeddings `[N, E]`, `[K, E]` and the references' rates `[K]`."""
        return self.head(self.weights(queries, references) @ rates, rates)

    def fingerprint(self) -> str:
        """Return a hash of the configuration and weights."""
        digest = hashlib.blake2b(repr(self.config).encode(), digest_size=16)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> AttentionPredictor:
        """Load a saved predictor in evaluation mode. Raises UserError if the folder has none."""
        try:
            saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            config = PredictorConfig(**saved | {"blocks": tuple(saved.get("blocks", ()))})
            if config.calibration not in BOUNDS:
                raise ValueError(f"unknown calibration {config.calibration!r}")
            predictor = cls(config)
            weights = load_file(folder / WEIGHTS)
            if config.centres and "members" not in saved:  # a regression of before there were several
                for adapter in ("query", "reference"):
                    weights[f"{adapter}.coefficients"] = weights[f"{adapter}.coefficients"][None]
                    weights[f"{adapter}.precision"] = torch.ones(1, 1)
            predictor.load_state_dict(weights)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{str(folder)!r} holds no difficulty predictor ({str(error).splitlines()[0]}), expected a folder with "
                f"{CONFIG} and {WEIGHTS}. Train one or leave `predictor` out."
            ) from None
        return predictor.eval().requires_grad_(False)


class AttentionSpace:
    """Adapter outputs of a whole pool, computed once and cached on disk.

    Args:
        predictor: predictor in evaluation mode.
        embeddings: float32 `[Q, E]`.
        key: key of the embeddings' content.
        cache_dir: folder of the cache.

    Attributes:
        queries: float32 `[Q, D]` query vectors `z_q`.
    """

    def __init__(self, predictor: AttentionPredictor, embeddings: np.ndarray, key: str, cache_dir: Path) -> None:
        config = predictor.config
        if embeddings.shape[1] != config.in_features:
            raise UserError(
                f"The encoder gives {embeddings.shape[1]} components, the difficulty predictor expects "
                f"{config.in_features}. Set `encoder` to the one of its training ({config.encoder or 'the policy'})."
            )
        self.predictor, self.embeddings = predictor, embeddings
        name, rows = hash_texts(("attention", predictor.fingerprint(), key)), len(embeddings)
        self.queries = cached_embeddings(
            cache_dir, name, rows, lambda: config.width, lambda out: self._adapt(predictor.query, embeddings, out)
        )

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """Return the reference vectors `z_i`, float32 `[K, D]`."""
        out = np.empty((len(positions), self.predictor.config.width), dtype=np.float32)
        self._adapt(self.predictor.reference, self.embeddings[positions], out)
        return out

    def scale(self, similarity: np.ndarray, rates: np.ndarray) -> float:
        """Return 1 / sqrt(D)."""
        return float(self.predictor.config.width**-0.5)

    @torch.inference_mode()
    def _adapt(self, adapter: nn.Module, embeddings: np.ndarray, out: np.ndarray) -> None:
        for start in range(0, len(embeddings), CHUNK):
            chunk = torch.from_numpy(np.array(embeddings[start : start + CHUNK], dtype=np.float32))
            out[start : start + CHUNK] = adapter(self.predictor.inputs(chunk)).numpy()
