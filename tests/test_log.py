"""metrics.jsonl, and TensorBoard where it is asked for."""

import builtins

import pytest

from conftest import make_config
from regard.errors import MissingExtra, RunError
from regard.training.log import MetricsLog
from regard.training.run import Run

ROWS = [{"kind": "train", "step": step, "loss": step / 3} for step in (2, 4, 6)]


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", make_config(tmp_path))


def test_rows_are_kept_to_the_last_digit_and_taken_back_after_a_step(run):
    log = MetricsLog(run, False)
    for row in ROWS:
        log.write(row)
    assert run.metrics() == ROWS
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "tr')
    log.rewind(4)
    log.write(ROWS[0])
    assert run.metrics() == [*ROWS[:2], ROWS[0]]
    log.rewind(0)
    assert run.metrics_file.read_text() == "" and not list(run.folder.glob(".*"))


def test_a_file_that_cannot_be_written(run):
    run.metrics_file.mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written: Is a directory\. What was saved before"):
        MetricsLog(run, False).write(ROWS[0])


def test_tensorboard_is_written(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(run, True)
    for row in ROWS:
        log.write(row)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in ROWS]


def test_tensorboard_that_is_not_installed(run, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r'needs the package "tensorboard", .* pip install .regard\[tensorboard\]'):
        MetricsLog(run, True)
