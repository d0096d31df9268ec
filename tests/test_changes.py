"""What may change in a config between stop and going on: what is refused, warned of and told."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from conftest import make_config
from regard import __version__
from regard.config import CorpusConfig
from regard.errors import RunError
from regard.training.changes import ORDER, REFUSED, check_changes
from regard.training.checkpoint import Checkpoint, save
from regard.training.loop import train
from regard.training.progress import Reporter
from regard.training.run import Run
from test_checkpoint import rewrite_state


def told(before, after, folder="run", quiet=False):
    """What is said of the changes between two configs, or a config as it was recorded and another."""
    before = before if isinstance(before, dict) else before.model_dump(mode="json")
    said = io.StringIO()
    reporter = Reporter(after.train, console=Console(file=said, soft_wrap=True, quiet=quiet))
    check_changes(folder, before, after, reporter)
    return said.getvalue()


def test_what_may_change_is_told(tmp_path):
    before = make_config(tmp_path)
    assert told(before, before) == ""
    after = make_config(tmp_path, model={"dropout": 0.3}, decode={"beam": 3}, steps=99, betas=[0.8, 0.9])
    assert told(before, after) == ("changed since it stopped, and in effect from the next update on: decode.beam = 3 "
                                   "(was 2), model.dropout = 0.3 (was 0.2), train.betas = [0.8, 0.9] (was [0.9, 0.98]),"
                                   " train.steps = 99 (was 12)\n")
    assert told(before, after, quiet=True) == ""
    check_changes("run", before.model_dump(mode="json"), after, None)


@pytest.mark.parametrize("name", sorted(ORDER))
def test_another_order_is_warned_of_even_in_quiet(name, tmp_path):
    setting, value = name.removeprefix("train."), 7
    before, after = make_config(tmp_path), make_config(tmp_path, **{setting: value})
    old = getattr(before.train, setting)
    assert told(before, after, quiet=True) == (
        f"Warning: {name} = 7 (was {old}): this is another order of the data, so the rest of the epoch may show some "
        "pairs again and leave others out, and the result is not that of one training\n")


def changed(config, section, **settings):
    return config.model_copy(update={section: getattr(config, section).model_copy(update=settings)})


@pytest.mark.parametrize("section, settings, message", [
    ("model", {"heads": 4}, "holds checkpoints of another model: [model] now has heads = 4 (was 2)"),
    ("tokenizer", {"size": 99, "shared": False},
     "holds checkpoints that learned from other tokens: [tokenizer] now has shared = False (was True), size = 99 (was"),
    ("data", {"max_tokens": 9}, "holds checkpoints that learned from other data: [data] now has max_tokens = 9 (was "),
    ("data", {"train": [CorpusConfig(source="train.source", target="train.target", weight=2)]},
     "holds checkpoints that saw the corpora in other shares: [data] now has train.1.weight = 2.0 (was 1.0). Put"),
    ("train", {"optimizer": "sgd"}, "holds the state of another optimizer: [train] now has optimizer = 'sgd' (was"),
    ("train", {"freeze": ("encoder",)}, "the optimizer's state of other weights: [train] now has freeze = ['encoder']"),
    ("train", {"start_from": Path("/base")}, "checkpoints that began otherwise: [train] now has start_from = '/base'"),
], ids=REFUSED)
def test_what_is_refused(section, settings, message, tmp_path):
    before = make_config(tmp_path)
    with pytest.raises(RunError) as error:
        told(before, changed(before, section, **settings))
    assert str(error.value).startswith("run: ") and message in str(error.value)
    assert str(error.value).endswith(". Put it back to go on, or begin anew with --fresh or another --out")


def test_where_weights_and_tokenizers_came_from_may_move_or_go(tmp_path):
    config = make_config(tmp_path)
    before = changed(changed(config, "train", start_from=Path("/a")), "tokenizer", take_from=Path("/b"))
    after = changed(changed(config, "train", start_from=None), "tokenizer", take_from=Path("/c"))
    assert told(before, after, quiet=True) == (
        "Warning: tokenizer.take_from = '/c' (was '/b'), train.start_from = None (was '/a'): means nothing any more, "
        "for the checkpoints hold what came of it. To begin with another run, use --fresh or another --out\n")


def test_all_that_is_refused_is_named_at_once_and_of_a_section_three(tmp_path):
    before = make_config(tmp_path)
    with pytest.raises(RunError) as error:
        told(before, changed(make_config(tmp_path, "fixed-elman"), "data", max_tokens=9))
    first, second = str(error.value).splitlines()
    assert "another model: [model] now has activation = None (was 'relu')" in first and " …. Put it back" in first
    assert "other data: [data]" in second


def test_dropout_of_the_tokens_may_not_change(tmp_path):
    """It is no setting of the model: the corpus was prepared with it."""
    before = make_config(tmp_path)
    with pytest.raises(RunError, match=r"learned from other tokens: \[tokenizer\] now has dropout = 0.1 \(was 0.0\)"):
        told(before, changed(before, "tokenizer", dropout=0.1))


def test_dropout_of_a_side_may_change(tmp_path):
    before = make_config(tmp_path, "mixed-rnn-conv")
    side = before.model.encoder.model_copy(update={"dropout": 0.5})
    assert "model.encoder.dropout = 0.5 (was 0.2)" in told(before, changed(before, "model", encoder=side))
    with pytest.raises(RunError, match=r"\[model\] now has encoder.width = 16 \(was 6\)"):
        told(before, changed(before, "model", encoder=before.model.encoder.model_copy(update={"width": 16})))


def test_a_setting_that_came_later_was_at_its_default(tmp_path):
    before = make_config(tmp_path).model_dump(mode="json")
    del before["train"]["clip"], before["model"]["norm"]
    assert told(before, make_config(tmp_path)) == ""
    assert "train.clip = 0.5 (was 1.0)" in told(before, make_config(tmp_path, clip=0.5))
    before["train"]["gone"] = 3
    assert "train.gone = None (was 3)\n" in told(before, make_config(tmp_path))
    with pytest.raises(RunError, match=r"\[model\] now has heads = 4 \(was 2\)\. Put"):
        told(before, make_config(tmp_path, model={"heads": 4}))


# --- what a run compares with


@pytest.fixture
def run(corpus, tmp_path):
    return train(make_config(corpus, steps=4), tmp_path / "run", quiet=True)


def test_a_checkpoint_knows_its_config_though_the_run_s_was_edited(run):
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("heads = 2", "heads = 4"))
    with pytest.raises(RunError, match=r"another model: \[model\] now has heads = 4 \(was 2\)"):
        train(Run.open(run.folder).config, run.folder, quiet=True)
    run.config_file.write_text(text)
    train(run.config, run.folder, quiet=True)


def rewritten(run, **changes):
    """Save the last checkpoint again with another state.json; None takes away."""
    path = run.checkpoints()[-1]
    state = json.loads((path / "state.json").read_text()) | changes
    save(path, Checkpoint({}, {}, {name: value for name, value in state.items() if value is not None}))
    return path


def test_before_format_2_the_run_s_config_is_compared(run, corpus):
    path = rewritten(run, config=None, data=None)
    with pytest.raises(RunError, match=r"\[model\] now has heads = 4 \(was 2\)"):
        Run.create(run.folder, make_config(corpus, model={"heads": 4}))
    rewrite_state(path, False, format=None)
    said = io.StringIO()
    Run.create(run.folder, run.config, reporter=Reporter(run.config.train, console=Console(file=said, width=999)))
    assert said.getvalue().startswith("Warning: the last checkpoint is of format 1, and the data came in another order")
    assert "but not to the last bit\n" in said.getvalue()


def test_a_newer_format_is_refused_and_nothing_is_set_aside(run):
    path = rewritten(run)
    rewrite_state(path, True, format=99)
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(RunError, match=r"step-00000004: is of format 99, written by regard "):
        train(run.config, run.folder, quiet=True)
    assert sorted(run.folder.rglob("*")) == before


def test_another_version_is_told(run):
    rewritten(run, versions={"regard": "0.0.1", "torch": torch.__version__, "python": "3", "machine": "another"})
    said = io.StringIO()
    Run.create(run.folder, run.config, reporter=Reporter(run.config.train, console=Console(file=said, width=999)))
    assert said.getvalue() == (f"regard 0.0.1 then, {__version__} now: the same to the last bit is promised with the "
                               "same versions alone\n")


def test_a_damaged_state_is_not_compared_with(run, corpus):
    state = rewritten(run) / "state.json"
    state.write_text(state.read_text().replace('"heads": 2', '"heads": 4'))
    Run.create(run.folder, run.config)


def test_a_tokenizer_of_other_data_is_refused(run):
    rewritten(run, data="0" * 64)
    with pytest.raises(RunError, match=r"run/tokenizer: is not that of the data which the checkpoints learned from"):
        train(run.config, run.folder, quiet=True)


def test_going_on_with_changes_tells_them_and_writes_the_new_config(run, corpus, capsys):
    train(make_config(corpus, steps=8, batch_tokens=32), run.folder)
    said = " ".join(capsys.readouterr().err.split())
    assert "Warning: train.batch_tokens = 32 (was 64): this is another order" in said
    assert "in effect from the next update on: train.steps = 8 (was 4)" in said
    assert Run.open(run.folder).config.train.steps == 8
