"""The command line of checkpoint.py: a model for llama.cpp."""

import dataclasses

import pytest
from test_model import TINY

import bpe
import model
from lab import export


@pytest.fixture
def folder(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=300)
    model.save(tmp_path / "model", model.init(config), config)
    bpe.train("the cat sat on a mat", 270).save(tmp_path / "model", chat_template="{{ messages }}")
    return str(tmp_path / "model")


def test_a_folder_becomes_a_file(folder, tmp_path, capsys):
    gguf, path = pytest.importorskip("gguf"), tmp_path / "x.gguf"
    export.main([folder, "--gguf", str(path), "--type", "f16"])
    assert str(path) in capsys.readouterr().out
    reader = gguf.GGUFReader(path)
    assert reader.fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16", "F32"}


@pytest.mark.parametrize(
    "arguments, what",
    [
        ([], "DIR"),
        (["DIR"], "--gguf"),
        (["DIR", "--gguf", "x", "--type", "f8"], "f8"),
        (["nowhere", "--gguf", "x"], "nowhere is not a folder"),
        (["owner/model", "--gguf", "x"], "hf download owner/model --local-dir model"),
    ],
)
def test_bad_options_are_one_sentence(arguments, what, folder):
    with pytest.raises(ValueError, match=what):
        export.main([folder if word == "DIR" else word for word in arguments])
