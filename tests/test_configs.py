"""Every shipped recipe and preset trains: a few updates on made-up text in the place of its files."""

import random
from importlib.resources import files
from pathlib import Path

import pytest

import regard
from regard.config import read_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.toml"))
PRESETS = sorted(Path(str(files("regard") / "presets")).glob("*.toml"))
QUICK = ["train.steps=3", "train.validate_every=2", "train.batch_tokens=200", "train.average=2", "train.log_every=1",
         "model.width=16", "model.layers=1", "tokenizer.size=60", "train.minutes=1"]


def write_text(folder: Path, config: regard.Config) -> None:
    """Files of the names that a config reads, of sentences whose translation is their words reversed."""
    random.seed(0)
    words = ["red", "dog", "runs", "over", "green", "hills", "and", "sleeps"]
    for corpus in [*config.data.train, config.data.valid, *filter(None, [config.data.test])]:
        pairs = [(line, " ".join(reversed(line.split())))
                 for line in (" ".join(random.choices(words, k=random.randint(2, 6))) for _ in range(40))]
        texts = {corpus.source: [s for s, _ in pairs], corpus.target: [t for _, t in pairs],
                 corpus.pairs: [f"{s}\t{t}" for s, t in pairs]}
        for path, lines in texts.items():
            if path is not None:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_there_are_recipes_and_presets():
    assert len(RECIPES) >= 3
    assert len(PRESETS) >= 3


@pytest.mark.parametrize("path", [*RECIPES, *PRESETS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_trains(path, tmp_path):
    sets = [f"data.root={tmp_path}", *QUICK]
    config = read_config(path, sets)
    if config.model.kind == "transformer":
        config = read_config(path, [*sets, "model.heads=2", "model.feedforward=16"])
    write_text(tmp_path, config)
    run = regard.train(config, tmp_path / "run", quiet=True)
    assert [row["step"] for row in run.metrics() if row["kind"] == "valid"] == [2, 3]
    assert regard.load(run.folder).translate("red dog runs").problem is None
