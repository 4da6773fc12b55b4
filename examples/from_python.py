"""Plain GRPO on the sums of `math/`, from Python: `python examples/from_python.py` in a clone."""

from pathlib import Path

from lightning import seed_everything

from app.cli import DotsTrainer
from app.engines import Sampling
from app.module import GRPOModule, Policy
from app.rewards import Numeric
from app.update.optimization import Optimization
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile

HERE = Path(__file__).parent


def main(max_steps: int = 20) -> DotsTrainer:
    """Train, print the last validation accuracy and return the trainer."""
    seed_everything(0)
    module = GRPOModule(
        Policy(str(HERE.parent / "configs" / "tiny_policy")),
        rewards=[Numeric(after="#### ")],
        sampling=Sampling(num_generations=8, max_completion_length=64),
        val_sampling=Sampling(num_generations=4, max_completion_length=64),
        optimization=Optimization(learning_rate=3e-4),
    )
    problems = PromptFile(str(HERE / "math" / "problems.jsonl"), template="{question}\n")
    data = OnlinePromptDataModule(problems, prompts_per_step=8, val_size=24)
    trainer = DotsTrainer(max_steps=max_steps, accelerator="cpu")
    trainer.fit(module, datamodule=data)
    print(f"accuracy {trainer.callback_metrics['val/accuracy']:.2f} after {trainer.global_step} updates")
    return trainer


if __name__ == "__main__":
    main()
