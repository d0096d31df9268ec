"""What a report tells of a run: its curves, its provenance, and in what runs differ."""

import json
from pathlib import Path

import pytest

import regard
from conftest import make_config, write_reversal
from regard.config import TokenizerConfig
from regard.data.shards import prepare
from regard.errors import RunError
from regard.evaluate.facts import (
    command,
    data_facts,
    differing_settings,
    duration,
    learning,
    learning_together,
    points,
    provenance,
    read_metrics,
    told_data,
    told_tokenizer,
)
from regard.training.run import Run

ROWS = [{"kind": "train", "step": 2, "loss": 3.0, "learning_rate": 0.1}, {"kind": "train", "step": 4, "loss": None},
        {"kind": "train", "step": 6, "loss": float("nan")}, {"kind": "valid", "step": 6, "loss": 2.5, "bleu": 7}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of 12 updates."""
    place = tmp_path_factory.mktemp("facts")
    write_reversal(place)
    for name, row, metric in (("a", "transformer-pre", "loss"), ("b", "fixed-gru-every-step", "token_error_rate")):
        regard.train(make_config(place, row, metric=metric), place / name, quiet=True)
    return place


def test_points_are_the_finite_figures_of_one_kind():
    assert points(ROWS, "train", "loss") == [(2, 3)] and points(ROWS, "valid", "bleu") == [(6, 7)]
    assert points(ROWS, "valid", "learning_rate") == []


def test_curves_are_those_of_the_log(folder):
    loss, rate = learning(Run.open(folder / "a"))
    rows = read_metrics(Run.open(folder / "a"))
    assert [each.name for each in loss.series] == ["training", "validation"]
    assert loss.series[1].points == [(row["step"], row["loss"]) for row in rows if row["kind"] == "valid"]
    assert [x for x, _ in rate.series[0].points] == list(range(1, 13))
    metric = learning(Run.open(folder / "b"))[1]
    assert metric.y_label == "token error rate of the validation data, percent"


def test_curves_of_several_runs(folder):
    charts = learning_together({0: ("a", Run.open(folder / "a")), 2: ("b", Run.open(folder / "b"))})
    lines = [[(each.name, each.style) for each in chart.series] for chart in charts]
    assert lines == [[("a", 0), ("b", 2)], [("b", 2)]]
    assert charts[1].y_label == "validation token error rate, percent"


def test_a_run_without_its_log_has_no_curves(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_bytes((folder / "a" / "config.toml").read_bytes())
    assert learning(Run.open(tmp_path / "run")) == []


@pytest.mark.parametrize(("line", "message"), [
    ("{", r"metrics.jsonl: cannot be read: .*rename it"), ("3", r"metrics.jsonl:1: is no row of a training"),
    ('{"kind": "train"}', r"metrics.jsonl:1: .*expected kind and step"),
])
def test_a_damaged_log_is_refused(folder, tmp_path, line, message):
    (tmp_path / "config.toml").write_bytes((folder / "a" / "config.toml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=message):
        read_metrics(Run.open(tmp_path))


def test_provenance(folder):
    run = Run.open(folder / "b")
    told = dict(provenance(run, "step-00000008"))
    manifest = json.loads((folder / "b/checkpoints/step-00000008/manifest.json").read_text())
    assert told["checkpoint"] == f"step-00000008, weights SHA-256 {manifest['model.safetensors']}"
    assert told["trained"].startswith("8 of 12 updates, 1 whole epoch, ") and "target tokens" in told["trained"]
    assert told["validation"].startswith("token error rate ")
    assert told["learned from"].startswith(f"train.source, train.target in {folder}: 60 pairs; ")
    assert told["tokenizer"].startswith("space up to ") and "torch " in told["made with"]


def test_provenance_without_the_prepared_data(folder, tmp_path):
    for part in ("config.toml", "checkpoints"):
        (tmp_path / part).symlink_to(folder / "a" / part)
    run = Run.open(tmp_path)
    assert dict(provenance(run, "best"))["learned from"] == f"train.source, train.target in {folder}"


def test_drawn_segmentations_are_told(tmp_path):
    write_reversal(tmp_path)
    config = make_config(tmp_path)
    tokenizer = TokenizerConfig(kind="bpe", size=30, dropout=0.5, samples=3)
    config = config.model_copy(update={"tokenizer": tokenizer})
    prepare(config, tmp_path / "run")
    run = Run(tmp_path / "run", config)
    assert data_facts(run)["samples"] == 3 and ": 60 pairs; 3 segmentations of each; " in told_data(run)
    assert told_tokenizer(run) == "bpe up to 30, shared, dropout 0.5"
    taken = config.model_copy(update={"tokenizer": TokenizerConfig(take_from=Path("/base"), dropout=0.1)})
    assert told_tokenizer(Run(tmp_path / "run", taken)) == "that of /base, dropout 0.1"


def test_settings_that_differ(folder):
    found = dict(differing_settings([Run.open(folder / "a"), Run.open(folder / "b")]))
    assert found["model.kind"] == ['"transformer"', '"rnn"'] and found["model.heads"][1] == "–"
    assert found["train.metric"] == ['"loss"', '"token_error_rate"'] and "train.steps" not in found
    assert differing_settings([Run.open(folder / "a")] * 2) == []


def test_commands_and_durations():
    assert command("regard", "evaluate", "a run") == "regard evaluate 'a run'"
    assert [duration(seconds) for seconds in (12.34, 60, 600)] == ["12.3 seconds", "1.0 minutes", "10.0 minutes"]
