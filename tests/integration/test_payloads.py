"""Refuse files that would run code if they were unpickled, imported or trusted, in one line and without running it."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from datamodules.difficulty.cache import cached_matrix
from tests.support.refusal import TINY, Place, data, model, source

FIT = ("fit", "--config", "run.yaml")

pytestmark = pytest.mark.slow


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the content of a real run's checkpoint."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patched:
        place = Place.at(folder, patched, _Silent())  # type: ignore[arg-type]
        code, _ = place.run(*FIT)
    assert code == 0
    saved = next(folder.glob("runs/small/version_0/checkpoints/step_*.ckpt"))
    return torch.load(saved, weights_only=True)


class _Silent:
    def readouterr(self) -> Any:
        return type("Nothing", (), {"out": "", "err": ""})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "payload_ran"


def test_the_payload_is_a_real_one(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))  # noqa: S301  (what it does is the point)
    assert mark.exists()


def _in_replay_buffer(state: dict[str, Any], payload: Payload) -> None:
    state["callbacks"]["RolloutReplay"]["prompt_ids"] = payload


def _in_selector(state: dict[str, Any], payload: Payload) -> None:
    state["OnlinePromptDataModule"]["selector"]["draws"] = payload


def _in_optimizer(state: dict[str, Any], payload: Payload) -> None:
    state["optimizer_states"][0]["param_groups"] = payload


def _in_weights(state: dict[str, Any], payload: Payload) -> None:
    state["state_dict"]["policy_model.lm_head.weight"] = payload


HIDDEN: list[Callable[[dict[str, Any], Payload], None]] = [_in_replay_buffer, _in_selector, _in_optimizer, _in_weights]


@pytest.mark.parametrize("hide", HIDDEN, ids=lambda one: one.__name__)
@pytest.mark.parametrize("command", ["fit", "export"])
def test_checkpoint_with_a_payload(
    place: Place, mark: Path, checkpoint: dict[str, Any], hide: Callable[..., None], command: str
) -> None:
    state = {name: dict(part) if isinstance(part, dict) else part for name, part in checkpoint.items()}
    state["callbacks"] = {name: dict(part) for name, part in state["callbacks"].items()}
    state["optimizer_states"] = [dict(part) for part in state["optimizer_states"]]
    state["OnlinePromptDataModule"] = {**state["OnlinePromptDataModule"]}
    state["OnlinePromptDataModule"]["selector"] = dict(state["OnlinePromptDataModule"]["selector"])
    hide(state, Payload(mark))
    torch.save(state, place.path / "evil.ckpt")
    more = ("--out", "exported") if command == "export" else ()
    line = place.refused(command, *FIT[1:], "--ckpt_path", "evil.ckpt", *more)
    assert "evil.ckpt: refused, since it holds more than tensors and plain values (posix.system)" in line
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [True, False])
def test_pickle_in_the_place_of_a_checkpoint(place: Place, mark: Path, legacy: bool) -> None:
    path = place.path / "evil.ckpt"
    if legacy:
        torch.save({"state_dict": Payload(mark)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Payload(mark)))
    line = place.refused(*FIT, "--ckpt_path", "evil.ckpt")
    assert "damaged, or is not one: File is not a zip file. Expected a file that a run wrote" in line
    assert not mark.exists()


def test_unpickling_cannot_be_asked_for(place: Place, mark: Path) -> None:
    torch.save({"state_dict": {}, "more": Payload(mark)}, place.path / "evil.ckpt")
    assert "would unpickle" in place.refused(*FIT, "--ckpt_path", "evil.ckpt", "--weights_only", "false")
    torch.save({"state_dict": {}}, place.path / "plain.ckpt")
    line = place.refused(*FIT, "--ckpt_path", "plain.ckpt", "--weights_only", "false")
    assert "--weights_only false would unpickle" in line
    assert not mark.exists()


def test_hyperparameters_of_a_checkpoint_choose_no_class(
    place: Place, mark: Path, checkpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LightningCLI on its own would instantiate the class that a checkpoint names."""
    (place.path / "dots_evil_module.py").write_text(
        "from app.module import GRPOModule\nclass Evil(GRPOModule):\n"
        f"    def __init__(self, **rest):\n        open({str(mark)!r}, 'w').close()\n        super().__init__(**rest)\n"
    )
    monkeypatch.syspath_prepend(place.path)
    state = {**checkpoint, "hyper_parameters": {"_class_path": "dots_evil_module.Evil"}}
    torch.save(state, place.path / "evil.ckpt")
    code, said = place.run("validate", *FIT[1:], "--data.val_size=2", "--ckpt_path", "evil.ckpt")
    assert code == 0, said
    assert not mark.exists()


def _policy(place: Place, without: str = "model.safetensors") -> Path:
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    (folder / without).unlink()
    place.config(lambda config: model(config)["policy"].update(path=str(folder)))
    return folder


@pytest.mark.parametrize("plain", [True, False])
def test_policy_with_pickled_weights_only(place: Place, mark: Path, plain: bool) -> None:
    folder = _policy(place)
    weights = {} if plain else load_file(TINY / "model.safetensors")
    torch.save({**weights, "model.norm.weight": Payload(mark)}, folder / "pytorch_model.bin")
    line = place.refused(*FIT)
    assert f"policy.path={folder}: cannot be loaded" in line
    assert "Expected a folder or hub name with config.json, weights in safetensors and a tokenizer" in line
    assert not mark.exists()


def test_pickle_that_is_called_safetensors(place: Place, mark: Path) -> None:
    folder = _policy(place)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    assert f"policy.path={folder}: cannot be loaded" in place.refused(*FIT)
    assert not mark.exists()


def test_policy_with_a_pickled_adapter(place: Place, mark: Path) -> None:
    pytest.importorskip("peft")
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], '
        f'"base_model_name_or_path": "{TINY}"}}'
    )
    torch.save({"weight": Payload(mark)}, folder / "adapter_model.bin")
    place.config(lambda config: model(config)["policy"].update(path=str(folder)))
    assert f"policy.path={folder}" in place.refused(*FIT)
    assert not mark.exists()


REMOTE = """
open({mark!r}, "w").close()
from transformers import Qwen2Config, Qwen2ForCausalLM, PreTrainedTokenizerFast
class Evil(Qwen2Config): model_type = "evil"
class EvilModel(Qwen2ForCausalLM): config_class = Evil
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("where", ["policy", "encoder", "tokenizer"])
def test_code_that_comes_with_a_model(place: Place, mark: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Answering yes to every question must not help: none is asked.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    (folder / "evil.py").write_text(REMOTE.format(mark=str(mark)))
    names = {"AutoConfig": "evil.Evil", "AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel"}
    _edit(folder / "config.json", model_type="evil", auto_map=names)
    _edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    if where == "policy":
        place.config(lambda config: model(config)["policy"].update(path=str(folder)))
    elif where == "tokenizer":
        place.config(lambda config: data(config).update(tokenizer=str(folder)))
    else:
        chosen = {"class_path": "datamodules.selectors.Dots", "init_args": {"encoder": str(folder)}}
        place.config(lambda config: data(config).update(selector=chosen))
    line = place.refused(*FIT)
    assert str(folder) in line and "cannot be loaded" in line
    assert not mark.exists()


def _edit(path: Path, **changes: Any) -> None:
    import json

    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_encoder_with_pickled_weights(place: Place, mark: Path, weights: str) -> None:
    folder = _policy(place)
    torch.save({"weight": Payload(mark)}, folder / weights)
    chosen = {"class_path": "datamodules.selectors.Dots", "init_args": {"encoder": str(folder)}}
    place.config(lambda config: data(config).update(selector=chosen))
    assert f"encoder {folder} cannot be loaded" in place.refused(*FIT)
    assert not mark.exists()


def test_predictor_that_is_a_pickle(place: Place, mark: Path) -> None:
    folder = place.path / "predictor"
    folder.mkdir()
    (folder / "config.json").write_text('{"in_features": 128, "width": 16}')
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    chosen = {"class_path": "datamodules.selectors.Dots", "init_args": {"predictor": str(folder)}}
    place.config(lambda config: data(config).update(selector=chosen))
    assert "holds no difficulty predictor" in place.refused(*FIT)
    assert not mark.exists()


def _object_array(path: Path, payload: Payload) -> None:
    np.save(path, np.array([payload], dtype=object), allow_pickle=True)


def _bare_pickle(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload))


def _header(path: Path, payload: Payload) -> None:
    """Write an array whose header a careless reader would evaluate."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os').system('touch {payload.mark}')}}\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode())


@pytest.mark.parametrize("write", [_object_array, _bare_pickle, _header])
def test_embedding_cache_is_computed_again(tmp_path: Path, mark: Path, write: Callable[[Path, Payload], None]) -> None:
    path = tmp_path / "cached.npy"
    write(path, Payload(mark))
    matrix = cached_matrix(path, 2, lambda: 3, lambda out: out.fill(7))
    assert matrix.shape == (2, 3) and (matrix == 7).all()
    assert not mark.exists()


def test_data_set_with_a_script(place: Place, mark: Path) -> None:
    folder = place.path / "tricky"
    folder.mkdir()
    (folder / "tricky.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    place.config(lambda config: source(config).update(path=str(folder)))
    assert f"Folder {str(folder)!r} cannot be read as a data set" in place.refused(*FIT)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.pt", "train.npz"])
def test_data_set_of_pickles(place: Place, mark: Path, name: str) -> None:
    folder = place.path / "tricky"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    for path in (folder, folder / name):
        place.config(lambda config, path=path: source(config).update(path=str(path)))
        assert str(path) in place.refused(*FIT)
    assert not mark.exists()


def test_saved_data_set_with_pickles(place: Place, mark: Path) -> None:
    folder = place.path / "saved"
    folder.mkdir()
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    place.config(lambda config: source(config).update(path=str(folder)))
    assert f"Folder {str(folder)!r} cannot be read as a data set" in place.refused(*FIT)
    assert not mark.exists()


def test_parquet_with_a_pickled_column_type(place: Place, mark: Path) -> None:
    """Ignore pickled extension types, which Arrow used to load automatically (CVE-2023-47248)."""
    payload = pickle.dumps(Payload(mark))
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    schema = pa.schema([pa.field("question", pa.string(), metadata=kind), pa.field("answer", pa.string())])
    table = pa.table([[f"{i} + 1 =" for i in range(8)], ["1"] * 8], schema=schema)
    pq.write_table(table, place.path / "pool.parquet")
    place.config(lambda config: source(config).update(path="pool.parquet"))
    place.run("validate", *FIT[1:], "--data.val_size=2")
    assert not mark.exists()
