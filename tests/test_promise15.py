"""Promise 15 on 1,000 sentences for each family, in float32: a sentence's output does not depend on its batch. The
same for all strategies, on 64 sentences, is in test_search.py."""

import importlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, make_config, make_model
from regard.config import DecodeConfig
from regard.data.batches import Batch
from regard.decode.ensemble import Ensemble
from regard.decode.search import Limits, greedy

FOLDER = Path(__file__).parent.parent / "benchmarks"
SIZE = 60


@pytest.fixture
def promise15(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("promise15")


def thousand():
    draw = random.Random(1)
    return [[draw.randrange(4, SIZE) for _ in range(draw.randint(1, 20))] for _ in range(1000)]


def lively(name):
    """An untrained model in float32 whose outputs differ from sentence to sentence."""
    for seed in range(1, 100):
        model = make_model(name, seed, sizes=(SIZE, SIZE), width=16).float()
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.4 * torch.randn_like(weights)
        if len({tuple(one.tokens) for one in greedy(model, Batch.of(thousand()[:64]), Limits(10))}) > 24:
            return model
    raise AssertionError(f"{name}: all seeds give a model that says the same to every sentence")


@pytest.mark.proof
@pytest.mark.parametrize("family", [*FAMILIES, "ensemble"])
def test_a_thousand_sentences_are_translated_alike_in_all_batches(family, promise15):
    sources, settings = thousand(), DecodeConfig(beam=5, max_length=10)
    model = Ensemble([lively(name) for name in FAMILIES[1:3]]) if family == "ensemble" else lively(family)
    found = promise15.check(model, sources, settings)
    assert list(found) == ["7", "64", "64, others", "by tokens"]
    assert all(each["different"] == 0 and each["score"] < 1e-4 for each in found.values()), found
    outputs = promise15.outputs(model, sources, settings, promise15.PARTINGS["64"])
    assert len({tuple(one.tokens) for one in outputs}) > 50


def test_an_output_that_depends_on_its_batch_is_found(promise15):
    model = lively("after-general")
    start = model.start
    model.start = lambda batch: start(batch).advance(0, {"0.hidden": torch.randn(len(batch), 16)})
    found = promise15.check(model, thousand()[:100], DecodeConfig(beam=2, max_length=8))
    assert all(each["different"] > 0 for each in found.values())


def test_the_script_says_so(corpus, tmp_path):
    from regard.training.loop import train

    train(make_config(corpus, "after-general"), tmp_path / "run", quiet=True)
    command = [sys.executable, str(FOLDER / "promise15.py"), str(tmp_path / "run"), "--source",
               str(corpus / "train.source"), "--lines", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith("run, beam 5, 20 sentences: 7: 0 differ, scores by ") and second.startswith("run, beam 1, ")
