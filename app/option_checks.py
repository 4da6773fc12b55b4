"""Options of the module that cannot be trained with, alone or together."""

from __future__ import annotations

from app.engines import Sampling
from app.objective.advantages import Scale
from datamodules.errors import UserError


def check_options(
    sampling: Sampling, advantage_scale: Scale, multi_objective_aggregation: str, at_least_one: dict[str, int]
) -> None:
    """Raises UserError for the first option that is wrong.

    Args:
        sampling: of the training completions.
        advantage_scale: what centred rewards are divided by.
        multi_objective_aggregation: when they are.
        at_least_one: options that count something, by name.
    """
    for name, given in at_least_one.items():
        if given < 1:
            raise UserError(f"model.{name}={given}: expected at least 1")
    if (multi_objective_aggregation, advantage_scale) == ("normalize_then_sum", "none"):
        raise UserError(
            "model.advantage_scale=none with multi_objective_aggregation=normalize_then_sum: nothing would be "
            "normalised; set advantage_scale to batch (GDPO) or group"
        )
    if sampling.num_generations < 2:
        raise UserError(
            f"model.sampling.num_generations={sampling.num_generations}: expected at least 2, "
            "because advantages are relative to the other completions of a prompt"
        )
    if sampling.truncates:
        raise UserError(
            "model.sampling truncates the distribution (temperature 0, top_p < 1 or top_k > 0): importance ratios "
            "would be wrong; set temperature > 0, top_p 1.0 and top_k 0 for training (val_sampling may truncate)"
        )
