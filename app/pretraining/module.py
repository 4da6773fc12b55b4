"""Supervised pretraining of a tiny policy on imperfect demonstrations (`make tiny-policy`)."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from app.pretraining.card import Measured, write_card
from app.rewards import ReasoningGym
from datamodules.demonstrations import ANSWER_MARKER
from datamodules.demonstrations.calls import Calls
from datamodules.demonstrations.supervised import IGNORED, DemonstrationBatch, Demonstrations, Entry


class CalculatorReplies(LogitsProcessor):
    """Lets a calculator write the tokens that follow a call, in a single call of `generate`."""

    def __init__(self, calls: Calls, tokenizer: PreTrainedTokenizerBase) -> None:
        self.calls, self.tokenizer = calls, tokenizer
        end = tokenizer.convert_tokens_to_ids(calls.end)
        assert isinstance(end, int), "of one token"
        self.end = end
        self.waiting: dict[int, list[int]] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row in input_ids[:, -1].eq(self.end).nonzero().flatten().tolist():
            reply = self.calls.answer(str(self.tokenizer.decode(input_ids[row])))
            self.waiting[row] = self.tokenizer(reply)["input_ids"]
        for row, tokens in list(self.waiting.items()):
            scores[row] = -torch.inf
            scores[row, tokens[0]] = 0.0
            self.waiting[row] = tokens[1:]
            if not tokens[1:]:
                del self.waiting[row]
        return scores


class DemonstrationPretraining(L.LightningModule):
    """Trains a small Qwen2 by cross-entropy on completions and exports it as a Hugging Face folder at the end.

    Validation samples completions at temperature 1 and scores them with reasoning-gym's own scorers. It logs
    `val/accuracy` and `val/informative_fraction`, the fraction of groups of 8 with both correct and wrong completions.

    Args:
        output_dir: Hugging Face folder to write.
        layers: decoder layers.
        width: hidden size.
        heads: attention heads, and as many key-value heads.
        inner: width of the feed-forward layers.
        initializer_range: standard deviation of the initial weights. With 0.06 the policy learns to copy in far fewer
            steps than with the 0.02 of large models.
        learning_rate: peak learning rate, after a linear warm-up; then it follows a cosine down to a twentieth.
        warmup_steps: optimizer steps of the warm-up.
        weight_decay: weight decay of AdamW.
        clip_norm: norm to which gradients are clipped.
        val_samples: completions per validation prompt.
        max_completion_tokens: maximum length of a sampled completion.
    """

    policy: Qwen2ForCausalLM
    measured: Measured | None = None

    def __init__(
        self,
        output_dir: Path,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        inner: int = 384,
        initializer_range: float = 0.06,
        learning_rate: float = 2e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.01,
        clip_norm: float = 1.0,
        val_samples: int = 16,
        max_completion_tokens: int = 96,
    ) -> None:
        super().__init__()
        self.output_dir = Path(output_dir)
        self.config = partial(
            Qwen2Config,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=inner,
            initializer_range=initializer_range,
        )
        self.learning_rate, self.warmup_steps, self.weight_decay = learning_rate, warmup_steps, weight_decay
        self.clip_norm, self.val_samples, self.max_completion_tokens = clip_norm, val_samples, max_completion_tokens
        self._successes: dict[str, list[np.ndarray]] = {}
        self._started = time.monotonic()

    @property
    def data(self) -> Demonstrations:
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it when one is given

    def configure_model(self) -> None:
        if "policy" in self._modules:  # Lightning calls this again for each stage
            return
        tokenizer = self.data.tokenizer
        config = self.config(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.policy = Qwen2ForCausalLM(config)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.98), fused=True
        )
        total = self.trainer.max_steps if self.trainer.max_steps > 0 else len(self.data.train_dataloader())

        def factor(step: int) -> float:
            progress = min(1.0, step / max(1, total))
            return min(1.0, (step + 1) / self.warmup_steps) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: object, **__: object) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=self.clip_norm, gradient_clip_algorithm="norm")

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of completion tokens. Only their hidden states are projected to logits."""
        states = self.policy.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        hidden = states.last_hidden_state[:, :-1]
        targets = batch.labels[:, 1:]
        learnt = targets != IGNORED
        loss = F.cross_entropy(self.policy.lm_head(hidden[learnt]), targets[learnt])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    @torch.no_grad()
    def validation_step(self, batch: list[Entry], batch_idx: int) -> None:
        """Sample solutions for entries of one task and append an array `[len(batch), G]` of 0 and 1 to `_successes`."""
        tokenizer = self.data.tokenizer
        inputs = tokenizer([entry["question"] + "\n" for entry in batch], return_tensors="pt", padding=True)
        calls = self.data.calls
        sampled = self.policy.generate(  # type: ignore[misc]  # the stub's `self` type does not match
            **inputs.to(self.device),
            logits_processor=LogitsProcessorList([CalculatorReplies(calls, tokenizer)] if calls else []),
            generation_config=self._generation(num_return_sequences=self.val_samples),
        )
        ids = sampled[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = [entry for entry in batch for _ in range(self.val_samples)]
        columns = {key: [row[key] for row in rows] for key in ("answer", "metadata", "question")}
        scores = ReasoningGym(after=ANSWER_MARKER)(columns["question"], texts, ids.tolist(), **columns)
        success = np.array(scores, dtype=float).reshape(len(batch), self.val_samples)
        self._successes.setdefault(batch[0]["metadata"]["source_dataset"], []).append(success)

    def on_validation_epoch_end(self) -> None:
        self.measured = Measured.of({task: np.concatenate(parts) for task, parts in self._successes.items()})
        self._successes = {}
        self.log("val/accuracy", self.measured.accuracy, prog_bar=True)
        self.log("val/informative_fraction", self.measured.informative)
        for task, accuracy in self.measured.by_task.items():
            self.log(f"val/accuracy_{task}", accuracy)

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            self.export()

    def export(self) -> None:
        """Write float32 weights, tokenizer, generation settings and, if there was a validation, the model card."""
        self.policy.float().eval()
        self.policy.generation_config = self._generation()
        self.policy.save_pretrained(self.output_dir)
        self.data.tokenizer.save_pretrained(self.output_dir)
        if self.measured is None:
            (self.output_dir / "README.md").unlink(missing_ok=True)  # a card there would describe other weights
            rank_zero_warn(f"Training ended before any validation, so {self.output_dir} has no model card.")
            return
        seconds = time.monotonic() - self._started
        write_card(self.output_dir, self.data, self.measured, self.policy.num_parameters(), seconds)

    def _generation(self, **more: int) -> GenerationConfig:
        tokenizer = self.data.tokenizer
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_completion_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **more,
        )
