"""The trained predictor against the formula written out in numpy."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch

from app.cli.dots import main
from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace, PredictorConfig
from datamodules.difficulty.forecaster import predict
from datamodules.difficulty.published import read_published
from datamodules.errors import UserError

ERF = np.vectorize(math.erf)


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + ERF(x / np.sqrt(2)))


def adapter(predictor, name, x):
    w = {key: value.numpy().astype(np.float64) for key, value in getattr(predictor, name).state_dict().items()}
    x = layer_norm(x.astype(np.float64), w["0.weight"], w["0.bias"])
    x = gelu(x @ w["1.weight"].T + w["1.bias"])
    x = gelu(x @ w["4.weight"].T + w["4.bias"])
    return layer_norm(x @ w["7.weight"].T + w["7.bias"], w["8.weight"], w["8.bias"])


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    made = AttentionPredictor(PredictorConfig(in_features=12, encoder="somewhere"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def by_formula(predictor, embeddings, positions, rates):
    z_q, z_i = adapter(predictor, "query", embeddings), adapter(predictor, "reference", embeddings[positions])
    logits = z_q @ z_i.T / np.sqrt(896)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    d_hat = weights / weights.sum(1, keepdims=True) @ (1 - rates)
    w1, b1, w2, b2 = (parameter.detach().numpy().astype(np.float64) for parameter in predictor.head.parameters())
    o = w2 @ np.maximum(w1 @ np.array([rates.mean(), rates.std()]) + b1, 0) + b2
    base = np.clip(1 - d_hat, 1e-4, 1 - 1e-4)
    return 1 / (1 + np.exp(-(np.log(base / (1 - base)) / np.log1p(np.exp(o[0])) + np.tanh(o[1]))))


def test_prediction_matches_the_formula_and_survives_saving(predictor, tmp_path):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(40, 12)).astype(np.float32)
    positions, rates = np.array([3, 9, 17, 30, 33]), np.array([0.0, 1.0, 0.25, 0.5, 0.875])
    expected = by_formula(predictor, embeddings, positions, rates)
    assert np.ptp(expected) > 0.05
    e = torch.from_numpy(embeddings)
    direct = predictor(e, e[positions], torch.from_numpy(rates).float()).detach().numpy()
    np.testing.assert_allclose(direct, expected, atol=1e-5)

    predictor.save(tmp_path / "predictor")
    loaded = AttentionPredictor.load(tmp_path / "predictor")
    assert loaded.config == predictor.config
    assert loaded.fingerprint() == predictor.fingerprint()
    space = AttentionSpace(loaded, embeddings, "key", tmp_path)
    forecast = predict(space, positions, rates, loaded.head, "group_logit_temperature", refit=False)
    np.testing.assert_allclose(forecast.success_rate, expected, atol=1e-5)
    assert forecast.scale == 896**-0.5


def test_gradients_reach_every_weight(predictor):
    e = torch.randn(20, 12)
    predictor.train()(e[:8], e[8:], torch.rand(12)).sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())
    dropped = [module.p for module in predictor.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropped == [0.1] * 4


def test_unusable_folders_are_user_errors(predictor, tmp_path):
    with pytest.raises(UserError, match="no difficulty predictor"):
        AttentionPredictor.load(tmp_path)
    predictor.save(tmp_path)
    with pytest.raises(UserError, match=r"gives 5 components.*expects 12"):
        AttentionSpace(predictor, np.zeros((3, 5), dtype=np.float32), "key", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 8}))
    with pytest.raises(UserError, match="no difficulty predictor"):
        AttentionPredictor.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"calibration": "plat"}))
    with pytest.raises(UserError, match="unknown calibration 'plat'"):
        AttentionPredictor.load(tmp_path)


class Published(torch.nn.Module):
    """The layout of the authors' file, by names, and their formula."""

    def __init__(self, features, width, calibration):
        super().__init__()

        def projection():
            n = torch.nn
            inner = [n.Linear(features, width), n.GELU(), n.Dropout(), n.Linear(width, width), n.GELU(), n.Dropout()]
            return n.Sequential(n.LayerNorm(features), *inner, n.Linear(width, width), n.LayerNorm(width))

        self.sim_head = torch.nn.ModuleDict({"query_proj": projection(), "ref_proj": projection()})
        if calibration == "group_logit_temperature":
            self.mlp = torch.nn.Sequential(torch.nn.Linear(2, 10), torch.nn.ReLU(), torch.nn.Linear(10, 2))
        if calibration in ("platt", "temperature"):
            self.scale = torch.nn.Parameter(torch.tensor([1.7]))
        if calibration == "platt":
            self.res_scale = torch.nn.Parameter(torch.tensor([-0.4]))

    def forward(self, queries, references, rates, calibration):
        q, r = self.sim_head["query_proj"](queries), self.sim_head["ref_proj"](references)
        base = torch.softmax(q @ r.T / q.shape[1] ** 0.5, 1) @ rates
        x = torch.logit(base.clamp(1e-4, 1 - 1e-4))
        if calibration == "group_logit_temperature":
            o = self.mlp(torch.stack([rates.mean(), rates.std(correction=0)]))
            return torch.sigmoid(x / torch.nn.functional.softplus(o[0]).clamp(1e-2, 10) + torch.tanh(o[1]))
        if calibration == "platt":
            return torch.sigmoid(self.scale * x + self.res_scale)
        return torch.sigmoid(x / self.scale) if calibration == "temperature" else base


@pytest.mark.parametrize("calibration", ["group_logit_temperature", "platt", "temperature", "none"])
def test_the_authors_file_is_imported(tmp_path, capsys, calibration):
    torch.manual_seed(1)
    theirs = Published(12, 16, calibration).eval()
    state = {f"regressor.{name}": value for name, value in theirs.state_dict().items()}
    state["encoder.embed_tokens.weight"] = torch.zeros(2, 2)
    file = {"model_state_dict": state, "config": Namespace(ref_size=256), "train_metrics": {"epoch_losses": [0.5]}}
    torch.save(file, tmp_path / "model_final.pt")
    main(["difficulty", "import", "--file", str(tmp_path / "model_final.pt"), "--out", str(tmp_path / "predictor")])
    assert "3 layers of width 16 on 12 components" in capsys.readouterr().out
    ours = AttentionPredictor.load(tmp_path / "predictor")
    assert ours.config.encoder == "Qwen/Qwen2.5-Math-1.5B-Instruct"
    queries, references, rates = torch.randn(9, 12), torch.randn(6, 12), torch.rand(6)
    with torch.inference_mode():
        torch.testing.assert_close(ours(queries, references, rates), theirs(queries, references, rates, calibration))


class Executed:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_file_that_is_no_published_predictor_is_a_user_error(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match=r"cannot be read .*No such file"):
        read_published(path, "encoder")
    path.write_text("hello")
    with pytest.raises(UserError, match="cannot be read as a torch file of weights"):
        read_published(path, "encoder")
    layer = "regressor.sim_head.query_proj.1.weight"
    for content, said in (
        (torch.zeros(3), "holds Tensor, expected"),
        ({"state": {}}, "holds state, expected"),
        ({"model_state_dict": {"lm_head.weight": torch.zeros(2, 2)}}, "holds lm_head.weight in model_state_dict"),
        ({"model_state_dict": {layer: torch.zeros(4, 3)}}, "do not fit together .*[Mm]issing"),
        ({"model_state_dict": Executed()}, "cannot be read as a torch file of weights"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=said) as refused:
            read_published(path, "encoder")
        assert len(str(refused.value).splitlines()) == 1
