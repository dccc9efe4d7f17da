"""Runs: exact resumption, interruptions, and folders and files that are not what they should be."""

import json
import os
import re
import resource
import shutil
import signal

import numpy as np
import pytest
from programs import BY_HEART, SMALL, command, finished, steps_logged, wait_for_step, weights

import model
import train
from engine import runs, safetensors, tokens, xp
from engine.threads import thread_pool
from lab import pretrain


@pytest.mark.parametrize("options", [[], BY_HEART])
def test_killed_twice_and_resumed_is_never_stopped(options, run, worse, text, tmp_path):
    folder, (whole, _, text) = tmp_path / "killed", worse if options else (*run, text)
    process = command("--data", text, "--steps", 60, "--save-seconds", 0, "--out", folder, *SMALL, *options)
    for step in 20, 40:
        wait_for_step(process, folder, step)
        process.kill()
        process.communicate()
        process = command("--resume", folder, "--threads", 1, "--data", text)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert weights(folder) == weights(whole) and steps_logged(folder) == steps_logged(whole)
    assert len({tuple(sorted(safetensors.metadata(x / "model.safetensors").items())) for x in (folder, whole)}) == 1


def test_a_time_that_is_over_before_the_first_step_is_a_run_of_one_step(text, tmp_path):
    code, _, errors = finished("--data", text, *SMALL, "--minutes", "0.00001", "--out", tmp_path / "run")
    assert code == 0, errors
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and {"train_loss", "val_loss", "test_loss"} <= last.keys()


def test_an_interrupt_saves_and_says_how_to_go_on(run, text, tmp_path):
    folder = tmp_path / "interrupted"
    process = command("--data", text, "--steps", 60, "--save-seconds", 1000, "--out", folder, *SMALL)
    wait_for_step(process, folder, 10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {folder}" in out and "Traceback" not in err
    assert runs.read_progress(folder, pretrain.Settings)[0]["step"] >= 10
    assert finished("--out", folder, "--resume")[0] == 0
    assert weights(folder) == weights(run[0])


def test_a_finished_run_says_so_and_stays_as_it_is(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, err = finished("--resume", folder)
    assert code == 0 and "is finished, after 60 steps" in out and not err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_ended_in_its_first_save_can_begin_again(text, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert finished("--data", text, "--steps", 3, "--out", whole, *SMALL)[0] == 0
    given = dict(zip([name[2:].replace("-", "_") for name in SMALL[::2]], map(int, SMALL[1::2])))
    for name, place in {"save_training": runs, "save": model}.items():
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pretrain.pretrain(given | {"data": [str(text)], "steps": 3, "out": str(folder)})
        (folder / "training.safetensors.new").write_bytes(b"a part")
        assert "no run to go on with" in finished("--resume", folder)[2]
        assert finished("--data", text, "--steps", 3, "--out", folder, *SMALL)[0] == 0
        assert weights(folder) == weights(whole)


def test_a_run_that_was_killed_while_it_tokenized_can_begin_again(text, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{tokens.NAME}.new").write_bytes(b"a part")
    assert runs.is_free(folder)
    (folder / tokens.NAME).write_bytes(b"all of them")
    assert runs.is_free(folder)
    assert finished("--data", text, "--steps", 3, "--out", folder, *SMALL)[0] == 0
    assert not runs.is_free(folder) and not (folder / f"{tokens.NAME}.new").exists()


def test_what_was_tokenized_once_is_mapped_when_a_run_goes_on(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    monkeypatch.setattr(tokens, "_encode", None)
    assert pretrain.pretrain({"resume": str(folder), "steps": 61})["step"] == 61
    (folder / tokens.NAME).unlink()
    with pytest.raises(TypeError):
        pretrain.pretrain({"resume": str(folder), "steps": 62})


def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(run, text, tmp_path):
    """The largest file that the process may write stands in for a disk without room."""
    folder = shutil.copytree(run[0], tmp_path / "copy")
    before = (folder / "training.safetensors").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    new = "--data", text, "--out", tmp_path / "new", *SMALL
    for arguments in ("--resume", folder, "--steps", 70), (*new, "--steps", 3):
        process = command(*arguments, preexec_fn=limit)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "cannot be written" in err and err.count("\n") == 1, err
    assert (folder / "training.safetensors").read_bytes() == before
    assert finished("--resume", folder, "--steps", 70)[0] == 0
    assert finished(*new, "--steps", 3)[0] == 0  # in the folder of the run that could not begin


def test_all_files_may_be_read_by_the_same_people(run):
    assert len({path.stat().st_mode for path in run[0].iterdir()}) == 1


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with thread_pool(8) as pool:
        folders = list(pool.map(lambda _: runs.new_folder(), range(40)))
    assert sorted(folders) == sorted(f"runs/{i}" for i in range(1, 41)) and all(map(os.path.isdir, folders))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path):
    folder = tmp_path / "diverged"
    code, out, err = finished(
        "--data", text, "--steps", 60, "--lr", "1e38", "--save-seconds", 0, "--out", folder, *SMALL
    )
    assert code == 1 and "Traceback" not in err
    bad, kept = map(int, re.search(r"not finite at step (\d+); .* keeps the checkpoint of step (\d+)", err).groups())
    assert bad == kept + 2  # weights are saved when they gave a finite loss: those before the last update
    params, _ = model.load(folder)
    assert all(xp.isfinite(value).all() for value in params.values())


def test_a_taken_folder_is_left_alone(run, text):
    folder, _ = run
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = finished("--data", text, "--steps", 3, "--out", folder, *SMALL)
    assert code == 1 and str(folder) in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_resuming_what_cannot_be_resumed_is_one_sentence(run, text, tmp_path):
    for arguments, what in [
        (["--resume", tmp_path], "no run"),
        (["--resume"], "folder"),
        (["--resume", run[0], "--hidden", "32"], "--hidden"),
    ]:
        code, _, err = finished(*arguments)
        assert code == 1 and what in err and err.count("\n") == 1
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "training.safetensors").write_bytes((run[0] / "training.safetensors").read_bytes()[:1000])
    code, _, err = finished("--resume", damaged)
    assert code == 1 and "damaged" in err and err.count("\n") == 1


def set_in(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@pytest.mark.parametrize("value", [None, -1, 1.5, "x", [], [1], {}, True, float("nan"), [[]]])
def test_a_damaged_header_of_a_run_is_one_sentence(value, run, tmp_path):
    """Whatever stands where a number, a name or the settings should: the run goes on, or says what is wrong."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(run[0], tmp_path / "damaged")
    path = folder / "training.safetensors"
    progress, arrays = json.loads(safetensors.metadata(path)["progress"]), load_file(path)
    places = [[name] for name in progress] + [["settings", name] for name in progress["settings"]]
    for place in [["settings", "unknown"], *places]:
        changed = json.loads(json.dumps(progress))
        set_in(changed, place, value)
        save_file(arrays, path, {"progress": json.dumps(changed)})
        try:
            pretrain.Texts(
                runs.Run("train.py", pretrain.Settings, train.complete, {"threads": 1, "resume": str(folder)})
            )
        except (ValueError, OSError) as error:
            assert len(str(error)) < 300 and "\n" not in str(error)


def test_weights_that_are_not_of_the_model_are_one_sentence(run, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(run[0], tmp_path / "damaged")
    path = folder / "training.safetensors"
    notes, arrays = safetensors.metadata(path), load_file(path)
    norm = "params/model.norm.weight"
    for changed in (
        {name: w for name, w in arrays.items() if name != norm},
        arrays | {norm: np.ones(3, np.float32)},
        arrays | {"x": np.ones(3, np.float32)},
        arrays | {"state/m/x": np.ones(3, np.float32)},
    ):
        save_file(changed, path, notes)
        code, _, err = finished("--resume", folder)
        assert code == 1 and "damaged" in err and err.count("\n") == 1, err


def test_a_run_before_fine_tuning_had_a_program_of_its_own_goes_on(run, tmp_path):
    """Its header has settings that are none any more: without a value they mean nothing, and with one it is refused."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(run[0], tmp_path / "old")
    path = folder / "training.safetensors"
    progress, arrays = json.loads(safetensors.metadata(path)["progress"]), load_file(path)
    for value, code in (None, 0), ([], 1):
        old = progress | {"settings": progress["settings"] | {"finetune": value, "lora": None}}
        save_file(arrays, path, {"progress": json.dumps(old)})
        done, out, err = finished("--resume", folder)
        assert done == code and err.count("\n") == code and ("'finetune'" in err) == bool(code)


def test_a_new_limit_takes_the_place_of_the_old_one(text, tmp_path):
    new = {"data": [str(text)], "vocab": 270, "hidden": 16, "layers": 1, "context": 16, "batch": 4}
    folder = str(tmp_path / "run")
    assert pretrain.pretrain(new | {"minutes": 0.0, "out": folder})["step"] == 1
    assert pretrain.pretrain({"resume": folder, "steps": 4})["step"] == 4
    seconds = runs.read_progress(folder, pretrain.Settings)[0]["seconds"]
    assert pretrain.pretrain({"resume": folder, "minutes": seconds / 60 + 0.01})["step"] > 4
    _, settings = runs.read_progress(folder, pretrain.Settings)
    assert settings.minutes > 0.01 and settings.steps is None


def test_ctrl_c_works_again_while_the_test_is_evaluated(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, seen = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(runs.Run, "result", lambda run, test: seen.append(signal.getsignal(signal.SIGINT)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain.pretrain({"data": [str(text)], "steps": 1, "vocab": 270, "hidden": 16, "context": 16})
    assert seen == [before]
