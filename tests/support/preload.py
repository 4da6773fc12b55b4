"""What `command.py` imports once before it forks."""

import datasets  # noqa: F401
import reasoning_gym  # noqa: F401
from torch.utils import tensorboard  # noqa: F401
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401

import app.cli.dots  # noqa: F401
