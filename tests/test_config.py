"""Every setting and every fault of a config, with its message."""

from pathlib import Path

import pytest

from conftest import MODELS
from regard.config import parse_config, read_config, write_config
from regard.config_model import RNNConfig
from regard.errors import ConfigError
from regard.model.seq2seq import build_model

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
                   train={"learning_rate": 5e-4, "minutes": 1.5, "accumulate": "auto", "freeze": ["encoder"]})
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize("given", [{}, {"dropout": 0.1}, {"dropout": 0.1, "samples": 1, "take_from": "base"}])
def test_what_is_drawn_is_written_and_read_the_same(given, tmp_path):
    config = parse(tokenizer=given)
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
    "another family's key": ({"model": RNN | {"heads": 2}},
                             '[model]: unknown key "heads". It belongs to kind = "transformer", and this is kind = "r'),
    "a window on a Transformer": ({"model": TRANSFORMER | {"window": "local_m"}},
                                  '[model]: unknown key "window". It belongs to kind = "rnn", and this is kind = "tra'),
    "a decoder's key in an encoder": ({"model": {"encoder": RNN | {"score": "dot"}, "decoder": RNN}},
                                      '[model.encoder]: unknown key "score". It is a decoder\'s: give it in [model.de'),
    "a key beside the sides": ({"model": {"encoder": RNN, "decoder": RNN, "width": 8}},
                               '[model]: unknown key "width". Beside [model.encoder] and [model.decoder] it belongs'),
    "a strange key of a side": ({"model": {"encoder": RNN, "decoder": TRANSFORMER | {"widht": 8}}},
                                '[model.decoder]: unknown key "widht". Did you mean "width"?'),
    "a strange key beside the sides": ({"model": {"encoder": RNN, "decoder": RNN, "tei": "all"}},
                                       '[model]: unknown key "tei". Did you mean "tie"?'),
    "one side alone": ({"model": {"encoder": RNN}}, 'my.toml, [model]: "decoder" is missing.'),
    "no kind of a side": ({"model": {"encoder": {}, "decoder": RNN}},
                          'my.toml, [model.encoder]: kind must be "rnn", "conv" or "transformer".'),
    "a strange key": ({"decode": {"zzz": 1}}, '[decode]: unknown key "zzz". Known keys: beam, length_penalty, max_'),
    "a strange section": ({"trian": {}}, 'my.toml: unknown key "trian". Did you mean "train"?'),
    "a key of a corpus": ({"data": DATA | {"train": [DATA["valid"], {"pair": "x"}]}},
                          '[data.train.2]: unknown key "pair". Did you mean "pairs"?'),
    "a key of one side": ({"tokenizer": {"source": {"knid": "bpe"}, "target": {}}},
                          '[tokenizer.source]: unknown key "knid". Did you mean "kind"?'),
    "a missing key": ({"data": {"train": [DATA["valid"]]}}, 'my.toml, [data]: "valid" is missing.'),
    "a missing section": ({"model": None}, 'my.toml: "model" is missing.'),
    "no kind": ({"model": {}}, 'my.toml, [model]: kind must be "rnn", "conv" or "transformer", or give [model.encoder] '
                               "and [model.decoder], each with its own."),
    "another kind": ({"model": {"kind": "cnn"}}, 'my.toml, [model]: kind must be "rnn", "conv" or "transformer", or'),
    "no section": ({"model": 3}, 'my.toml, [model]: kind must be "rnn", "conv" or "transformer", or give'),
    "no subsection": ({"train": 3}, "my.toml: train = 3: input should be a valid dictionary"),
    "a wrong type": ({"model": RNN | {"width": "wide"}}, "[model]: width = 'wide': input should be a valid integer"),
    "out of range": ({"train": {"steps": 0}}, "[train]: steps = 0: input should be greater than or equal to 1."),
    "dropout of 1": ({"model": RNN | {"dropout": 1.0}}, "[model]: dropout = 1.0: input should be less than 1."),
    "no choice": ({"train": {"schedule": "linaer"}}, "[train]: schedule = 'linaer': input should be 'inverse_sqrt', "
                                                      "'cosine', 'linear' or 'constant'."),
    **{f"pieces: {value!r}": ({"train": {"accumulate": value}}, f"[train]: accumulate = {value!r}: input should be a "
                              'whole number from 1, or "auto".') for value in (0, 1.5, True, "aut", [2])},
    "a batch of the machine's": ({"train": {"batch_tokens": "auto"}}, "[train]: batch_tokens = 'auto': the size of a "
                                 'batch is part of what is learned, so it is a number; in how many pieces memory holds '
                                 'it is measured with accumulate = "auto".'),
    **{f"an average of {value}": ({"train": {"ema": value}}, f"[train]: ema = {value}: input should be {wanted}")
       for value, wanted in ((1.0, "less than 1"), (-0.1, "greater than or equal to 0"))},
    "an optimizer": ({"train": {"optimizer": "lamb"}}, "optimizer = 'lamb': input should be 'adamw', 'adam', 'sgd' or"),
    "betas of nobody": ({"train": {"optimizer": "sgd", "betas": [0.9, 0.99]}}, 'my.toml, [train]: betas = (0.9, 0.99) '
                        'means nothing with optimizer = "sgd": use optimizer = "adamw" or "adam", or leave betas out.'),
    "momentum of nobody": ({"train": {"momentum": 0.5}}, 'my.toml, [train]: momentum = 0.5 means nothing with '
                           'optimizer = "adamw": use optimizer = "sgd", or leave momentum out.'),
    "an end of no end": ({"train": {"final_learning_rate": 0.1}}, "[train]: final_learning_rate = 0.1 means nothing "
                         'with schedule = "inverse_sqrt": use schedule = "cosine" or "linear", or leave final_lear'),
    "depth of an RNN": ({"model": RNN | {"stochastic_depth": 0.1}}, '[model]: unknown key "stochastic_depth". It '
                        'belongs to kind = "conv" and kind = "transformer", and this is kind = "rnn"'),
    "a beta of 1": ({"train": {"betas": [0.9, 1.0]}}, "[train.betas]: 2 = 1.0: input should be less than 1."),
    "one beta": ({"train": {"betas": [0.9]}}, '[train.betas]: "2" is missing.'),
    "infinite": ({"train": {"learning_rate": float("inf")}}, "[train]: learning_rate = inf: input should be a finite"),
    "no corpus": ({"data": DATA | {"train": []}}, "[data]: train = []: list should have at least 1 item"),
    "half a corpus": ({"data": DATA | {"valid": {"source": "valid.en"}}},
                      "[data.valid]: a corpus is { source = FILE, target = FILE } or { pairs = FILE }."),
    "a corpus and a half": ({"data": DATA | {"valid": DATA["valid"] | {"pairs": "x"}}}, "[data.valid]: a corpus is {"),
    "one side": ({"tokenizer": {"source": {"kind": "bpe"}}},
                 "[tokenizer]: [tokenizer.source] and [tokenizer.target] come together: give both or neither."),
    **{f"dropout of {value}": ({"tokenizer": {"dropout": value}}, f"[tokenizer]: dropout = {value}: input should be "
                               f"{wanted}.") for value, wanted in (
                                   (1.0, "less than 1"), (-0.1, "greater than or equal to 0"))},
    "no samples": ({"tokenizer": {"dropout": 0.1, "samples": 0}},
                   "[tokenizer]: samples = 0: input should be greater than or equal to 1."),
    "dropout of words": ({"tokenizer": {"kind": "space", "dropout": 0.1}}, '[tokenizer]: dropout = 0.1 leaves out '
                         'merges, which kind = "space" does not have: use kind = "bpe" for both sides, or leave'),
    "dropout of one side": ({"tokenizer": {"source": {}, "target": {"kind": "char"}, "dropout": 0.1}},
                            'dropout = 0.1 leaves out merges, which kind = "char" does not have: use kind = "bpe" for'),
    "samples of nobody": ({"tokenizer": {"samples": 8}}, "[tokenizer]: samples = 8 means nothing with dropout = 0: set "
                          "dropout = 0.1, or leave samples out."),
    "dropout of aligned words": ({"data": DATA | {"train": [{"pairs": "a", "alignment": "b"}]},
                                  "model": RNN | {"attention": "after"}, "train": {"guided_alignment": 0.1},
                                  "tokenizer": {"dropout": 0.1}},
                                 "[tokenizer] dropout = 0.1 gives each epoch other tokens, and the links of an "
                                 "alignment are made between those of one segmentation: leave dropout or alignment"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    sections, message = FAULTS[fault]
    settings = {"data": DATA, "model": RNN, **sections}
    with pytest.raises(ConfigError) as error:
        parse_config({name: value for name, value in settings.items() if value is not None}, "my.toml", Path())
    assert str(error.value).startswith("my.toml") and message in str(error.value)
    assert "\n" not in str(error.value)


DOT = {"attention": "after", "score": "dot"}
MISFITS = {
    "heads": (TRANSFORMER | {"width": 10, "heads": 4}, "heads = 4 do not divide width = 10: heads = 2 would."),
    "key heads": (TRANSFORMER | {"heads": 8, "kv_heads": 3},
                  "kv_heads = 3 do not divide heads = 8: kv_heads = 2 would"),
    "odd sines": (TRANSFORMER | {"width": 9, "heads": 3},
                  'positions = "sinusoidal" needs an even width, and width = 9: use width = 10.'),
    "odd turns": (TRANSFORMER | {"width": 12, "positions": "rotary"},
                  'positions = "rotary" turns pairs of values in each head, and width = 12 / heads = 4 is no even '
                  "number: use width = 16."),
    "places not learned": (TRANSFORMER | {"max_positions": 9},
                           'max_positions = 9 means nothing with positions = "sinusoidal": use positions = "learned"'),
    "too few places": (TRANSFORMER | {"positions": "learned", "max_positions": 300},
                       "max_positions = 300 is too few for [decode] max_source_tokens = 1024 and </s>: use "
                       "max_positions = 1025, or lower [decode] max_source_tokens."),
    "too few places of an output": ({"encoder": RNN, "decoder": {"kind": "conv", "max_positions": 256}},
                                    "max_positions = 256 is too few for [data] max_tokens = 256 and </s>: use "
                                    "max_positions = 257, or lower [data] max_tokens."),
    "too many layers": (TRANSFORMER | {"layers": 3, "encoder_layers": 1, "decoder_layers": 2},
                        "layers = 3 means nothing where encoder_layers and decoder_layers are both given"),
    "odd directions": (RNN | {"width": 9}, "bidirectional = true needs an even width, and width = 9: use width"),
    "nothing to add": (RNN | {"layers": 1, "residual": True}, "residual = true means nothing with layers = 1: use"),
    "context and attention": (RNN | {"attention": "after", "context": "every_step"},
                              'context = "every_step" feeds the fixed vector at each step, which attention = "after" '
                              'replaces: use context = "initial" or attention = "none".'),
    "context alone and attention": (RNN | {"attention": "before", "context": "input_only"}, 'context = "input_only" f'),
    **{f"{name} without attention": (RNN | {name: value}, f'{name} = {text} means nothing with attention = "none": set '
                                     f'attention = "before" or "after", or leave {name} out.')
       for name, value, text in (("score", "dot", '"dot"'), ("input_feeding", True, "true"), ("copy", True, "true"),
                                 ("window", "local_p", '"local_p"'), ("coverage", True, "true"))},
    "an embedding for nobody": (RNN | {"context": "input_only", "tie": "none"},
                                'tie = "none" gives the target an embedding of its own, which context = "input_only" '),
    "fed twice": (RNN | {"attention": "before", "input_feeding": True},
                  'input_feeding = true means nothing with attention = "before", where the context enters the cell'),
    "a radius of everything": (RNN | {"attention": "after", "window_radius": 3},
                               'window_radius = 3 means nothing with window = "global": use window = "local_m" or'),
    "unlike widths": ({"encoder": RNN | {"width": 64}, "decoder": RNN | DOT},
                      'decoder.score = "dot" compares vectors of one width, and encoder.width = 64, decoder.width = '
                      '256: use score = "general", "concat" or "additive", or equal widths.'),
    "tied widths": ({"tie": "all", "encoder": RNN | {"width": 64}, "decoder": TRANSFORMER},
                    'tie = "all" needs one width, and encoder.width = 64, decoder.width = 256: use tie = "decoder"'),
    "a summary for nobody": ({"encoder": RNN | {"summary": "max"}, "decoder": TRANSFORMER},
                             'encoder.summary = "max" means nothing with decoder.kind = "transformer", which looks'),
    "a side of its own": ({"encoder": RNN | {"width": 9}, "decoder": RNN}, "encoder: bidirectional = true needs an"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_settings_that_do_not_fit(misfit):
    model, message = MISFITS[misfit]
    with pytest.raises(ConfigError) as error:
        parse(model)
    line, *others = str(error.value).splitlines()
    assert line.startswith(f"my.toml, [model]: {message}") and line.endswith(".")
    assert all("max_positions" in other for other in others)


@pytest.mark.parametrize("tokenizer", [{"shared": False}, {"source": {}, "target": {}}], ids=["parted", "two sides"])
def test_one_table_and_copying_need_one_vocabulary(tokenizer):
    with pytest.raises(ConfigError) as error:
        parse(RNN | {"tie": "all", "attention": "before", "copy": True}, tokenizer=tokenizer)
    assert str(error.value).splitlines() == [
        'my.toml, [model]: tie = "all" needs one vocabulary for both sides: set [tokenizer] shared = true, or tie = '
        '"decoder".',
        "my.toml, [model]: copy = true needs a target vocabulary that holds the source's tokens: set [tokenizer] "
        "shared = true, or leave copy out.",
    ]


def test_a_loss_of_coverage_needs_coverage():
    with pytest.raises(ConfigError, match=r"coverage_loss = 1.0 means nothing without coverage = true: set it, or le"):
        parse(RNN | {"attention": "after"}, train={"coverage_loss": 1.0})


def test_passes_that_are_to_differ_need_something_that_differs():
    with pytest.raises(ConfigError, match=r"r_drop = 5.0 compares two passes that differ by dropout alone, and there"):
        parse(TRANSFORMER | {"dropout": 0.0}, train={"r_drop": 5.0})
    for model in (RNN, TRANSFORMER | {"dropout": 0.0, "stochastic_depth": 0.1}, {
            "encoder": RNN | {"dropout": 0.0}, "decoder": TRANSFORMER | {"dropout": 0.0, "attention_dropout": 0.1}}):
        assert parse(model, train={"r_drop": 5.0}).train.r_drop == 5.0


def test_several_faults_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        parse(RNN, train={"steps": 0, "stpes": 1})
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and "[train]: steps = 0" in lines[0] and 'unknown key "stpes"' in lines[1]


def test_unknown_keys_do_not_hide_what_does_not_fit():
    with pytest.raises(ConfigError) as error:
        parse(TRANSFORMER | {"heads": 3, "kv_heads": 2, "window": "local_m"}, train={"stpes": 1})
    lines = str(error.value).splitlines()
    assert ['unknown key "window"' in lines[0], 'unknown key "stpes"' in lines[1]] == [True, True]
    assert "heads = 3 do not divide width = 256" in lines[2] and "kv_heads = 2 do not divide heads = 3" in lines[3]


def test_a_program_is_told_the_same():
    with pytest.raises(ConfigError, match=r"^\[model\]: residual = true means .*; bidirectional = true needs an"):
        build_model(RNNConfig(kind="rnn", width=9, layers=1, residual=True), 8, 8)


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
