"""The demo from end to end, on very little time."""

import io
import re

import pytest
from rich.console import Console

from regard.config import read_config
from regard.demo import run as demo
from regard.demo.screen import Screen
from regard.demo.stages import STAGES, write_stage
from regard.errors import ConfigError, Interrupted, RunError
from regard.model.seq2seq import build_model


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_is_a_config_that_can_be_read(stage, tmp_path):
    path = tmp_path / "stage.toml"
    write_stage(stage, path, steps=4000, minutes=1.75)
    config = read_config(path)
    assert config.data.root == tmp_path / "data"
    assert (config.train.steps, config.train.minutes, config.train.warmup) == (4000, 1.75, 400)
    assert (config.tokenizer.sides[0].kind, config.tokenizer.sides[1].kind) == ("char", "space")


def test_the_three_are_of_like_size_and_differ_in_nothing_but_the_model(tmp_path):
    sizes, others = [], []
    for stage in STAGES:
        write_stage(stage, tmp_path / "stage.toml", steps=4000, minutes=1.75)
        config = read_config(tmp_path / "stage.toml")
        sizes.append(sum(weights.numel() for weights in build_model(config.model, 32, 43).parameters()))
        others.append(config.model_dump(exclude={"model": True, "train": {"learning_rate"}}))
    assert max(sizes) < 1.15 * min(sizes)
    assert others[0] == others[1] == others[2]


@pytest.mark.parametrize(("minutes", "seconds"), [(6, 105), (1.5, 15), (0.5, 5)])
def test_training_gets_what_the_rest_leaves(minutes, seconds):
    assert demo.training_seconds(minutes) == seconds


def test_an_unknown_task(tmp_path):
    with pytest.raises(ConfigError, match=r'there is no task "translate"\. Tasks: pronounce'):
        demo.run(tmp_path, task="translate")


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_minutes_must_be_above_zero(tmp_path, minutes):
    with pytest.raises(ConfigError, match="expected a number above 0"):
        demo.run(tmp_path, minutes=minutes)


def test_a_file_in_its_place(tmp_path):
    place = tmp_path / "demo"
    place.write_text("mine")
    with pytest.raises(RunError, match="is a file, and the demo needs a folder"):
        demo.run(place)
    assert place.read_text() == "mine"


def test_other_minutes_are_refused(tmp_path):
    write_stage(STAGES[1], tmp_path / "rnn-attention.toml", steps=4000, minutes=1.75)
    with pytest.raises(RunError, match=r"rnn-attention\.toml trains for 1\.75 minutes.*same --minutes.*another --out"):
        demo.run(tmp_path, minutes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["rnn-attention.toml"]


def test_a_stop_while_speed_is_measured_says_so(tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise Interrupted(2, "saved in /tmp/somewhere")

    monkeypatch.setattr(demo, "train", stopped)
    write_stage(STAGES[0], tmp_path / "stage.toml", steps=4000, minutes=1.75)
    with pytest.raises(Interrupted, match="while the speed of this machine was being measured") as caught:
        demo.seconds_per_update(read_config(tmp_path / "stage.toml"), 1.0)
    assert caught.value.signal == 2


@pytest.mark.slow
def test_end_to_end_and_again(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    report = demo.run(tmp_path / "demo", minutes=0.1, screen=Screen(console))
    assert report == tmp_path / "demo" / "report.html"
    text = console.file.getvalue()
    for stage in STAGES:
        assert re.search(rf"{stage.title} +[\d,]+ +[\d,]+ +\d+ +[\d.]+% +[\d.]+%", text)
        assert (tmp_path / "demo" / stage.name / "checkpoints").is_dir()
    weights = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("model.safetensors")}
    report.unlink()
    demo.run(tmp_path / "demo", minutes=0.1, screen=Screen(Console(file=io.StringIO(), width=80)))
    assert report.is_file()
    # On a busy machine the clock may have ended a stage early, and the second time goes on with it.
    again = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("model.safetensors")}
    assert weights.items() <= again.items()
