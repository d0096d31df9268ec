"""A run's folder: what it refuses, which checkpoint is best, what is deleted and what never."""

import json

import pytest

from conftest import make_config
from regard.errors import ConfigError, RunError
from regard.training.checkpoint import UNFINISHED
from regard.training.run import Run


def checkpoint(run, step, score=None, metric="loss"):
    """A checkpoint as far as a run looks into it."""
    path = run.step_path(step) if isinstance(step, int) else run.folder / "checkpoints" / step
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"score": score, "metric": metric}))
    (path / "manifest.json").write_text("{}")
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
    (run.folder / "checkpoints" / f"{UNFINISHED}step-00000010").mkdir()
    run.prune(keep)
    assert names(run) == ["average", *(f"step-{step:08d}" for step in left)]


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
