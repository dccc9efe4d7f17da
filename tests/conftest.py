"""What several files of tests share: a text, and runs on it."""

import random

import pytest
from programs import BASE, BY_HEART, SMALL, finished

import bpe
import model
import train
from lab import assistant, feedback, village


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    words = "the cat sat on a mat and saw one dog run to his red house ".split(" ")
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=3000)))
    return path


@pytest.fixture(scope="session")
def run(text, tmp_path_factory):
    """A finished run of 60 steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finished("--data", text, "--steps", 60, "--out", folder, *SMALL)
    assert code == 0 and not err, err  # no progress bar where nobody looks
    return folder, out


@pytest.fixture(scope="session")
def worse(tmp_path_factory):
    """A finished run that learned letters by heart which follow no rule."""
    letters, folder = tmp_path_factory.mktemp("data") / "letters.txt", tmp_path_factory.mktemp("runs") / "worse"
    letters.write_text("".join(random.Random(0).choices("abcdefgh", k=1000)))
    code, out, err = finished("--data", letters, "--steps", 60, "--out", folder, *SMALL, *BY_HEART)
    assert code == 0, err
    return folder, out, letters


@pytest.fixture(scope="session")
def base(text, tmp_path_factory):
    """A model that knows nothing yet, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model.save(folder, model.init(BASE, 0), BASE)
    bpe.train(text.read_text(), 270, special=train.SPECIAL).save(folder)
    return folder


@pytest.fixture
def small_village(monkeypatch):
    """The experiment of rlhf.py with a fortieth of its questions, short texts and short answers."""
    training, held_out, unasked = village.parted()
    monkeypatch.setattr(village, "parted", lambda: (training, held_out[::40], unasked[::40]))
    for name, size in {"LINES": 600, "CHATS": 600, "ASKED": 40, "LONGEST": 8}.items():
        monkeypatch.setattr(assistant, name, size)
    monkeypatch.setattr(feedback, "LONGEST", assistant.LONGEST)
