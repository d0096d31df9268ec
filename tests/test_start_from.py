"""Fine-tuning from another run: what is taken by name and by token, what is refused, and that it goes on exactly."""

import hashlib
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_config
from regard.cli import app
from regard.config import TokenizerConfig, read_config, write_config
from regard.data.shards import prepare
from regard.data.taken import digest_of
from regard.errors import CheckpointError, ConfigError, Interrupted, RunError
from regard.text.tokenizer import SPECIALS, Tokenizer, Tokenizers
from regard.training import checkpoint as checkpoints
from regard.training import start_from
from regard.training.interrupt import Stop
from regard.training.loop import Trainer, train
from regard.training.run import Run
from regard.training.verify import verify_resume
from test_cluster import train_together
from test_loop import harm, trainer_of

ROWS = {"all": ["output"], "decoder": ["encoder.embedding.weight", "output"],
        "none": ["encoder.embedding.weight", "decoder.embedding.weight", "output"]}


def write_letters(folder, source, target, pairs=40):
    """A corpus of reversals in which each side has letters of its own, "abc" and "abd" say."""
    folder.mkdir()
    for name, count in (("train", pairs), ("valid", 4)):
        for side, letters in (("source", source), ("target", target)):
            lines = [" ".join(letters[(line + place) % len(letters)] for place in range(1 + line % 4))
                     for line in range(count)]
            (folder / f"{name}.{side}").write_text("".join(line + "\n" for line in lines))
    return folder


def config_of(folder, name="transformer-pre", model=(), tokenizer=None, **settings):
    """A config over a folder's files; with other [tokenizer] settings where they are given."""
    config = make_config(folder, name, model=model, **{"steps": 4, "validate_every": 2, **settings})
    if tokenizer is None:
        return config
    write_config(config, folder / "config.toml")
    return read_config(folder / "config.toml", [f"tokenizer.{key}={value}" for key, value in tokenizer.items()])


@pytest.fixture
def base(tmp_path):
    """A run over the letters a to d on both sides."""
    folder = write_letters(tmp_path / "old", "abcd", "abcd")
    return train(config_of(folder), tmp_path / "base", quiet=True)


def begun(config, folder):
    """A trainer that has made no update, with what it says."""
    trainer, said = trainer_of(config, folder)
    return trainer, dict(trainer.model.named_parameters()), said.getvalue()


@pytest.mark.parametrize("tie", ROWS)
def test_weights_are_taken_by_name_and_rows_by_token(tmp_path, tie):
    old = config_of(write_letters(tmp_path / "old", "abcd", "abcd"), model={"tie": tie})
    base = train(old, tmp_path / "base", quiet=True)
    config = config_of(write_letters(tmp_path / "new", "dxab", "baze"), model={"tie": tie}, start_from=base.folder)
    trainer, found, said = begun(config, tmp_path / "run")
    given = checkpoints.load(base.best()).model
    _, fresh_weights, _ = begun(config_of(tmp_path / "new", model={"tie": tie}), tmp_path / "fresh")
    ids, old_ids = ({entry: id for id, entry in enumerate(tokenizers.source.vocabulary.entries)} for tokenizers in (
        trainer.tokenizers, Tokenizers.load(base.folder / "tokenizer")))
    assert sorted(ids) == sorted([*SPECIALS, *"abdexz"]) and list(ids) != list(old_ids)
    for name in found:
        if name not in ROWS[tie]:
            assert torch.equal(found[name], given[name])
            continue
        for entry, id in ids.items():
            expected = given[name][old_ids[entry]] if entry in old_ids else fresh_weights[name][id]
            assert torch.equal(found[name][id], expected), (name, entry)
    assert set(ROWS[tie]) <= found.keys()
    assert "shared vocabulary: kept 7 of 10 tokens; 3 new; 1 of the old dropped\n" in said
    assert f"weights of {base.best()}, sha256 " in said


def test_separate_vocabularies_are_matched_each_by_itself(tmp_path, base):
    new = write_letters(tmp_path / "new", "abxy", "cdefg")
    config = config_of(new, tokenizer={"shared": "false"}, start_from=base.folder)
    trainer, found, said = begun(config, tmp_path / "run")
    assert ("source vocabulary: kept 6 of 8 tokens; 2 new; 2 of the old dropped\n"
            "target vocabulary: kept 6 of 9 tokens; 3 new; 2 of the old dropped\n") in said
    source, target = (tokenizer.vocabulary.entries for tokenizer in trainer.tokenizers)
    old, given = Tokenizers.load(base.folder / "tokenizer"), checkpoints.load(base.best()).model
    row = {entry: id for id, entry in enumerate(old.source.vocabulary.entries)}
    assert torch.equal(found["encoder.embedding.weight"][source.index("b")],
                       given["encoder.embedding.weight"][row["b"]])
    assert torch.equal(found["output"][target.index("d")], given["output"][row["d"]])


def test_the_same_vocabulary_is_the_same_model(tmp_path, base):
    """And an average of weights begins with them; optimizer and standing are new."""
    config = config_of(tmp_path / "old", start_from=base.best(), ema=0.9)
    trainer, found, said = begun(config, tmp_path / "run")
    given = checkpoints.load(base.best()).model
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert all(torch.equal(trainer.ema.averages[name], given[name]) for name in given)
    assert "kept 8 of 8 tokens; 0 new; 0 of the old dropped" in said
    assert trainer.standing.step == 0 and not trainer.optimizer.state


def test_from_a_run_with_an_average_that_is_taken(tmp_path):
    old = write_letters(tmp_path / "old", "abcd", "abcd")
    base = train(config_of(old, ema=0.9), tmp_path / "base", quiet=True)
    saved = checkpoints.load(base.best())
    _, found, _ = begun(config_of(old, start_from=base.folder), tmp_path / "run")
    assert torch.equal(found["output"], saved.model["output"])
    assert not torch.equal(found["output"], saved.optimizer["trained.output"])


def test_frozen_weights_are_those_of_the_base(tmp_path, base):
    config = config_of(tmp_path / "old", start_from=base.folder, freeze=["encoder"])
    run = train(config, tmp_path / "run", quiet=True)
    given, found = checkpoints.load(base.best()).model, checkpoints.load(run.find("last")).model
    for name in given:
        assert torch.equal(given[name], found[name]) == name.startswith("encoder"), name


def test_each_checkpoint_tells_where_it_began(tmp_path, base):
    run = train(config_of(tmp_path / "old", start_from=base.folder, average=2), tmp_path / "run", quiet=True)
    paths = [*run.checkpoints(), run.average_path]
    weights = base.best() / "model.safetensors"
    expected = {"checkpoint": str(base.best()), "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
                "tokens": {"shared": {"kept": 8, "new": 0, "dropped": 0}}}
    assert len(paths) == 3 and all(checkpoints.state_of(path)["start_from"] == expected for path in paths)
    assert all("start_from" not in checkpoints.state_of(path) for path in base.checkpoints())


@pytest.mark.parametrize("old, new, kept", [
    (("bpe", "▁", "a", "▁ab"), ("unigram", "▁ab", "c"), {4: 6}),
    (("bpe", "▁ab", "b", "▁a"), ("space", "ab", "b", "a"), {4: 4, 6: 6}),
    (("char", " ", "a"), ("bpe", "▁", "a", "▁a"), {4: 4, 5: 5}),
    (("space", "</s>", "a"), ("space", "a", "</s>"), {4: 5, 5: 4}),
])
def test_tokens_of_unlike_kinds_match_where_they_stand_for_the_same(old, new, kept):
    """Special tokens by their role, never by their text."""
    old, new = (type("", (), {"kind": kind, "size": 4 + len(entries), "vocabulary": type("", (), {
        "entries": [*SPECIALS, *entries]}), "texts": lambda self, ids: [
            self.vocabulary.entries[id].replace(" ", "▁") for id in ids]})() for kind, *entries in (old, new))
    assert start_from._matched(old, new) == {0: 0, 1: 1, 2: 2, 3: 3} | kept


def test_bytes_and_characters_match_where_they_are_ascii():
    byte, char = Tokenizer.train("byte", 260, ["x"]), Tokenizer.train("char", 99, ["a é"])
    found = {char.texts([new])[0]: byte.texts([old])[0] for new, old in start_from._matched(byte, char).items()}
    assert found == {name: name for name in [*SPECIALS, "a", "▁"]}


@pytest.mark.parametrize("changes, messages", [
    ({"model": {"width": 16}}, ["it has of another shape 74 (", "expected 16", "decoder.width = 8 (here 16)"]),
    ({"model": {"layers": 1}}, ["it has beyond those 36", "(decoder.layers.1."]),
    ({"model": {"layers": 3}}, ["it lacks 36", "(decoder.layers.2.", ", …)"]),
    ({"model": {"tie": "none"}}, ["it lacks 1 (decoder.embedding.weight)", 'tie = "decoder" (here "none")']),
    ({"name": "conv"}, ["it lacks", "it has beyond those", 'decoder.kind = "transformer" (here "conv")']),
    ({"model": {"heads": 4}}, ["does not fit [model]: it was trained with decoder.heads = 2 (here 4), encoder.heads"]),
])
def test_another_model_is_refused_before_anything_is_written(tmp_path, base, changes, messages):
    config = config_of(tmp_path / "old", start_from=base.folder, **changes)
    with pytest.raises(ConfigError) as error:
        train(config, tmp_path / "run", quiet=True)
    text = str(error.value)
    assert text.startswith(f"[train] start_from: {base.best()} does not fit [model]: ")
    assert all(message in text for message in messages), text
    assert not (tmp_path / "run").exists()


def test_other_dropout_fits(tmp_path, base):
    begun(config_of(tmp_path / "old", model={"dropout": 0.4, "attention_dropout": 0.1}, start_from=base.folder),
          tmp_path / "run")


def test_what_is_no_run_or_damaged_is_refused_before_anything_is_written(tmp_path, base):
    def refusal(kind, path, out="run"):
        with pytest.raises(kind) as error:
            train(config_of(tmp_path / "old", start_from=path), tmp_path / out, quiet=True, fresh=True, force=True)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert refusal(RunError, tmp_path / "no").startswith(f"[train] start_from: {tmp_path / 'no'}: there is no such f")
    assert "has no config.toml" in refusal(RunError, tmp_path / "old")
    assert "has no config.toml" in refusal(RunError, base.folder / "data")  # a manifest.json of another kind
    for path in (base.folder, base.best()):
        assert "is the folder that this training writes to" in refusal(ConfigError, path, "base")
    best = base.best()
    harm(best)
    assert refusal(CheckpointError, base.folder).startswith(f"{best / 'model.safetensors'}: is damaged")
    shutil.rmtree(base.folder / "checkpoints")
    assert "has no checkpoint yet" in refusal(RunError, base.folder)


def losses(run):
    return [(row["kind"], row["step"], row["loss"]) for row in run.metrics()]


def test_it_goes_on_exactly_and_without_the_base(tmp_path, base, monkeypatch):
    """Killed before the first checkpoint, which needs the base again; and stopped after it, when that is gone."""
    config = config_of(write_letters(tmp_path / "new", "dxab", "baze"), steps=9, validate_every=3, ema=0.9,
                       start_from=base.folder, tokenizer={"take_from": f'"{base.folder}"'})
    whole = train(config, tmp_path / "whole", quiet=True)
    trainer, *_ = begun(config, tmp_path / "parts")
    trainer.update()  # and no checkpoint: as after a kill
    real, stop = Trainer.fit, [5]

    def fit(self, signalled):
        monkeypatch.setattr(self.reporter, "step", lambda step: setattr(
            signalled, "signal", 15 if step in stop else None))
        real(self, signalled)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "fit", fit)
        train(config, tmp_path / "parts", quiet=True)
    shutil.rmtree(base.folder)
    parts = train(config, tmp_path / "parts", quiet=True)
    assert losses(parts) == losses(whole)
    one, other = (checkpoints.load(run.find("last")) for run in (whole, parts))
    assert one.model.keys() == other.model.keys() and all(torch.equal(one.model[n], other.model[n]) for n in one.model)
    assert all(torch.equal(one.optimizer[name], other.optimizer[name]) for name in one.optimizer)
    assert one.state["start_from"] == other.state["start_from"]
    with pytest.raises(RunError, match=r"take_from names no run: there is no such folder"):
        train(config, tmp_path / "parts", quiet=True, fresh=True, force=True)
    assert parts.checkpoints()


@pytest.mark.slow
def test_processes_that_share_it_begin_with_the_same_weights(tmp_path, base):
    config = config_of(write_letters(tmp_path / "new", "dxab", "baze"), start_from=base.folder, accumulate=2,
                       deterministic=True, steps=4, log_every=1, validate_every=4)
    one, two = (train_together(config, tmp_path / str(size), size, steps=4) for size in (1, 2))
    assert one == two
    states = [checkpoints.state_of(Run.open(tmp_path / size).find("last"))["start_from"] for size in "12"]
    assert states[0] == states[1] and states[0]["tokens"]["shared"]["new"] == 3


def test_taken_tokenizers_are_the_base_s_and_no_new_ones_are_made(tmp_path, base):
    new = write_letters(tmp_path / "new", "dxab", "baze")
    config = config_of(new, start_from=base.folder)
    config = config.model_copy(update={"tokenizer": type(config.tokenizer)(take_from=base.folder)})
    trainer, _, said = begun(config, tmp_path / "run")
    own, other = (Tokenizers.load(folder / "tokenizer") for folder in (trainer.run.folder, base.folder))
    assert own.source.vocabulary == other.source.vocabulary and digest_of(own) == digest_of(other)
    assert "kept 8 of 8 tokens; 0 new; 0 of the old dropped" in said
    assert "take_from" in (trainer.run.config_file).read_text() and "kind" not in (
        trainer.run.config_file).read_text().split("[tokenizer]")[1].split("[")[0]
    assert read_config(trainer.run.config_file).tokenizer.model_fields_set == {"take_from"}


@pytest.mark.parametrize("given, message", [
    ({"kind": "char"}, 'kind = "char"'),
    ({"size": 9000}, "size = 9000"),
    ({"shared": "false"}, "shared = false"),
    ({"source.kind": "byte", "target.kind": "space"}, 'shared = false, kind = "byte"'),
])
def test_settings_that_differ_from_taken_tokenizers_are_refused(tmp_path, base, given, message):
    config = config_of(tmp_path / "old", tokenizer={"take_from": base.folder, **given})
    with pytest.raises(ConfigError) as error:
        train(config, tmp_path / "run", quiet=True)
    assert str(error.value).startswith(f"[tokenizer]: {message} is not what take_from = {base.folder} has (shared sp")
    assert not (tmp_path / "run").exists()


def test_tokenizers_without_merges_do_not_serve_dropout(tmp_path, base):
    config = config_of(tmp_path / "old").model_copy(update={
        "tokenizer": TokenizerConfig(take_from=base.folder, dropout=0.1)})
    message = (rf"\[tokenizer\]: dropout = 0.1 leaves out merges, which space, taken from {base.folder}, does not "
               "have: leave dropout out, or take bpe tokenizers")
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    shutil.copytree(base.folder / "tokenizer", tmp_path / "run" / "tokenizer")
    shutil.rmtree(base.folder)
    with pytest.raises(ConfigError, match=message):  # by the run's own copy
        prepare(config, tmp_path / "run")


def test_settings_that_are_those_of_taken_tokenizers_are_read(tmp_path, base):
    given = {"take_from": base.folder, "kind": "space", "size": 8000, "shared": "true"}  # it asked for 8000, and got 8
    prepare(config_of(tmp_path / "old", tokenizer=given), tmp_path / "run")
    assert digest_of(Tokenizers.load(tmp_path / "run" / "tokenizer")) == digest_of(
        Tokenizers.load(base.folder / "tokenizer"))


def test_two_vocabularies_do_not_serve_a_model_that_needs_one(tmp_path):
    old = write_letters(tmp_path / "old", "abcd", "abef")
    base = train(config_of(old, tokenizer={"shared": "false"}), tmp_path / "base", quiet=True)
    config = config_of(old, model={"tie": "all"})
    config = config.model_copy(update={"tokenizer": type(config.tokenizer)(take_from=base.folder)})
    with pytest.raises(ConfigError, match=r'tie = "all" needs one vocabulary for both sides, and take_from = .* has t'):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_prepared_data_without_take_from_is_not_made_anew(tmp_path, base):
    """The fingerprint of runs that were made before take_from was there."""
    fingerprint = json.loads((base.folder / "tokenizer" / "manifest.json").read_text())["fingerprint"]
    contents = [[hashlib.sha256((tmp_path / "old" / f"train.{side}").read_bytes()).hexdigest()
                 for side in ("source", "target")]]
    settings = {"format": 1, "max_tokens": 256, "tokenizer": {
        "kind": "space", "size": 8000, "shared": True, "source": None, "target": None}}
    assert fingerprint == hashlib.sha256(json.dumps([contents, settings], sort_keys=True).encode()).hexdigest()


def test_paths_are_relative_to_the_config_and_overriding_ones_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "my.toml"
    file.write_text('[data]\ntrain = [{ pairs = "a" }]\nvalid = { pairs = "b" }\n[model]\nkind = "rnn"\n'
                    '[train]\nstart_from = "../runs/base"\n[tokenizer]\ntake_from = "../runs/base"\n')
    monkeypatch.chdir("/")
    config = read_config(file, ["data.root=there"])
    assert config.train.start_from == config.tokenizer.take_from == (tmp_path / "runs" / "base").resolve()
    config = read_config(file, ["train.start_from=tmp/x", "tokenizer.take_from=y"])
    assert (str(config.train.start_from), str(config.tokenizer.take_from)) == ("/tmp/x", "/y")
    assert config.data.root == (tmp_path / "configs").resolve()


def test_a_stop_comes_before_the_first_update_too(tmp_path, base):
    trainer, *_ = begun(config_of(tmp_path / "old", start_from=base.folder), tmp_path / "run")
    stop = Stop()
    stop.signal = 15
    with pytest.raises(Interrupted):
        trainer.fit(stop)
    assert checkpoints.state_of(trainer.run.find("last"))["start_from"]["checkpoint"] == str(base.best())


@pytest.mark.slow
def test_it_is_told_and_proven_when_the_base_is_gone(tmp_path, base):
    """By `regard info` and `regard verify`."""
    config = config_of(write_letters(tmp_path / "new", "dxab", "baze"), start_from=base.folder,
                       tokenizer={"take_from": base.folder})
    run = train(config, tmp_path / "run", quiet=True)
    began = f"weights of {base.best()}, sha256 "
    shutil.rmtree(base.folder)
    said = CliRunner().invoke(app, ["info", str(run.folder)]).stdout
    assert f"began with   {began}" in said and "; shared vocabulary: kept 8 of 8 tokens; 0 new; 0 of the old" in said
    assert f"tokenizer    that of {base.folder}\n" in said
    facts = json.loads(CliRunner().invoke(app, ["info", str(run.folder), "--json"]).stdout)
    assert facts["training"]["start_from"]["tokens"] == {"shared": {"kept": 8, "new": 0, "dropped": 0}}
    assert verify_resume(run, 4).difference is None
