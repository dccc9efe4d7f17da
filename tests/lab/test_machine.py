"""What a model needs of this machine."""

from test_model import TINY

import model
from engine import memory
from lab import machine


def test_what_a_model_needs_is_said_without_its_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "installed", lambda: 2**34)
    monkeypatch.setattr(memory, "bandwidth", lambda shapes: 2.0**31 if (512, 2048) in shapes else 0)
    config = model.ARCHITECTURES["qwen3-moe"]
    model.save(tmp_path, {}, config)
    machine.describe(tmp_path)
    said = capsys.readouterr().out
    assert "235,093,634,560 parameters, of which a token uses 22,190,763,520" in said
    assert (
        "875.79 GiB for the weights" in said and "16.00 GiB" in said and "does not fit" in said and "speed" not in said
    )
    small = model.ARCHITECTURES["llama3.2"]
    model.save(tmp_path, {}, small)
    machine.describe(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "4.60 GiB for the weights" in said and "8.00 GiB for the keys and values of 131,072 tokens" in said
    # each weight but the norms, of 4 bytes, is read for each token
    norms = 2048 * (2 * 16 + 1)
    speed = 2**31 / (4 * (1_235_814_400 - norms))
    assert f"speed {speed:.1f} tokens a second" in said and "does not fit" not in said


def test_a_small_model_waits_for_something_else(tmp_path, capsys):
    model.save(tmp_path, {}, TINY)
    machine.describe(tmp_path)
    said = capsys.readouterr().out
    assert "does not wait for memory" in said and "tokens a second" not in said


def test_sizes_are_in_the_unit_that_suits_them():
    assert machine.size(2**30) == "1.00 GiB" and machine.size(2**30 - 2**20) == "1,023.0 MiB"
