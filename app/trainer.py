"""The Trainer, with the subcommands of `dots` that Lightning does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from app import policy as policies
from app.run_table import print_run_table
from datamodules.errors import UserError

_PREFIX = "policy_model."


class DotsTrainer(Trainer):
    """Lightning's Trainer plus `describe` and `export`; its arguments are Lightning's."""

    def describe(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        world_size: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Prints the table of a run without loading weights or data.

        Args:
            model: the module of the run.
            datamodule: the data of the run.
            world_size: processes to describe; those of trainer.devices and trainer.num_nodes by default.
            ckpt_path: not used; the config.yaml of a run names it.
            weights_only: not used, likewise.
        """
        print_run_table(
            model,
            datamodule,
            self.callbacks,  # type: ignore[attr-defined]  # set by the connector
            policy=model.policy.on_meta(),  # type: ignore[union-attr,operator]
            world_size=world_size or self.world_size,
            max_steps=self.max_steps,
        )

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        out: str,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Writes the policy of a checkpoint as a Hugging Face folder that `from_pretrained` loads.

        Args:
            model: the module of the run.
            ckpt_path: a checkpoint file, or "last".
            out: the folder to write; it must not exist or be empty.
            datamodule: not used; the config.yaml of a run names one.
            weights_only: not used, likewise: a checkpoint is never unpickled.
        """
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {out}: exists and is not an empty folder; give a new one")
        module: Any = model
        module.configure_model()
        weights = policy_weights(Path(ckpt_path))
        module.policy_model.load_state_dict(weights)
        policies.export(module.policy_model, module.tokenizer, folder)
        module.teardown("export")
        print(f"wrote {folder}")


def policy_weights(path: Path) -> dict[str, Any]:
    """The policy's tensors of a checkpoint. Raises UserError when the file is not a checkpoint of ours."""
    if not path.is_file():
        raise UserError(
            f"--ckpt_path {path}: no such file; expected a checkpoint, e.g. runs/NAME/version_0/checkpoints/last.ckpt"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise UserError(f"--ckpt_path {path}: cannot be read as a checkpoint ({type(error).__name__})") from error
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
