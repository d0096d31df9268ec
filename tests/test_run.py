"""A run's folder: what it refuses, which checkpoint is best, what is deleted and what never."""


import errno
import os
from pathlib import Path

import pytest
import torch

from conftest import make_config
from regard.errors import ConfigError, RunError
from regard.training import run as module
from regard.training.checkpoint import REPLACED, UNFINISHED, Checkpoint, save
from regard.training.loop import train
from regard.training.run import LOCK, Run
from regard.translator import load


def checkpoint(run, step, score=None, metric="loss", **state):
    """A checkpoint as far as a run looks into it."""
    path = run.step_path(step) if isinstance(step, int) else run.folder / "checkpoints" / step
    save(path, Checkpoint({"weights": torch.ones(1)}, {}, {"score": score, "metric": metric, **state}))
    return path


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", make_config(tmp_path))


def names(run):
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["transformer-pre", "fixed-elman", "after-dot"])
def test_a_created_run_opens_with_its_config(name, tmp_path):
    config = make_config(tmp_path, name)
    run = Run.create(tmp_path / "run", config)
    assert Run.open(str(run.folder)) == run and run.metrics() == [] and run.checkpoints() == []


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    for name, message in (("none", "there is no such folder"), ("file", "is a file, not a run's folder"),
                          (".", "is not a run: it has no config.toml")):
        with pytest.raises(RunError) as error:
            Run.open(tmp_path / name)
        assert f"{tmp_path / name}: {message}. A run is the folder that `regard train" in str(error.value)


def test_an_export_is_not_trained_further(tmp_path):
    for name in ("config.toml", "export.json"):
        (tmp_path / name).write_text("{}")
    for making in (lambda: Run.create(tmp_path, make_config(tmp_path)), Run.locked(tmp_path, pytest.fail).__enter__):
        with pytest.raises(RunError, match=r"is an export, .* nothing was written\. .*--set train\.start_from="):
            making()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(RunError, match=r"holds other files and is no run; nothing was written. Choose another --out"):
        Run.create(tmp_path, make_config(tmp_path))
    with pytest.raises(RunError, match=r"letter.txt: is a file; a run needs a folder. Choose another --out"):
        Run.create(tmp_path / "letter.txt", make_config(tmp_path))
    with pytest.raises(RunError, match=r"cannot be written: Not a directory"):
        Run.create(tmp_path / "letter.txt" / "run", make_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_fresh_deletes_with_force_alone(run):
    checkpoint(run, 3)
    (run.folder / "data").mkdir()
    run.metrics_file.write_text("{}\n")
    (run.folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds 1 checkpoints, which --fresh would delete. Add --force to delete them"):
        Run.create(run.folder, run.config, fresh=True)
    assert len(run.checkpoints()) == 1 and run.metrics_file.exists()
    Run.create(run.folder, run.config, fresh=True, force=True)
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "config.toml", "notes.txt"]
    assert names(run) == []


def test_fresh_deletes_through_links_nothing_that_others_may_use(run, tmp_path):
    checkpoint(run, 3)
    (tmp_path / "shards").mkdir()
    (run.folder / "data").symlink_to(tmp_path / "shards")
    (run.folder / "checkpoints").rename(tmp_path / "scratch")
    (run.folder / "checkpoints").symlink_to(tmp_path / "scratch")
    Run.create(run.folder, run.config, fresh=True, force=True)
    assert names(run) == [] and (tmp_path / "shards").is_dir() and (run.folder / "data").is_symlink()


def test_fresh_does_not_go_on_with_what_it_could_not_delete(run, monkeypatch):
    checkpoint(run, 3)
    monkeypatch.setattr(Path, "rename", lambda *given: (_ for _ in ()).throw(OSError(errno.EACCES, "no")))
    with pytest.raises(RunError, match=r"step-00000003: cannot be deleted: no\."):
        Run.create(run.folder, run.config, fresh=True, force=True)


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, f"{UNFINISHED}config.toml"]])
def test_a_folder_in_which_a_kill_left_no_config_yet_is_taken_again(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("")
    run = Run.create(tmp_path, make_config(tmp_path))
    assert sorted(path.name for path in run.folder.iterdir()) == sorted({*left[:1], "checkpoints", "config.toml"})


def test_what_a_kill_left_is_cleared_away_and_what_it_took_away_put_back(run):
    saved = checkpoint(run, 3)
    saved.rename(saved.with_name(f"{REPLACED}{saved.name}"))
    (run.folder / "checkpoints" / f"{UNFINISHED}step-00000010").mkdir()
    (run.folder / f"{UNFINISHED}metrics.jsonl").write_text("")
    Run.create(run.folder, run.config)
    assert names(run) == ["step-00000003"]
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "config.toml"]


def test_the_folder_above_need_not_be_readable(tmp_path, monkeypatch):
    def flush(path):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "flush", flush)
    assert Run.create(tmp_path / "run", make_config(tmp_path)).config_file.is_file()


def test_the_config_is_never_half_written(run, tmp_path, monkeypatch):
    before = run.config_file.read_bytes()
    monkeypatch.setattr(module, "write_config", lambda config, file: file.write_text("[da"))
    monkeypatch.setattr(Path, "replace", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.write_config()
    assert run.config_file.read_bytes() == before


def test_two_trainings_in_one_folder(run):
    with Run.locked(run.folder, pytest.fail):
        with pytest.raises(RunError, match=f"{run.folder}: is in use: process {os.getpid()} on "), Run.locked(
                run.folder, pytest.fail):
            pass
        assert Run.open(run.folder) == run, "it may be read meanwhile"


def test_what_trains_is_read_but_not_trained_by_another(corpus, tmp_path):
    run = train(make_config(corpus, steps=1), tmp_path / "run", quiet=True)
    with Run.locked(run.folder, pytest.fail):
        assert load(run.folder).translate("a b").problem is None
        with pytest.raises(RunError, match=r"run: is in use: process \d+ on "):
            train(run.config, run.folder, quiet=True, fresh=True, force=True)
    assert run.checkpoints() and Run.open(run.folder) == run


def test_a_folder_is_not_locked_that_holds_something_else(tmp_path):
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(RunError, match=r"holds other files and is no run; nothing"), Run.locked(tmp_path, pytest.fail):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_another_model_is_refused_and_the_config_left_as_it_was(run, tmp_path):
    checkpoint(run, 3)
    for changes in ({"heads": 4}, {"reverse_source": True}):
        (name, value), = changes.items()
        with pytest.raises(RunError) as error:
            Run.create(run.folder, make_config(tmp_path, model=changes))
        assert f"another model: [model] now has {name} = {value} (was {getattr(run.config.model, name)})" in str(
            error.value)
    with pytest.raises(RunError, match=r"\[model\] now has activation = None \(was 'relu'\), .* …\. Put it back"):
        Run.create(run.folder, make_config(tmp_path, "fixed-elman"))
    assert Run.open(run.folder) == run
    Run.create(run.folder, make_config(tmp_path, model={"dropout": 0.5}, steps=99))


@pytest.mark.parametrize("metric, scores, best", [
    ("loss", {1: 3.0, 2: 1.0, 3: 2.0}, 2), ("bleu", {1: 3.0, 2: 1.0, 3: 2.0}, 1), ("loss", {1: 1.0, 2: 1.0}, 1),
    ("token_error_rate", {1: 5.0, 2: None, 3: 4.0}, 3), ("loss", {1: None, 2: None}, 2),
    ("loss", {1: 3.0, 2: 2.0, "average": 1.0}, "average"), ("loss", {1: 3.0, 2: 2.0, "average": 4.0}, 2),
])
def test_best(metric, scores, best, tmp_path):
    run = Run.create(tmp_path / "run", make_config(tmp_path, metric=metric))
    paths = {step: checkpoint(run, step, score, metric) for step, score in scores.items()}
    assert run.best() == run.find("best") == paths[best]
    assert run.find("last") == paths[max(step for step in scores if isinstance(step, int))]


def test_a_score_by_another_metric_or_a_damaged_one_does_not_count(run):
    first = checkpoint(run, 1, 5.0)
    checkpoint(run, 2, 0.5, metric="bleu")
    (checkpoint(run, 3, 0.1) / "state.json").write_text("{")
    assert run.best() == first and run.validated() == [first]


def test_find(run, tmp_path):
    with pytest.raises(RunError, match=f"{run.folder}: has no checkpoint yet. Train it with: regard train"):
        run.find("best")
    paths = [checkpoint(run, 1), checkpoint(run, "average")]
    assert run.find("step-00000001") == run.find(str(paths[0])) == paths[0] and run.find("average") == paths[1]
    with pytest.raises(RunError, match=r'has no checkpoint "step-2". It has: step-00000001, '):
        run.find("step-2")


@pytest.mark.parametrize("keep, left", [(1, [3, 8, 9]), (2, [3, 7, 8, 9]), (4, [3, 5, 6, 7, 8, 9])])
def test_prune_keeps_the_best_the_last_two_and_the_last_validated(run, keep, left):
    for step, score in {1: 5.0, 2: 4.0, 3: 1.0, 4: 3.0, 5: 3.0, 6: 3.0, 7: 3.0, 8: None, 9: 2.0}.items():
        checkpoint(run, step, score)
    checkpoint(run, "average", 0.5)
    run.prune(keep)
    assert names(run) == ["average", *(f"step-{step:08d}" for step in left)]


def test_a_score_in_a_damaged_state_does_not_count(run):
    paths = [checkpoint(run, step, score) for step, score in ((1, 2.0), (2, 3.0))]
    state = paths[1] / "state.json"
    state.write_text(state.read_text().replace("3.0", "1.0"))
    assert run.best() == paths[0]


def test_set_aside(run):
    for _ in range(2):
        run.set_aside([checkpoint(run, 2)])
    assert run.checkpoints() == [] and names(run) == ["damaged-step-00000002"]


def test_metrics_leave_out_a_line_that_a_kill_cut_off(run):
    run.metrics_file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_a_damaged_config_is_named(run):
    (run.folder / "config.toml").write_text("[data")
    with pytest.raises(ConfigError, match=r"config.toml: not valid TOML"):
        Run.open(run.folder)
