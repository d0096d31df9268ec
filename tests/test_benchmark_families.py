"""The benchmark of all families: it runs, and what it compares are the same models. Timings are never asserted."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import make_batch
from regard.model.seq2seq import build_model

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = ("fixed, initial", "fixed, every step", "after, general", "after, general, input feeding", "before, additive",
         "conv", "transformer")
SPEEDS = [f"{name}_tokens_per_second" for name in ("plain", "regard", "float32", "transformer")]
RATIOS = [f"{name}{of}" for name in ("ratio", "ratio_float32", "ratio_transformer") for of in ("", "_min", "_max")]
SHORT = ["--rounds", "2", "--block", "1", "--warmup", "0", "--threads", "1"]
RENAMED = (
    (r"^embedding\.", "encoder.embedding."),
    (r"^encoder\.(\w+)_reverse$", r"encoder.layers.0.backwards.rnn.\1"),
    (r"^encoder\.(?=weight|bias)", "encoder.layers.0.forwards.rnn."),
    (r"^decoder\.(?=weight|bias)", "decoder.layers.0.rnn."),
    (r"^cell\.(\w+)$", r"decoder.layers.0.rnn.\1_l0"),
    (r"^(bridge|readout)\.", r"decoder.\1."),
    (r"^score\.", "decoder.attention.score.weight."),
    (r"^(query|key|v)\.weight$", r"decoder.attention.score.\1.weight"),
    (r"^(source|target)_places\.weight$", lambda found: f"{SIDES[found[1]]}.positions.table"),
    (r"^(encoder|decoder)\.(\d)\.", r"\1.layers.\2.convolution.linear."),
    (r"^query\.(\d)\.", r"decoder.layers.\1.query."),
    (r"^maps\.(encoder|decoder)_", r"\1."),
    (r"parametrizations\.weight\.original0$", "length"),
    (r"parametrizations\.weight\.original1$", "direction"),
)
"""What a plain model's weights are called, and their names in Regard's."""
SIDES = {"source": "encoder", "target": "decoder"}


@pytest.fixture
def families(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("families")


@pytest.fixture
def data(tmp_path):
    """A folder with a tiny train.en and train.de."""
    texts = {"en": "the dog sees a red ball and runs home", "de": "der hund sieht einen roten ball und rennt heim"}
    for side, text in texts.items():
        words = text.split()
        lines = [" ".join(words[first : first + 2 + first % 5]) for first in range(8)]
        (tmp_path / f"train.{side}").write_text("\n".join(lines * 3) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_it_measures_every_family(data):
    done = subprocess.run([sys.executable, FOLDER / "families.py", "--data", data, "--json", *SHORT],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["threads"], result["rounds"], result["block"]) == (1, 2, 1)
    assert tuple(result["families"]) == NAMES
    for name, found in result["families"].items():
        assert set(found) == {"parameters", "plain_parameters", *SPEEDS, *RATIOS}
        assert all(value > 0 for value in found.values())
        assert found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
        assert done.stderr.count(f"{name}: round") == (6 if name == "transformer" else 8)


def test_some_families_as_a_table(families, data, monkeypatch, capsys):
    names = ["after, general", "fixed, initial"]
    monkeypatch.setattr(sys, "argv", ["families.py", "--data", str(data), "--only", *names, *SHORT])
    families.main()
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [f"| {name}" for name in names]


def test_a_missing_corpus_is_told_without_a_traceback(families, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["families.py", "--data", str(tmp_path), *SHORT])
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path / "train.en"))):
        families.main()


@pytest.mark.parametrize("name", NAMES)
def test_plain_and_ours_have_the_same_size(families, name):
    family = families.FAMILIES[name]
    plain, ours = families.parameters(family.plain(8000)), families.parameters(model_of(families, name, 8000))
    # nn.Transformer ends either stack with one norm more
    assert plain - ours == (4 * 128 if name == "transformer" else 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "transformer"])
def test_plain_and_ours_are_the_same_function(families, name):
    ours, plain = model_of(families, name, 9).eval(), families.FAMILIES[name].plain(9).eval()
    theirs = dict(ours.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for weights in ours.parameters():
            weights.normal_(std=0.1)
        for mine, weights in plain.named_parameters():
            weights.copy_(shaped(theirs[renamed(mine)], weights.shape))
    ours, plain, batch = ours.double(), plain.double(), make_batch()
    features = plain.features(batch)
    torch.testing.assert_close(features[batch.target_mask], ours(batch)[batch.target_mask])
    loss = families.Contestant.ours(ours, families.config_of(families.FAMILIES[name], Path()).train, "float32").loss
    torch.testing.assert_close(plain.loss(batch), loss(batch))


def model_of(families, name, size):
    """Regard's model of a family."""
    config = families.config_of(families.FAMILIES[name], Path())
    return build_model(config.model, size, size)


def renamed(name):
    """What a plain model's weights are called in Regard's."""
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def shaped(weights, shape):
    """Regard's weights as torch's module holds them."""
    if weights.dim() == 2 and len(shape) == 3:  # (2 D, k D) -> (2 D, D, k)
        return weights.unflatten(1, (shape[2], shape[1])).transpose(1, 2)
    return weights.view(shape)
