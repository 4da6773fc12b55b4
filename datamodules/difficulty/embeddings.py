"""Question embeddings: pooled hidden states of a frozen model, computed once per pool and cached on disk.

DOTS (arXiv 2506.05316, section 4) embeds the raw question text as the mean of the last hidden states.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from datamodules.difficulty.cache import cached_embeddings, hash_texts
from datamodules.difficulty.pooling import PoolingRecipe, pool, read_recipe
from datamodules.errors import UserError

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 16384
QUESTIONS_PER_BLOCK = 4096
FILES = (".json", ".safetensors", ".bin", ".txt", ".model")


class TextEncoder:
    """A frozen text encoder whose weights are loaded by the first `encode`.

    Args:
        name: folder or hub name of any Hugging Face model (without the language-model head of a causal LM), or a
            sentence-transformers folder.
        device: device to run on, e.g. "cuda:0"; None for the first GPU, else the CPU.
        layer: number of layers after which states are taken (0: the token embeddings), before any final normalisation;
            None for the model's output. The middle layers of a language model often describe a text better than the
            last one, which predicts the next token.
    """

    def __init__(self, name: str, device: str | None = None, layer: int | None = None) -> None:
        self.folder = _locate(name)
        self.layer = layer
        self.recipe: PoolingRecipe = read_recipe(self.folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @cached_property
    def identity(self) -> str:
        """Hash of everything but the text that a vector depends on: settings, configuration, tokenizer and weights."""
        recipe = self.recipe
        settings: list[object] = [recipe.pooling, recipe.normalize, recipe.max_length, recipe.prefix, recipe.lower]
        # Reduced-precision weights run as they are only on an accelerator, so the kind of device matters.
        settings += [self.device.type] if self.layer is None else [self.device.type, self.layer]
        digest = hashlib.blake2b(repr((*settings, "v1")).encode(), digest_size=16)
        for path in sorted(self.recipe.model.iterdir()):
            if path.suffix in FILES and path.is_file():
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    @cached_property
    def width(self) -> int:
        """Number of components `E`."""
        config = self._model.config.get_text_config()
        layers = int(config.num_hidden_layers)
        if self.layer is not None and not 0 <= self.layer <= layers:
            raise UserError(
                f"layer {self.layer} of encoder {self.folder} does not exist, expected one from 0 to {layers}. "
                "Change the number after @."
            )
        return int(config.hidden_size)

    def encode(self, questions: Sequence[str], out: np.ndarray | None = None) -> np.ndarray:
        """Return the vectors of raw question texts, float32 `[Q, E]`, written into the zeroed `out` if given.

        A text without tokens gets the zero vector.
        """
        out = np.zeros((len(questions), self.width), dtype=np.float32) if out is None else out
        by_length = np.argsort([len(question) for question in questions], kind="stable")[::-1]
        for start in range(0, len(by_length), QUESTIONS_PER_BLOCK):
            positions = by_length[start : start + QUESTIONS_PER_BLOCK]
            texts = [self.recipe.prefix + questions[position] for position in positions]
            if self.recipe.lower:
                texts = [text.lower() for text in texts]
            tokens = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
            for rows in _batches(tokens):
                out[positions[rows]] = self._forward([tokens[row] for row in rows])
            log.info("Embedded %d of %d questions.", start + len(positions), len(by_length))
        return out

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]]) -> np.ndarray:
        lengths = torch.tensor([len(ids) for ids in tokens])
        padded = torch.zeros(len(tokens), int(lengths.max()), dtype=torch.long)
        for row, ids in enumerate(tokens):
            padded[row, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        inputs = {"input_ids": padded.to(self.device), "attention_mask": mask.to(self.device)}
        if self.layer is None:
            states = self._model(**inputs).last_hidden_state
        else:
            states = self._model(**inputs, output_hidden_states=True).hidden_states[self.layer]
        vectors = pool(states.float(), lengths.to(self.device), self.recipe.pooling)
        if self.recipe.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        if not bool(torch.isfinite(vectors).all()):
            raise UserError(
                f"encoder {self.folder} gives infinite or NaN vectors, expected finite ones. Use other weights."
            )
        return vectors.cpu().numpy()

    @cached_property
    def _max_length(self) -> int:
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        limits = (self._tokenizer.model_max_length, 1 << 20, self.recipe.max_length, positions)
        return int(min(limit for limit in limits if limit))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        dtype: Any = torch.float32 if self.device.type == "cpu" else "auto"
        model = self._load(AutoModel, dtype=dtype, use_safetensors=True).to(self.device).eval().requires_grad_(False)
        model.config.use_cache = False
        return model

    def _load(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.recipe.model, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"encoder {self.folder} cannot be loaded by {kind.__name__} ({str(error).strip().splitlines()[0]}), "
                "expected config.json, weights in safetensors and a tokenizer. Name another folder."
            ) from error

    def unload(self) -> None:
        """Free the model's memory."""
        self.__dict__.pop("_model", None)


def embed_questions(questions: Sequence[str], encoder: TextEncoder, cache_dir: Path) -> tuple[np.ndarray, str]:
    """Return the vectors of `Q` raw questions, float32 `[Q, E]`, from the disk cache if possible, and their key."""
    key = hash_texts(("embeddings", encoder.identity, hash_texts(questions)))
    matrix = cached_embeddings(
        cache_dir, key, len(questions), lambda: encoder.width, lambda out: encoder.encode(questions, out)
    )
    encoder.unload()
    return matrix, key


def _batches(tokens: list[list[int]]) -> Iterator[np.ndarray]:
    """Yield the rows of non-empty texts, longest first, in batches of `TOKENS_PER_BATCH` padded tokens."""
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    while len(order):
        count = max(1, TOKENS_PER_BATCH // int(lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def _locate(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in FILES]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"encoder {name!r} is neither a folder nor a model of the hub ({str(error).splitlines()[0]}), expected a "
            "model. Name a model folder, or a hub model that can be reached from here."
        ) from None
