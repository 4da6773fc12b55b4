"""Options of the policy loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from app.objective.ratios import check_choice
from datamodules.errors import UserError

_CHOICES = {
    "form": ("clip", "cispo", "sapo", "clip_cov", "kl_cov", "dppo_tv", "geo_mean", "gpg", "vespo"),
    "ratio_level": ("token", "sequence"),
    "clip_center": ("old", "behaviour"),
    "importance_level": ("token", "sequence"),
    "importance_mode": ("truncate", "mask"),
    "kl_estimator": ("k1", "k2", "k3"),
}

_OWN_RATIO = ("clip_cov", "kl_cov", "dppo_tv", "geo_mean", "vespo")


@dataclass(frozen=True)
class SurrogateOptions:
    """Choice of the loss within the GRPO family (`configs/objective/` has the published ones).

    Args:
        form: how a ratio far from 1 is bounded: "clip" stops its gradient outside the clip range (PPO, GRPO, DAPO,
            GSPO), "cispo" keeps every token's gradient and bounds its weight, "sapo" fades it out smoothly, "clip_cov"
            and "kl_cov" hold back the tokens that lower the entropy most, "dppo_tv" bounds the change of a token's
            probability, "geo_mean" (GMPO) clips log-ratios and takes their mean over the completion, "vespo" weighs a
            completion by a smooth function of its ratio, "gpg" uses no ratio.
        epsilon_low: the clip range starts at `1 - epsilon_low`; of log-ratios ("geo_mean") and of changes of
            probability ("dppo_tv") at `-epsilon_low`.
        epsilon_high: the clip range ends at `1 + epsilon_high`, or at `epsilon_high`.
        dual_clip: at negative advantages, stop the gradient of larger ratios too; above `1 + epsilon_high`, usually 3;
            null turns it off. Only with `form: clip`.
        cispo_cap: largest weight of a token's gradient. Only with `form: cispo`.
        cispo_floor: smallest one; 0 is none. Only with `form: cispo`.
        sapo_tau_positive: how fast the gradient fades at positive advantages. Only with `form: sapo`.
        sapo_tau_negative: how fast it fades at the other advantages. Only with `form: sapo`.
        cov_fraction: share of a micro-batch's tokens that are held back. Only with `form: clip_cov` and `kl_cov`.
        cov_low: smallest covariance of a token that may be held back. Only with `form: clip_cov`.
        cov_high: largest one. Only with `form: clip_cov`.
        kl_cov_coef: factor of the penalty on what is held back. Only with `form: kl_cov`.
        dppo_cap: largest weight of a token's gradient. Only with `form: dppo_tv`.
        vespo_k_positive: power of the weight at advantages of 0 or more. Only with `form: vespo`.
        vespo_lambda_positive: its decay there. Only with `form: vespo`.
        vespo_k_negative: power of the weight at negative advantages. Only with `form: vespo`.
        vespo_lambda_negative: its decay there. Only with `form: vespo`.
        ratio_level: "token", or "sequence": the geometric mean over the completion (GSPO), which needs a far narrower
            clip range. The importance weights of tokens then count by their mean over the completion.
        clip_center: policy that the ratio is relative to: "old" (before this update) or "behaviour" (the sampler).
        importance_cap: largest importance weight `pi_old / mu`; `.inf` for none. Only with `clip_center: old`.
        importance_level: "token", or "sequence": the product over the completion, which is unbiased and has the
            highest variance. Only with `clip_center: old`.
        importance_mode: what happens to a weight above the cap: "truncate" lowers it to the cap (TIS), "mask" sets it
            to 0 (MIS). Only with `clip_center: old`.
        beta: factor of the KL to the reference policy; 0 needs no reference.
        kl_estimator: "k1", "k2" or "k3". Without `kl_corrected` only k2 has the gradient of KL(pi || ref); k1's is 0
            on average.
        kl_corrected: multiply the KL estimate by the ratio and the importance weight, which gives k1 and k3 the
            gradient of KL(pi || ref), on replayed tokens too.
        entropy_coef: factor of the entropy bonus.
        off_policy_mask_threshold: leave out completions with a negative advantage whose mean `log(mu / pi)` is above
            it, e.g. 0.5; null keeps all.
        top_entropy_quantile: share of a micro-batch's tokens that count, those with the highest entropy; 1 is all.
    """

    form: Literal["clip", "cispo", "sapo", "clip_cov", "kl_cov", "dppo_tv", "geo_mean", "gpg", "vespo"] = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    cispo_floor: float = 0.0
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    cov_fraction: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    kl_cov_coef: float = 1.0
    dppo_cap: float = 20.0
    vespo_k_positive: float = 2.0
    vespo_lambda_positive: float = 3.0
    vespo_k_negative: float = 3.0
    vespo_lambda_negative: float = 2.0
    ratio_level: Literal["token", "sequence"] = "token"
    clip_center: Literal["old", "behaviour"] = "old"
    importance_cap: float = 2.0
    importance_level: Literal["token", "sequence"] = "token"
    importance_mode: Literal["truncate", "mask"] = "truncate"
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_corrected: bool = False
    entropy_coef: float = 0.0
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            check_choice(f"surrogate.{name}", getattr(self, name), valid)
        mask_fits = self.off_policy_mask_threshold is None or 0 < self.off_policy_mask_threshold < math.inf
        dual_clip_fits = self.dual_clip is None or 1 + self.epsilon_high < self.dual_clip < math.inf
        for name, fits, expected in [
            ("epsilon_low", 0 <= self.epsilon_low <= 1, "a number in [0, 1]"),
            ("epsilon_high", self.epsilon_high >= 0, "0 or more"),
            ("dual_clip", dual_clip_fits, "null or a number above 1 + epsilon_high"),
            ("cispo_cap", self.cispo_cap > 0, "a number above 0"),
            ("cispo_floor", 0 <= self.cispo_floor <= self.cispo_cap, "a number from 0 to cispo_cap"),
            ("sapo_tau_positive", 0 < self.sapo_tau_positive < math.inf, "a number above 0"),
            ("sapo_tau_negative", 0 < self.sapo_tau_negative < math.inf, "a number above 0"),
            ("cov_fraction", 0 < self.cov_fraction <= 1, "a number above 0, at most 1"),
            ("cov_high", self.cov_low < self.cov_high, "a number above cov_low"),
            ("kl_cov_coef", 0 <= self.kl_cov_coef < math.inf, "0 or more"),
            ("dppo_cap", self.dppo_cap > 0, "a number above 0"),
            *(
                (f"vespo_{name}_{sign}", 0 < getattr(self, f"vespo_{name}_{sign}") < math.inf, "a number above 0")
                for name in ("k", "lambda")
                for sign in ("positive", "negative")
            ),
            ("off_policy_mask_threshold", mask_fits, "null or a number above 0"),
            ("top_entropy_quantile", 0 < self.top_entropy_quantile <= 1, "a number above 0, at most 1"),
            ("importance_cap", self.importance_cap > 0, "a number above 0"),
            ("beta", 0 <= self.beta < math.inf, "0 (no reference) or more"),
            ("entropy_coef", math.isfinite(self.entropy_coef), "a number; 0 is off"),
        ]:
            if not fits:
                raise UserError(f"surrogate.{name} is {getattr(self, name)}; set it to {expected}.")
        if self.dual_clip is not None and self.form != "clip":
            raise UserError(
                f"surrogate.dual_clip is {self.dual_clip} with form={self.form!r}, but only form 'clip' has a clip "
                "range. Set dual_clip to null or form to clip."
            )
        if self.ratio_level == "sequence" and self.form in (*_OWN_RATIO, "gpg"):
            raise UserError(
                f"surrogate.ratio_level is 'sequence' with form={self.form!r}, which reads each token's own ratio. Set "
                "ratio_level to token."
            )
        if self.clip_center == "behaviour" and (self.importance_level, self.importance_mode) != ("token", "truncate"):
            raise UserError(
                f"surrogate.clip_center is 'behaviour' with importance_level={self.importance_level!r} and "
                f"importance_mode={self.importance_mode!r}, but a ratio to the behaviour policy has no importance "
                "weight. Leave both at their defaults or set clip_center to old."
            )
        if self.kl_corrected and not self.beta:
            raise UserError("surrogate.kl_corrected is true with beta=0: no KL term to correct. Set beta above 0.")

    @property
    def needs_sequences(self) -> bool:
        """True if the loss of a token depends on the others of its sequence."""
        return (
            "sequence" in (self.ratio_level, self.importance_level)
            or self.form in ("geo_mean", "vespo")
            or self.off_policy_mask_threshold is not None
        )
