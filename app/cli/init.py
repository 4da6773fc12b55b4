"""`dots init`: a config of one's own, from a data file, a model and a reward."""

from __future__ import annotations

import json
from pathlib import Path

from app.cli.commands import command_parser
from app.cli.dots import DotsCLI
from app.policy.model import Policy
from app.rewards.named import rewards_of
from datamodules.errors import UserError
from datamodules.prompts import PromptFile

_DESCRIPTION = (
    "Write a config for your own data, model and reward, and show three prompts as the policy will read them. Nothing "
    "is overwritten."
)
_CONFIG = """\
# Written by dots init. All options: dots fit --help
trainer:
  max_steps: 200
model:
  policy: {{path: {model}}}
  rewards: {reward}
  sampling: {{num_generations: 8, max_completion_length: {length}}}
data:
  train: {{{data}}}
  val_size: {val_size}  # prompts held out of train, on which accuracy is measured
  prompts_per_step: {prompts_per_step}
  selector: Posterior  # which prompts a step rolls out; Uniform is plain GRPO
"""
_STUB = Path("my_rewards.py")
_STUB_REWARD = "my_rewards.is_right"
_REWARD = '''\
def is_right(completions, answer, **columns):
    """Return a score for each completion, here 1 if its last word is the answer.

    Every column of the data is passed by name: `answer[i]` is the answer of the prompt of `completions[i]`.
    """
    return [float(text.split()[-1:] == [str(right)]) for text, right in zip(completions, answer)]
'''
_HELD_OUT, _PROMPTS_PER_STEP, _COMPLETION_LENGTH = 100, 32, 512


def main(args: list[str]) -> None:
    """Run `dots init` with the arguments that follow it."""
    parser = command_parser("init", _DESCRIPTION)
    parser.add_argument("--data", type=str, required=True, help="a data file, a folder or a hub name")
    parser.add_argument("--model", type=str, required=True, help="folder or hub name of the policy")
    parser.add_argument(
        "--reward",
        type=str,
        default=None,
        help=f"math, numeric, exact, or a function such as my_rewards.py:is_right; by default one to edit, in {_STUB}",
    )
    for name in ("prompt_column", "answer_column"):
        parser.add_argument(f"--{name}", type=str, default=None, help=f"{name.replace('_', ' ')}, if it is not found")
    parser.add_argument("--out", type=str, default="run.yaml", help="the config to write")
    given = parser.parse_args(args)

    out = Path(given.out)
    written = [out] if given.reward else [out, _STUB]
    for path in written:
        if path.exists() or path.is_symlink():
            instead = "give another --out" if path == out else f"name your function in it: --reward {_STUB}:is_right"
            raise UserError(f"{path} exists, and dots init overwrites nothing. Remove it, or {instead}.")
    policy = Policy(given.model)
    columns = {name: getattr(given, name) for name in ("prompt_column", "answer_column") if getattr(given, name)}
    prompts = len(PromptFile(given.data, **columns).load(policy.load_tokenizer(), 0))
    data = {"path": given.data, **columns}
    for reward in rewards_of(given.reward or ()):
        reward.load()
    val_size = min(_HELD_OUT, prompts // 5)
    config = _CONFIG.format(
        data=", ".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in data.items()),
        model=json.dumps(given.model, ensure_ascii=False),
        reward=json.dumps(given.reward or _STUB_REWARD),
        length=min(_COMPLETION_LENGTH, (policy.positions() or 2 * _COMPLETION_LENGTH) // 2),
        val_size=val_size,
        prompts_per_step=min(_PROMPTS_PER_STEP, prompts - val_size),
    )
    try:
        for path, text in zip(written, (config, _REWARD), strict=False):
            path.write_text(text, encoding="utf-8")
        DotsCLI(["show_data", "--config", str(out)])
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    print(f"\nwrote {' and '.join(map(str, written))}. Next: dots fit --config {out}")
