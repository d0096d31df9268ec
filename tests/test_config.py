"""Every setting and every fault of a config, with its message."""

from pathlib import Path

import pytest

from conftest import MODELS
from regard.config import parse_config, read_config, write_config
from regard.errors import ConfigError

DATA = {"train": [{"pairs": "train.tsv"}], "valid": {"source": "valid.en", "target": "valid.de"}}
RNN, TRANSFORMER = {"kind": "rnn"}, {"kind": "transformer"}
TOML = """
[data]
root = "text"
train = [{ pairs = "train.tsv" }]
valid = { pairs = "valid.tsv" }
[model]
kind = "rnn"
"""


def parse(model=RNN, data=DATA, **sections):
    return parse_config({"data": data, "model": model, **sections}, "my.toml", Path("/base"))


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_is_the_same(name, tmp_path):
    config = parse(MODELS[name], DATA | {"root": "text", "test": {"pairs": "ümläut \"quoted\".tsv"}},
                   train={"learning_rate": 5e-4, "minutes": 1.5})
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config


def test_the_root_is_relative_to_the_config_and_an_overriding_one_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my.toml").write_text(TOML)
    monkeypatch.chdir("/")
    assert read_config(tmp_path / "my.toml").data.root == (tmp_path / "text").resolve()
    assert read_config(tmp_path / "my.toml", ["data.root=other"]).data.root == Path("/other").resolve()
    assert parse(data=DATA | {"root": "~/text"}).data.root == Path("~/text").expanduser().resolve()


def test_overrides(tmp_path):
    (tmp_path / "my.toml").write_text(TOML)
    config = read_config(tmp_path / "my.toml", [
        "train.steps=5", "train.learning_rate=5e-4", "train.schedule=cosine", 'model.cell = "lstm"',
        "model.bidirectional=false", "tokenizer.source.kind=char", "tokenizer.target.kind=byte"])
    assert (config.train.steps, config.train.learning_rate, config.train.schedule) == (5, 5e-4, "cosine")
    assert (config.model.cell, config.model.bidirectional) == ("lstm", False)
    assert [side.kind for side in config.tokenizer.sides] == ["char", "byte"] and not config.tokenizer.is_shared


@pytest.mark.parametrize("override, message", [
    ("steps=5", "--set steps=5: expected section.key=value, such as --set train.steps=500"),
    ("train.steps", "--set train.steps: expected section.key=value"),
    ("train.=5", "--set train.=5: expected section.key=value"),
    ("model.kind.cell=gru", '--set model.kind.cell=gru: "kind" is a value, not a section'),
    ("train.steps=many", "my.toml, [train]: steps = 'many': input should be a valid integer"),
    ("train.stepz=5", 'my.toml, [train]: unknown key "stepz". Did you mean "steps"?'),
])
def test_faulty_overrides(override, message, tmp_path):
    (tmp_path / "my.toml").write_text(TOML)
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path / "my.toml", [override])
    assert message in str(error.value)


FAULTS = {
    "a key with a near match": ({"model": RNN | {"widht": 8}}, '[model]: unknown key "widht". Did you mean "width"?'),
    "another family's key": ({"model": RNN | {"heads": 2}}, '[model]: unknown key "heads". Known keys: width, layers'),
    "a strange key": ({"decode": {"zzz": 1}}, '[decode]: unknown key "zzz". Known keys: beam, length_penalty, max_'),
    "a strange section": ({"trian": {}}, 'my.toml: unknown key "trian". Did you mean "train"?'),
    "a key of a corpus": ({"data": DATA | {"train": [DATA["valid"], {"pair": "x"}]}},
                          '[data.train.2]: unknown key "pair". Did you mean "pairs"?'),
    "a key of one side": ({"tokenizer": {"source": {"knid": "bpe"}, "target": {}}},
                          '[tokenizer.source]: unknown key "knid". Did you mean "kind"?'),
    "a missing key": ({"data": {"train": [DATA["valid"]]}}, 'my.toml, [data]: "valid" is missing.'),
    "a missing section": ({"model": None}, 'my.toml: "model" is missing.'),
    "no kind": ({"model": {}}, 'my.toml, [model]: kind must be "rnn" or "transformer"; this version has no other.'),
    "another kind": ({"model": {"kind": "conv"}}, 'my.toml, [model]: kind must be "rnn" or "transformer"'),
    "no section": ({"model": 3}, "my.toml: model = 3: input should be a valid dictionary"),
    "a wrong type": ({"model": RNN | {"width": "wide"}}, "[model]: width = 'wide': input should be a valid integer"),
    "out of range": ({"train": {"steps": 0}}, "[train]: steps = 0: input should be greater than or equal to 1."),
    "dropout of 1": ({"model": RNN | {"dropout": 1.0}}, "[model]: dropout = 1.0: input should be less than 1."),
    "no choice": ({"train": {"schedule": "linear"}}, "[train]: schedule = 'linear': input should be 'inverse_sqrt', "
                                                      "'cosine' or 'constant'."),
    "a beta of 1": ({"train": {"betas": [0.9, 1.0]}}, "[train.betas]: 2 = 1.0: input should be less than 1."),
    "one beta": ({"train": {"betas": [0.9]}}, '[train.betas]: "2" is missing.'),
    "infinite": ({"train": {"learning_rate": float("inf")}}, "[train]: learning_rate = inf: input should be a finite"),
    "no corpus": ({"data": DATA | {"train": []}}, "[data]: train = []: list should have at least 1 item"),
    "half a corpus": ({"data": DATA | {"valid": {"source": "valid.en"}}},
                      "[data.valid]: a corpus is { source = FILE, target = FILE } or { pairs = FILE }."),
    "a corpus and a half": ({"data": DATA | {"valid": DATA["valid"] | {"pairs": "x"}}}, "[data.valid]: a corpus is {"),
    "heads": ({"model": TRANSFORMER | {"width": 10, "heads": 4}}, "[model]: heads = 4 do not divide width = 10."),
    "odd sines": ({"model": TRANSFORMER | {"width": 9, "heads": 3}},
                  '[model]: positions = "sinusoidal" needs an even width, and width = 9.'),
    "odd directions": ({"model": RNN | {"width": 9}}, "[model]: bidirectional = true needs an even width, and width"),
    "context and attention": ({"model": RNN | {"attention": "after", "context": "every_step"}},
                              '[model]: context = "every_step" feeds the fixed vector at each step, which attention ='),
    "score without attention": ({"model": RNN | {"score": "dot"}},
                                '[model]: score = "dot" means nothing with attention = "none": set attention ='),
    "one side": ({"tokenizer": {"source": {"kind": "bpe"}}},
                 "[tokenizer]: [tokenizer.source] and [tokenizer.target] come together: give both or neither."),
    "tied, parted": ({"model": RNN | {"tie": "all"}, "tokenizer": {"shared": False}},
                     'my.toml: [model] tie = "all" needs one vocabulary for both sides: set [tokenizer] shared ='),
    "tied, two sides": ({"model": RNN | {"tie": "all"}, "tokenizer": {"source": {}, "target": {}}},
                        'my.toml: [model] tie = "all" needs one vocabulary for both sides'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    sections, message = FAULTS[fault]
    settings = {"data": DATA, "model": RNN, **sections}
    with pytest.raises(ConfigError) as error:
        parse_config({name: value for name, value in settings.items() if value is not None}, "my.toml", Path())
    assert str(error.value).startswith("my.toml") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_several_faults_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        parse(RNN | {"width": 9, "attention": "before", "context": "every_step"}, train={"steps": 0, "stpes": 1})
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "needs an even width, and width = 9; context =" in lines[0]
    assert "[train]: steps = 0" in lines[1] and 'unknown key "stpes"' in lines[2]


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse().train.steps = 3


@pytest.mark.parametrize("content, message", [
    (None, "cannot read the config: No such file or directory. `regard init --list` shows what to start from"),
    (b"[data", "not valid TOML: "),
    (b'name = "\xff"', "not UTF-8 text (byte 8); a config is a TOML file"),
])
def test_files_that_are_no_config(content, message, tmp_path):
    path = tmp_path / "my.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: {message}")
