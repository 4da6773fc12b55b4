"""Which loss of the GRPO family: one set of options, checked together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datamodules.errors import UserError, nearest

_NAMES = {
    "form": ("clip", "cispo", "sapo"),
    "ratio_level": ("token", "sequence"),
    "clip_center": ("old", "behaviour"),
    "importance_level": ("token", "sequence"),
    "importance_mode": ("truncate", "mask"),
    "kl_estimator": ("k1", "k2", "k3"),
}


@dataclass(frozen=True)
class SurrogateOptions:
    """Which loss of the family (`configs/objective/` has the published ones).

    Args:
        form: how a ratio away from 1 is held back: "clip" stops its gradient outside the clip range (PPO, GRPO, DAPO,
            GSPO), "cispo" keeps the gradient of every token and bounds its weight, "sapo" lets it fade smoothly.
        epsilon_low: the clip range reaches down to `1 - epsilon_low`. Only with `form: clip`.
        epsilon_high: the clip range reaches up to `1 + epsilon_high`. Only with `form: clip`.
        dual_clip: at negative advantages a ratio beyond it gets no gradient either; above `1 + epsilon_high`, usually
            3; null for none. Only with `form: clip`.
        cispo_cap: largest weight of a token's gradient. Only with `form: cispo`.
        sapo_tau_positive: how fast the gradient fades at positive advantages. Only with `form: sapo`.
        sapo_tau_negative: the same at the others.
        ratio_level: "token", or "sequence": the geometric mean over the completion (GSPO), which needs a far narrower
            clip range. Importance weights per token then count by their mean over the completion.
        clip_center: policy that the ratio is relative to: "old" (before this update) or "behaviour" (that sampled).
        importance_cap: largest importance weight `pi_old / mu`; `.inf` for none. Only with `clip_center: old`.
        importance_level: "token", or "sequence": the product over the completion, which is what unbiasedness needs
            and what varies most. Only with `clip_center: old`.
        importance_mode: what happens above the cap: "truncate" to it (TIS), or "mask": the weight becomes 0 (MIS).
            Only with `clip_center: old`.
        beta: factor of the KL to the reference policy; 0 needs no reference.
        kl_estimator: "k1", "k2" or "k3". Of these only k2 has the gradient of KL(pi || ref) by itself; k1 has none on
            average.
        kl_corrected: multiply the KL estimate by the ratio and the importance weight, which gives k1 and k3 the
            gradient of KL(pi || ref), on replayed tokens too.
        entropy_coef: factor of the entropy bonus.
    """

    form: Literal["clip", "cispo", "sapo"] = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    ratio_level: Literal["token", "sequence"] = "token"
    clip_center: Literal["old", "behaviour"] = "old"
    importance_cap: float = 2.0
    importance_level: Literal["token", "sequence"] = "token"
    importance_mode: Literal["truncate", "mask"] = "truncate"
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_corrected: bool = False
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, valid in _NAMES.items():
            given = getattr(self, name)
            if given not in valid:
                raise UserError(f"{name}={given!r}: expected one of {', '.join(valid)}; {nearest(str(given), valid)}")
        numbers = [
            ("epsilon_low", 0 <= self.epsilon_low <= 1, "in [0, 1]"),
            ("epsilon_high", self.epsilon_high >= 0, "0 or more"),
            (
                "dual_clip",
                self.dual_clip is None or self.dual_clip > 1 + self.epsilon_high,
                "null, or above 1 + epsilon_high",
            ),
            ("cispo_cap", self.cispo_cap > 0, "above 0"),
            ("sapo_tau_positive", self.sapo_tau_positive > 0, "above 0"),
            ("sapo_tau_negative", self.sapo_tau_negative > 0, "above 0"),
            ("importance_cap", self.importance_cap > 0, "above 0"),
            ("beta", self.beta >= 0, "0 (no reference) or more"),
        ]
        for name, fine, expected in numbers:
            if not fine:
                raise UserError(f"{name}={getattr(self, name)}: expected {expected}")
        self._refuse_what_means_nothing()

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence."""
        return "sequence" in (self.ratio_level, self.importance_level)

    def _refuse_what_means_nothing(self) -> None:
        if self.dual_clip is not None and self.form != "clip":
            raise UserError(
                f"dual_clip={self.dual_clip} with form={self.form!r}: only form 'clip' has a clip range; "
                "set dual_clip: null or form: clip"
            )
        if self.clip_center == "behaviour" and (self.importance_level, self.importance_mode) != ("token", "truncate"):
            raise UserError(
                f"clip_center='behaviour' with importance_level={self.importance_level!r}, "
                f"importance_mode={self.importance_mode!r}: the ratio is relative to the behaviour policy already and "
                "has no importance weight; leave both at their defaults or set clip_center: old"
            )
        if self.kl_corrected and not self.beta:
            raise UserError("kl_corrected=True with beta=0: there is no KL term to correct; set beta above 0")
