"""The published architectures against Hugging Face transformers, on the files that make_golden.py wrote."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import model
from engine import to_numpy, xp

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request):
    return dict(np.load(request.param))


@pytest.fixture
def config(golden):
    config = checkpoint.config_from_json(json.loads(str(golden["config"])))
    return dataclasses.replace(config, num_nextn_predict_layers=0)  # which transformers does not compute either


@pytest.fixture
def params(golden):
    return {name: xp.asarray(w.astype(np.float32)) for name, w in part(golden, "weights/").items()}


def part(golden, prefix):
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def largest(array):
    return np.abs(array).max()


def test_there_are_files():
    assert len(FILES) >= 12


def test_init_has_the_published_names_and_shapes(golden, config):
    shapes = {name: w.shape for name, w in model.init(config, 0).items()}
    assert shapes == {name: w.shape for name, w in part(golden, "weights/").items()}


def test_logits(golden, params, config):
    logits, _ = model.forward(params, config, xp.asarray(golden["tokens"]))
    assert largest(to_numpy(logits) - golden["logits"]) < 1e-4 * largest(golden["logits"])


def test_loss_and_the_gradient_of_every_weight(golden, params, config):
    loss, backward = model.loss(params, config, xp.asarray(golden["tokens"]), xp.asarray(golden["targets"]))
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)
    grads = {name: to_numpy(g) for name, g in backward().items()}
    expected = part(golden, "gradients/")
    assert grads.keys() == expected.keys()
    # without RoPE the softmax cancels a bias on the keys: of its gradient, zero, only rounding is left
    floor = 1e-6 * max(map(largest, expected.values()))
    for name, g in expected.items():
        assert grads[name].shape == g.shape, name
        assert largest(grads[name] - g) < 1e-3 * largest(g) + floor, name


def test_greedy_text(golden, params, config):
    n = len(golden["answer"])
    answer = model.generate(params, config, golden["prompt"].tolist(), max_new_tokens=n, temperature=0)
    assert [int(token) for token in answer] == golden["answer"].tolist()
