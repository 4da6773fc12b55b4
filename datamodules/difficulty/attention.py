"""The trained difficulty predictor of DOTS (arXiv 2506.05316, section 4): attention over reference prompts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.difficulty.adapters import InputScale, KernelScore, mlp_adapter
from datamodules.difficulty.cache import cached_matrix, content_key
from datamodules.difficulty.calibration import BOUNDS, CalibrationName
from datamodules.difficulty.heads import make_head
from datamodules.errors import UserError

CHUNK = 8192
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """Shape of a predictor.

    Attributes:
        in_features: components `E` of the embeddings that it reads.
        width: hidden and output width `D` of the adapters.
        depth: linear layers of an adapter.
        dropout: dropout probability in the adapters, in training.
        input_dropout: dropout probability of embedding components, in training.
        centres: 0 for DOTS' adapters; else both adapters are the score of a kernel ridge regression with so many
            training questions, beside `width - 1` principal components of the text.
        calibration: head trained with it.
        encoder: text encoder of its embeddings (see `encoders.py`); None for the policy's own initial weights.
    """

    in_features: int
    width: int = 896
    depth: int = 3
    dropout: float = 0.1
    input_dropout: float = 0.0
    centres: int = 0
    calibration: CalibrationName = "group_logit_temperature"
    encoder: str | None = None


class AttentionPredictor(nn.Module):
    """`d_hat_q = softmax_i(z_q . z_i / sqrt(D)) @ d`, then a calibration head.

    Query and reference adapters are separate. Weights sum to one, so averaging success rates instead of difficulties
    gives `1 - d_hat`; everything here is in success rates.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs = InputScale(config.in_features, config.input_dropout)
        self.query, self.reference = _adapter(config), _adapter(config)
        self.head = make_head(config.calibration)

    def base(self, queries: Tensor, references: Tensor, rates: Tensor) -> Tensor:
        """Uncalibrated success rates `[N]` from embeddings `[N, E]`, `[K, E]` and the references' rates `[K]`."""
        return self.weights(queries, references) @ rates

    def weights(self, queries: Tensor, references: Tensor) -> Tensor:
        """`[N, K]`: what each reference counts for each query; rows sum to one."""
        keys = self.reference(self.inputs(references))
        return torch.softmax(self.query(self.inputs(queries)) @ keys.T / self.config.width**0.5, dim=-1)

    def forward(self, queries: Tensor, references: Tensor, rates: Tensor) -> Tensor:
        """Calibrated success rates `[N]`; arguments as in `base`."""
        return self.head(self.base(queries, references, rates), rates)

    def fingerprint(self) -> str:
        """Hash of the weights."""
        digest = hashlib.blake2b(repr(self.config).encode(), digest_size=16)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> AttentionPredictor:
        """The predictor that `save` wrote, in evaluation mode. Raises UserError where the folder holds none."""
        try:
            config = PredictorConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            if config.calibration not in BOUNDS:
                raise ValueError(f"unknown calibration {config.calibration!r}")
            predictor = cls(config)
            predictor.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{str(folder)!r} holds no difficulty predictor ({str(error).splitlines()[0]}), expected a folder with "
                f"{CONFIG} and {WEIGHTS}: train one, or leave `predictor` out"
            ) from None
        return predictor.eval().requires_grad_(False)


class AttentionSpace:
    """Adapter outputs of a whole pool; they are fixed, so they are computed once and kept on disk.

    Args:
        predictor: in evaluation mode.
        embeddings: float32 `[Q, E]`.
        key: names the embeddings' content.
        cache_dir: folder of the cache.
    """

    def __init__(self, predictor: AttentionPredictor, embeddings: np.ndarray, key: str, cache_dir: Path) -> None:
        config = predictor.config
        if embeddings.shape[1] != config.in_features:
            raise UserError(
                f"the encoder gives {embeddings.shape[1]} components, the difficulty predictor expects "
                f"{config.in_features}: name the `encoder` that it was trained with ({config.encoder or 'the policy'})"
            )
        self.predictor, self.embeddings = predictor, embeddings
        self.queries = cached_matrix(
            cache_dir.expanduser() / "embeddings" / f"{content_key('attention', predictor.fingerprint(), key)}.npy",
            rows=len(embeddings),
            width=lambda: config.width,
            fill=lambda out: _adapt(predictor, predictor.query, embeddings, out),
        )

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """`[K, D]` reference vectors `z_i`."""
        out = np.empty((len(positions), self.predictor.config.width), dtype=np.float32)
        _adapt(self.predictor, self.predictor.reference, self.embeddings[positions], out)
        return out

    def scale(self, similarity: np.ndarray, rates: np.ndarray) -> float:
        """1 / sqrt(D)."""
        return float(self.predictor.config.width**-0.5)


def _adapter(config: PredictorConfig) -> nn.Module:
    if config.centres:
        return KernelScore(config.centres, config.in_features, config.width)
    return mlp_adapter(config.in_features, config.width, config.depth, config.dropout)


@torch.inference_mode()
def _adapt(predictor: AttentionPredictor, adapter: nn.Module, embeddings: np.ndarray, out: np.ndarray) -> None:
    for start in range(0, len(embeddings), CHUNK):
        chunk = torch.from_numpy(np.array(embeddings[start : start + CHUNK], dtype=np.float32))
        out[start : start + CHUNK] = adapter(predictor.inputs(chunk)).numpy()
