"""Refuse wrong invocations, configs, data, models and checkpoints with exit code 2 and one line, leaving no files.

Every row runs the real command. The expected text is part of the line, usually all of it but the folder.
"""

from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, Qwen2Config, Qwen2Model, T5Config

from tests.support.refusal import TINY, Change, Place, callback, data, model, source, write_pool

FIT = ("fit", "--config", "run.yaml")

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


# --- Options and configs -------------------------------------------------------------------------------------------

COMMAND_LINE: dict[str, tuple[tuple[str, ...], str]] = {
    "subcommand": (("fti", "--config", "run.yaml"), "subcommand 'fti' does not exist. Did you mean 'fit'?"),
    "option of no class": (
        (*FIT, "--model.engine.url", "http://a:1"),
        "model.engine.url is an option of a class, but no class is given. Write --model.engine ",
    ),
    "no subcommand": ((), "no command is given. dots --help lists them."),
    "no such config": (("fit", "--config", "rum.yaml"), "rum.yaml: no such file. Did you mean 'run.yaml'?"),
    "option": ((*FIT, "--trainer.max_step=3"), "trainer.max_step is not an option. Did you mean 'max_steps'?"),
    "option of the model": (
        (*FIT, "--model.minibatches=3"),
        "model.minibatches is not an option of app.module.GRPOModule. Did you mean 'mini_batches'?",
    ),
    "option without value": ((*FIT, "--trainer.max_steps"), "--trainer.max_steps: expected one argument"),
    "type": ((*FIT, "--data.prompts_per_step=few"), "data.prompts_per_step=few: expected int"),
    "literal": (
        (*FIT, "--model.advantage_scale=grp"),
        "model.advantage_scale=grp: expected one of 'group', 'batch', 'batch_centred', 'none'. Did you mean 'group'?",
    ),
    "class": (
        (*FIT, "--data.selector=Dotz"),
        "data.selector=Dotz: no class of this name is known. Did you mean 'Dots'?",
    ),
    "precision": ((*FIT, "--trainer.precision=7"), "trainer.precision=7: expected "),
    "accelerator": ((*FIT, "--trainer.accelerator=cudda"), "cudda"),
    "strategy": ((*FIT, "--trainer.strategy=dpp"), "dpp"),
    "devices": ((*FIT, "--trainer.devices=0"), "`Trainer(devices='0')` value is not a valid input"),
    "clipping by the trainer": (
        (*FIT, "--trainer.gradient_clip_val=1.5"),
        "trainer.gradient_clip_val is 1.5, which GRPO does not use. Set model.optimization.clip_norm.",
    ),
    "accumulation by the trainer": (
        (*FIT, "--trainer.accumulate_grad_batches=2"),
        "trainer.accumulate_grad_batches is 2, which GRPO does not use. Set model.max_tokens_per_microbatch",
    ),
    "no end": (
        (*FIT, "--trainer.max_steps=-1", "--trainer.max_epochs=-1"),
        "trainer.max_steps is -1, and prompts never run out. Set it",
    ),
    "--weights_only": ((*FIT, "--weights_only=maybe"), "weights_only=maybe: expected"),
    "policy missing": ((*FIT, "--model.policy.path=./absent"), "policy.path=./absent: no such folder. Expected a"),
    "checkpoint missing": ((*FIT, "--ckpt_path=runs/no.ckpt"), "no.ckpt: no such file. Expected a checkpoint"),
    "nothing to validate": (
        ("validate", "--config", "run.yaml", "--ckpt_path", "last"),
        "--ckpt_path last: no run under runs/small yet. Train one first, or name a file.",
    ),
    "export without checkpoint": (("export", "--config", "run.yaml", "--out", "o"), "ckpt_path is missing"),
    "export over a folder": (
        ("export", "--config", "run.yaml", "--out", ".", "--ckpt_path", "x"),
        "x: no such file",
    ),
    "select nothing": (
        ("select", "--config", "run.yaml", "--method", "ufo", "--keep", "0", "--out", "s.jsonl"),
        "--keep is 0",
    ),
    "select to another kind of file": (
        ("select", "--config", "run.yaml", "--method", "ufo", "--keep", "2", "--out", "s.csv"),
        "s.csv",
    ),
    "select by an unknown method": (
        ("select", "--config", "run.yaml", "--method", "uof", "--keep", "2", "--out", "s.jsonl"),
        "method=uof: expected one of 'learnalign', 'ufo'. Did you mean 'ufo'?",
    ),
    "config without a name": (("fit", "--config"), "--config: expected one argument"),
    "config of no text": (("fit", "--config", ""), "expected a YAML mapping of options"),
    "folder as config": (("fit", "--config", "."), "Path is not a file"),
    "device as config": (("fit", "--config", "/dev/null"), "Path is not a file"),
    "config that cannot be read": (("fit", "--config", "/proc/self/mem"), "/proc/self/mem: cannot be read ("),
    "seed": ((*FIT, "--seed_everything=-1"), "seed_everything is -1, expected 0 to 4294967295. Change it."),
    "large seed": ((*FIT, "--seed_everything=4294967296"), "seed_everything is 4294967296, expected 0 to"),
    "selector as a callback": (
        (*FIT, "--trainer.callbacks+=datamodules.selectors.Uniform"),
        "trainer.callbacks=datamodules.selectors.Uniform: does not correspond to a subclass of Callback.",
    ),
    "number as a callback": ((*FIT, "--trainer.callbacks+=5"), "trainer.callbacks=5: no class of this name is known"),
    "function as a callback": ((*FIT, "--trainer.callbacks+=os.getcwd"), "does not correspond to a subclass of"),
    "export to a place that cannot be": (
        ("export", "--config", "run.yaml", "--out", "/proc/x", "--ckpt_path", "x"),
        "x: no such file",
    ),
    "study of nothing": (("forecast", "--tracs", "x"), "tracs"),
}


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_command_line(place: Place, name: str) -> None:
    arguments, expected = COMMAND_LINE[name]
    assert expected in place.refused(*arguments)


IN_CONFIG: dict[str, tuple[Change, str]] = {
    "key": (
        lambda c: c.update(modle={"class_path": "x"}),
        "modle is not an option. Did you mean 'model'?",
    ),
    "key of a selector": (
        lambda c: data(c)["selector"].update(class_path="datamodules.selectors.Dots", init_args={"alpa": 0.5}),
        "data.selector.alpa is not an option of datamodules.selectors.Dots. Did you mean 'alpha'?",
    ),
    "key of a callback": (
        lambda c: callback(c, "RunCheckpoint").update(evry=1),
        "evry is not an option of callbacks.RunCheckpoint. Did you mean 'every'?",
    ),
    "class of another kind": (
        lambda c: data(c).update(selector={"class_path": "callbacks.Rollouts"}),
        "data.selector=callbacks.Rollouts: does not correspond to a subclass of Selector.",
    ),
    "module": (
        lambda c: data(c)["selector"].update(class_path="datamodule.selectors.Dots"),
        "No module named 'datamodule'. Did you mean 'datamodules.selectors.Dots'?",
    ),
    "required": (lambda c: model(c)["policy"].pop("path"), "path is missing"),
    "no class": (
        lambda c: data(c).update(selector={"init_args": {"target": 0.5}}),
        "Is data.selector.class_path missing?",
    ),
    "learning rate": (lambda c: model(c).update(optimization={"learning_rate": -1}), "learning_rate is -1"),
    "one completion": (
        lambda c: model(c)["sampling"].update(num_generations=1),
        "model.sampling.num_generations is 1, but an advantage compares",
    ),
    "no completion": (lambda c: model(c)["sampling"].update(max_completion_length=0), "max_completion_length is 0 but"),
    "greedy training": (lambda c: model(c)["sampling"].update(temperature=0), "model.sampling.temperature is 0, which"),
    "top_p": (
        lambda c: model(c)["sampling"].update(top_p=1.5),
        "sampling.top_p is 1.5 but must be greater than 0 and",
    ),
    "no prompts per step": (
        lambda c: data(c).update(prompts_per_step=0),
        "data.prompts_per_step is 0, expected at least",
    ),
    "no mini-batch": (lambda c: model(c).update(mini_batches=0), "model.mini_batches is 0; set it to 1 or more"),
    "more mini-batches than prompts": (
        lambda c: model(c).update(mini_batches=3),
        "model.mini_batches is 3, but a step has 2 prompts",
    ),
    "more completions than memory": (
        lambda c: model(c)["sampling"].update(num_generations=10**12),
        "1,000,000,000,000 completions of up to 3 tokens",
    ),
    "more validation than memory": (
        lambda c: model(c).update(val_sampling={"num_generations": 10**12}),
        "model.val_sampling generates",
    ),
    "pass@0": (lambda c: model(c).update(pass_at_k=0), "model.pass_at_k is 0; set it to 1 or more"),
    "checkpoint interval": (
        lambda c: callback(c, "RunCheckpoint").update(every=0),
        "RunCheckpoint has every=0 and keep=2",
    ),
    "replay share": (
        lambda c: callback(c, "RolloutReplay").update(fresh_fraction=0),
        "RolloutReplay.fresh_fraction is 0",
    ),
    "target of DOTS": (
        lambda c: data(c)["selector"].update(class_path="datamodules.selectors.Dots", init_args={"alpha": 1.5}),
        "alpha is 1.5, expected a success rate in [0, 1]. Use 0.5 for informative prompts.",
    ),
    "clip range": (lambda c: model(c).update(surrogate={"epsilon_low": -1}), "epsilon"),
    "options in conflict": (
        lambda c: model(c).update(multi_objective_aggregation="normalize_then_sum", advantage_scale="none"),
        "model.advantage_scale is none with multi_objective_aggregation=normalize_then_sum, which would",
    ),
    "options of a reward in conflict": (
        lambda c: model(c)["rewards"][0].update(init_args={"after": "=", "pattern": "x"}),
        "after='=' and pattern='x' are both set, but only one can be. Remove one.",
    ),
    "regular expression": (
        lambda c: model(c)["rewards"][0].update(init_args={"pattern": "("}),
        "pattern='(' is not a valid regular expression",
    ),
    "no rewards": (lambda c: model(c).update(rewards=[]), "rewards is an empty list, expected at least one reward"),
    "reward function": (
        lambda c: model(c).update(rewards=[{"class_path": "app.rewards.Function", "init_args": {"path": "mine"}}]),
        "Reward function 'mine' is neither 'module.function' nor 'file.py:function'. Write e.g. 'my_rewards.py:is_",
    ),
    "module of a reward function": (
        lambda c: model(c).update(rewards=[{"class_path": "app.rewards.Function", "init_args": {"path": "absent.f"}}]),
        "Reward function 'absent.f': there is no module 'absent' on the Python path",
    ),
    "a callback twice": (
        lambda c: c["trainer"]["callbacks"].append({"class_path": "callbacks.RolloutReplay"}),
        "trainer.callbacks lists callbacks.RolloutReplay more than once",
    ),
    "a callback of Lightning twice": (
        lambda c: c["trainer"]["callbacks"].extend([{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}] * 2),
        "Found more than one stateful callback of type `ModelCheckpoint`",
    ),
    "no prompts per validation batch": (
        lambda c: data(c).update(val_size=2, val_batch_size=0),
        "data.val_batch_size is 0, expected at least 1. Raise it.",
    ),
    "number as a key": (
        lambda c: data(c).update({5: 6}),
        "the key 5 of data is not text, but keys are names of options",
    ),
    "folder of checkpoints": (
        lambda c: callback(c, "RunCheckpoint").update(dirpath="/proc/nowhere"),
        "Checkpoints cannot be written to /proc/nowhere (No such file or directory), expected a writable folder",
    ),
    "folder of runs": (
        lambda c: c["trainer"]["logger"]["init_args"].update(save_dir="pool.jsonl/runs"),
        "pool.jsonl/runs",
    ),
    "task": (
        lambda c: data(c).update(
            train={"class_path": "datamodules.procedural.Procedural", "init_args": {"tasks": [{"name": "chain_sums"}]}}
        ),
        "reasoning-gym",
    ),
}


@pytest.mark.parametrize("name", IN_CONFIG)
def test_config(place: Place, name: str) -> None:
    change, expected = IN_CONFIG[name]
    place.config(change)
    assert expected in place.refused(*FIT)


NESTED = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij"))
CONFIG_FILES = {
    "broken YAML": (b"model:\n  lr: [1\nb: 2\n", "run.yaml: Problems parsing config: "),
    "list": (b"- 1\n- 2\n", "run.yaml: expected a YAML mapping of options"),
    "bytes": (b"\xff\xfe\x00\x01", "run.yaml: "),
    "nothing": (b"# a comment\n", "run.yaml: expected a YAML mapping of options"),
    "number": (b"5\n", "run.yaml: expected a YAML mapping of options"),
    "tab": (b"trainer:\n\tmax_steps: 1\n", "line 2"),
    "text of another encoding": ("model: é\n".encode("latin1"), "run.yaml: not a text file"),
    "text of 16 bits": ("model: x\n".encode("utf-16"), "run.yaml: not a text file"),
    "aliases of aliases": (
        f"a: &a [{', '.join('x' * 9)}]\n{NESTED}".encode(),
        "more than 200000 entries once aliases are",
    ),
    "aliases of aliases in the model": (f"a: &a [1]\n{NESTED}model: *j\n".encode(), "more than 200000 entries"),
    "alias of itself": (b"a: &a [*a]\n", "line 1: the alias *a stands within what it names"),
    "alias of nothing": (b"a: *b\n", "undefined alias"),
    "deep lists": (b"model: " + b"[" * 100_000, "lists and mappings are nested more than 64 deep"),
    "deep mappings": (b"model: " + b"{x: " * 5000 + b"}" * 5000, "are nested more than 64 deep"),
    "key twice": (
        b"trainer: {max_steps: 1}\nmodel: {}\ntrainer: {max_steps: 2}\n",
        "line 3: the key 'trainer' was given on line 1 already, and one of the two would be ignored. Remove one",
    ),
    "option twice": (b"trainer:\n  max_steps: 1\n  devices: 1\n  'max_steps': 2\n", "line 4: the key 'max_steps' was"),
    "key that is a list": (b"? [1, 2]\n: 3\n", "line 1: a key is a list or mapping, but keys are names of options"),
    "class_path of a number": (b"model:\n  class_path: 5\n", "line 2: class_path is '5', but expected the dotted name"),
    "class_path of a list": (b"model:\n  class_path: [a]\n", "line 2: class_path is a list, but expected the dotted"),
    "class_path of a mapping": (b"model: {class_path: {a: 1}}\n", "line 1: class_path is a mapping, but expected"),
    "class_path of nothing": (b"model:\n  class_path:\n", "line 2: class_path is '', but expected the dotted name"),
    "init_args of a number": (b"model: {class_path: a.B, init_args: 5}\n", "init_args is '5', but expected a mapping"),
    "init_args of a list": (b"model: {class_path: a.B, init_args: [1]}\n", "init_args is a list, but expected a map"),
    "tags that make objects": (b"model: !!python/object/apply:os.system [id]\n", "run.yaml"),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_config_file(place: Place, name: str) -> None:
    content, expected = CONFIG_FILES[name]
    (place.path / "run.yaml").write_bytes(content)
    assert expected in place.refused(*FIT)


# --- Data ----------------------------------------------------------------------------------------------------------


def _file(name: str, content: bytes | str) -> Callable[[Place], Change]:
    """Make the pool a file with this content."""

    def write(place: Place) -> Change:
        (place.path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return lambda config: source(config).update(path=name)

    return write


def _rows(*rows: dict[str, Any], **options: Any) -> Callable[[Place], Change]:
    """Make the pool a JSONL file of these rows."""

    def write(place: Place) -> Change:
        write_pool(place.path / "pool.jsonl", rows or None)
        return lambda config: source(config).update(options)

    return write


def _truncated_parquet(place: Place) -> Change:
    pq.write_table(pa.table({"question": ["1 + 1 ="] * 8, "answer": ["2"] * 8}), place.path / "whole.parquet")
    whole = (place.path / "whole.parquet").read_bytes()
    (place.path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    return lambda config: source(config).update(path="cut.parquet")


def _saved_folder_without_its_data(place: Place) -> Change:
    (place.path / "saved").mkdir()
    (place.path / "saved" / "state.json").write_text("{}")
    return lambda config: source(config).update(path="saved")


def _folder_with_another_split(place: Place) -> Change:
    (place.path / "folder").mkdir()
    write_pool(place.path / "folder" / "train.jsonl")
    return lambda config: source(config).update(path="./folder", split="trian")


GOOD = {"question": "1 + 1 =", "answer": "2"}
LINES = "".join(json.dumps(GOOD) + "\n" for _ in range(4))

DATA: dict[str, tuple[Callable[[Place], Change], str]] = {
    "missing": (lambda place: lambda c: source(c).update(path="./pol.jsonl"), "does not exist: in "),
    "ending": (_file("pool.txt", "x"), "'pool.txt' ends in '.txt', expected one of .jsonl, "),
    "empty file": (_file("empty.jsonl", ""), "'empty.jsonl' is empty. Give a file of rows with a prompt column"),
    "broken line": (_file("bad.jsonl", LINES + '{"question": "1\n'), "'bad.jsonl' line 5: "),
    "line that is no object": (_file("bad.jsonl", LINES + "[1]\n"), "'bad.jsonl' line 5: '[1]' is not an object"),
    "broken array": (_file("bad.json", '[{"question": "1"},\n{]'), "'bad.json' line 2: "),
    "truncated parquet": (_truncated_parquet, "'cut.parquet' cannot be read as parquet: "),
    "text called parquet": (_file("bad.parquet", "question\n1"), "'bad.parquet' cannot be read as parquet: "),
    "bytes called csv": (_file("bad.csv", b"question\n\xff\xfe\x00,"), "'bad.csv' line 2 is not UTF-8 (byte 0xFF: "),
    "no prompt column": (
        _rows({"text": "1"}),
        "has no prompt column: its columns are 'text'; expected one of 'prompt', ",
    ),
    "named column": (_rows(prompt_column="qestion"), "has no column 'qestion': did you mean 'question'?"),
    "named answer": (_rows(answer_column="anwser"), "has no column 'anwser': did you mean 'answer'?"),
    "prompt of another kind": (_rows({"question": {"a": 1}}), "row 1: column 'question' holds an object with keys"),
    "messages without roles": (_rows({"messages": [{"text": "1"}]}), "row 1: a list holds an object with keys"),
    "blank prompts": (_rows({"question": " ", "answer": "1"}), "No prompt is left: "),
    "answers missing": (_rows({"question": "1", "answer": None}, {"question": "2", "answer": ""}), "No prompt is left"),
    "all too long": (_rows(max_prompt_length=1), "No prompt is left: "),
    "limit": (_rows(limit=0), "PromptFile limit is 0. Set at least 1, or null for no limit"),
    "template without question": (_rows(template="Q:"), "template 'Q:' has no field {question}"),
    "field of a template": (_rows(template="{question}{q}"), "field 'q' is unknown, expected one of "),
    "one prompt": (
        _rows(GOOD),
        "data.prompts_per_step is 2 but the pool has only 1 prompts. Lower data.prompts_per_step",
    ),
    "all repeated": (_rows(GOOD, GOOD, GOOD), "data.prompts_per_step is 2 but the pool has only 1 prompts"),
    "split": (_folder_with_another_split, "'folder' has no split 'trian': did you mean 'train'?"),
    "saved folder": (_saved_folder_without_its_data, "Folder 'saved' cannot be read as a data set: "),
    "validation split": (
        lambda place: lambda c: data(c).update(val_size=8),
        "A validation split of 8 prompts was requested from a pool of 8. Set data.val_size to 1 to 7",
    ),
    "validation repeats training": (
        lambda place: lambda c: data(c).update(val=c["data"]["init_args"]["train"]),
        "All 8 training prompts are also validation prompts. Give other data or seeds.",
    ),
    "hub name": (
        lambda place: lambda c: source(c).update(path="nobody/nothing"),
        "'nobody/nothing' is neither a local file or",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data(place: Place, name: str) -> None:
    prepare, expected = DATA[name]
    place.config(prepare(place))
    assert expected in place.refused(*FIT)


# --- Models --------------------------------------------------------------------------------------------------------


def _config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def _without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]  # type: ignore[return-value]


def _no_end_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))


def _no_causal_head(folder: Path) -> None:
    Qwen2Model(Qwen2Config(**json.loads((TINY / "config.json").read_text()) | {"tie_word_embeddings": False})
               ).save_pretrained(folder)  # fmt: skip


def _encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(T5Config(d_model=8, num_layers=1).to_dict()))


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _other_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor[:-1].clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _masked(folder: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, architectures=["BertForMaskedLM"])
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def _generation(**values: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(values)) and None


def _index(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def _late_end_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<late>"})
    tokenizer.save_pretrained(folder)


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_without("config.json"), "cannot be loaded by "),
    "broken config": (lambda folder: (folder / "config.json").write_text("{") and None, "cannot be loaded by "),
    "unknown architecture": (_config(model_type="qwen99"), "cannot be loaded by "),
    "no causal head": (_no_causal_head, "its weights lack 1 tensors of Qwen2ForCausalLM (lm_head.weight)"),
    "encoder and decoder": (_encoder_decoder, "it is an encoder with a decoder (t5). Expected a causal language model"),
    "masked": (_masked, "its tokens see those that follow (BertForMaskedLM). Expected a causal language model"),
    "masked, called causal": (_config(architectures=["RobertaForCausalLM"], model_type="roberta"), "see those that"),
    "classifier": (_config(architectures=["Qwen2ForSequenceClassification"]), "says Qwen2ForSequenceClassification"),
    "reward model": (_config(architectures=["Qwen2ForTokenClassification"]), "says Qwen2ForTokenClassification"),
    "negative layers": (_config(num_hidden_layers=-1), "cannot be loaded by "),
    "no heads": (_config(num_attention_heads=0), "num_attention_heads in its config.json is 0. Expected 1 or more"),
    "vocabulary in words": (_config(vocab_size="many"), "vocab_size"),
    "end token in words": (_config(eos_token_id="x"), "eos_token_id"),
    "end tokens in words": (
        _generation(eos_token_id=["x", 1]),
        "eos_token_id in its config.json or gen",
    ),
    "rope of a word": (_config(rope_parameters="round"), "cannot be loaded by "),
    "pickled weights in the index": (_index("pytorch_model.bin"), "names 'pytorch_model.bin'. Expected names of"),
    "a shard elsewhere": (_index("../other/model.safetensors"), "names '../other/model.safetensors'"),
    "a shard by an absolute path": (_index("/tmp/model.safetensors"), "names '/tmp/model.safetensors'"),
    "broken index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]") and None,
        "cannot be loaded by AutoModelForCausalLM (",
    ),
    "end token beyond the embedding": (_late_end_token, "'<late>' of its tokenizer is number"),
    "truncated weights": (_cut_weights, "cannot be loaded by AutoModelForCausalLM ("),
    "weights of other shapes": (_other_shapes, "cannot be loaded by AutoModelForCausalLM ("),
    "no weights": (_without("model.safetensors"), "cannot be loaded by AutoModelForCausalLM ("),
    "no tokenizer": (_without("tokenizer.json", "tokenizer_config.json"), "cannot be loaded by AutoTokenizer ("),
    "no end token": (_no_end_token, "its tokenizer has no end token. Set eos_token"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(place: Place, name: str) -> None:
    spoil, expected = MODELS[name]
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    spoil(folder)
    place.config(lambda config: model(config)["policy"].update(path=str(folder)))
    line = place.refused(*FIT)
    assert line.startswith(f"policy.path={folder}: ")
    assert expected in line


@pytest.mark.parametrize("template", ["<think>{question}", "{question} </think>", "{question}<pad_late>"])
def test_a_prompt_beyond_the_embedding(place: Place, template: str) -> None:
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"pad_token": "<pad_late>"})
    tokenizer.save_pretrained(folder)
    place.config(lambda c: (model(c)["policy"].update(path=str(folder)), source(c).update(template=template)))
    line = place.refused(*FIT)
    assert "holds the token '" in line and "but its model has no embedding of. Resize" in line
    # Prompts without such a token train.
    assert place.run(*FIT, "--data.train.template={question}")[0] == 0


def _selector(**init_args: Any) -> Change:
    return lambda config: data(config).update(
        selector={"class_path": "datamodules.selectors.Dots", "init_args": init_args}
    )


AROUND_THE_MODEL: dict[str, tuple[Change, str]] = {
    "no predictor": (_selector(predictor="./absent"), "'absent' holds no difficulty predictor"),
    "predictor that is a policy": (_selector(predictor=str(TINY)), "holds no difficulty predictor"),
    "no encoder": (_selector(encoder="./absent"), "encoder './absent' is neither a folder nor a model of the hub"),
    "layer of an encoder": (_selector(encoder=f"{TINY}@99"), "layer 99 of encoder"),
    "tokenizer of the data": (
        lambda c: data(c).update(tokenizer="./absent"),
        "data.tokenizer is ./absent, which cannot be load",
    ),
    "attention": (lambda c: model(c)["policy"].update(attn_implementation="quick"), "cannot be loaded by"),
    "LoRA of rank 0": (lambda c: model(c)["policy"].update(lora={"rank": 0}), "lora"),
    "LoRA of absent layers": (lambda c: model(c)["policy"].update(lora={"target_modules": ["absent"]}), "absent"),
    "no room for completions": (
        lambda c: model(c)["sampling"].update(max_completion_length=512),
        "max_completion_length is 512, which leaves no room for a prompt within the 512 tokens of the policy's context",
    ),
}


@pytest.mark.parametrize("name", AROUND_THE_MODEL)
def test_what_goes_with_a_model(place: Place, name: str) -> None:
    change, expected = AROUND_THE_MODEL[name]
    place.config(change)
    assert expected in place.refused(*FIT)


# --- Checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real run of one step, with its `runs` folder."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patched:
        place = Place.at(folder, patched, _Silent())  # type: ignore[arg-type]
        place.config(lambda config: callback(config, "RunCheckpoint").update(every=1))
        code, _ = place.run(*FIT)
    assert code == 0
    return folder


class _Silent:
    def readouterr(self) -> Any:
        return type("Nothing", (), {"out": "", "err": ""})


@dataclass(frozen=True)
class Resumed:
    """A run resumed from `saved` with a change in its data, its config or the checkpoint itself."""

    change: Change = lambda config: None
    spoil: Callable[[Path], object] = lambda checkpoint: None
    prepare: Callable[[Place], object] = lambda place: None


def _cut(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5000])


def _flip(checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)


def _flip_without_seal(checkpoint: Path) -> None:
    _flip(checkpoint)
    checkpoint.with_name(checkpoint.name + ".sha256").unlink()


def _rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the content and remove the checksums, as someone who tampers with it would."""

    def rewrite(checkpoint: Path) -> None:
        state = torch.load(checkpoint, weights_only=True)
        change(state)
        torch.save(state, checkpoint)
        checkpoint.with_name(checkpoint.name + ".sha256").unlink()

    return rewrite


def _other_tokenizer(place: Place) -> None:
    shutil.copytree(TINY, place.path / "other")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(place.path / "other")


def _wider(place: Place) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(TINY, place.path / "other")
    config = Qwen2Config(**json.loads((TINY / "config.json").read_text()) | {"intermediate_size": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(place.path / "other")


def _in_place(config: dict[str, Any]) -> None:
    model(config)["policy"].update(path="./other")


def _reordered(place: Place) -> None:
    pool = place.path / "pool.jsonl"
    pool.write_text("\n".join(reversed(pool.read_text().splitlines())) + "\n")


def _other_answer(place: Place) -> None:
    pool = place.path / "pool.jsonl"
    pool.write_text(pool.read_text().replace('"answer": "3"', '"answer": "4"'))


CHECKPOINTS: dict[str, tuple[Resumed, str]] = {
    "truncated": (Resumed(spoil=_cut), "damaged: step_00000001.ckpt ("),
    "one bit": (Resumed(spoil=_flip), "differs from its checksum in step_00000001.ckpt.sha256"),
    "one bit, without checksum": (Resumed(spoil=_flip_without_seal), "in it differs from its checksum"),
    "text": (Resumed(spoil=lambda path: path.write_text("hello")), "damaged: step_00000001.ckpt (5 bytes)"),
    "weights alone": (
        Resumed(spoil=_rewritten(lambda state: state.pop("state_dict"))),
        "holds no state_dict. Expected the checkpoint of a run, not weights alone",
    ),
    "other model": (
        Resumed(_in_place, prepare=_wider),
        "the checkpoint belongs to another model: for model.layers.0.mlp.",
    ),
    "earlier version": (
        Resumed(spoil=_rewritten(lambda state: state["run_identity"].pop("format"))),
        "written by another version of Dots (its format is 1, this version reads 2). Resume it with that version",
    ),
    "other tokenizer": (
        Resumed(_in_place, prepare=_other_tokenizer),
        "saved with another tokenizer: token ids would change. Resume with the one it was saved with, or leave",
    ),
    "other group size": (
        Resumed(lambda c: model(c)["sampling"].update(num_generations=4)),
        "model.sampling.num_generations=4, but the checkpoint was saved with groups of 2",
    ),
    "other answer": (Resumed(prepare=_other_answer), "saved with another prompt pool (prompts, answers or template"),
    "other template": (Resumed(lambda c: source(c).update(template="Q: {question}")), "saved with another prompt pool"),
    "other order": (Resumed(prepare=_reordered), "saved with the same prompts in another order"),
    "other selector": (
        Resumed(lambda c: data(c).update(selector={"class_path": "datamodules.selectors.Mopps"})),
        "the checkpoint holds the state of selector Uniform, this run has Mopps",
    ),
}


CASES = [(name, True) for name in CHECKPOINTS] + [
    (name, False) for name in ("truncated", "weights alone", "other model")
]


@pytest.mark.parametrize(("name", "last"), CASES, ids=[f"{name}, {'last' if last else 'file'}" for name, last in CASES])
def test_checkpoint(place: Place, saved: Path, name: str, last: bool) -> None:
    case, expected = CHECKPOINTS[name]
    shutil.copytree(saved / "runs", place.path / "runs", symlinks=True)
    file = place.path / "runs/small/version_0/checkpoints/step_00000001.ckpt"
    case.spoil(file)
    case.prepare(place)
    place.config(case.change)
    line = place.refused(
        *FIT, "--trainer.max_steps=2", "--ckpt_path", "last" if last else str(file), touches=name == "other selector"
    )
    assert expected in line


# --- The table as a whole ------------------------------------------------------------------------------------------


def test_the_table_is_long() -> None:
    tables = (COMMAND_LINE, IN_CONFIG, CONFIG_FILES, DATA, MODELS, AROUND_THE_MODEL, CHECKPOINTS)
    assert sum(map(len, tables)) >= 60


def test_debug_shows_where_it_arose(place: Place) -> None:
    place.config(lambda config: source(config).update(path="./absent.jsonl"))
    with pytest.raises(ValueError, match="does not exist") as raised:
        place.run(*FIT, "--debug")
    shown = "".join(traceback.format_exception(raised.value))
    assert re.search(r'files\.py", line \d+, in open_table', shown)
