"""Regard on a GPU that is not here (`pretend_gpu`): what a processor finds, and no waiting in an update."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import regard
from conftest import FAMILIES, MODELS, make_batch, make_config, make_model, write_reversal
from pretend_gpu import GPU, at_work
from regard.config import DecodeConfig
from regard.config_train import TrainConfig
from regard.data.batches import Batch
from regard.decode.search import Demands, search
from regard.training import checkpoint, loop
from regard.training.ema import WeightAverage
from regard.training.gradients import Gradients
from regard.training.optimizer import make_optimizer
from regard.training.standing import Standing
from test_search import STRATEGIES, sixty_four

SOME = ["after-everything", "conv", "transformer-post"]


def updated(model, precision="float32", pieces=2, links=None, **settings):
    """Loss, norm and the average of the weights after an update as training makes it, on the processor; and what had
    to wait for the GPU before they came there."""
    settings = TrainConfig(ema=0.5, label_smoothing=0.1, **settings)
    gradients = Gradients(model, settings, precision, Standing(), print)
    optimizer, average = make_optimizer(model, settings), WeightAverage(model, settings.ema)
    with at_work() if model.output.is_cuda else nullcontext({}) as waits:
        loss = gradients.add([replace(make_batch(seed=seed), alignment=links) for seed in range(pieces)])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(1)
        waited = dict(waits)
        return loss.cpu(), norm.cpu(), {name: each.cpu() for name, each in average.averages.items()}, waited


def on_gpu(model):
    """The model there."""
    with at_work():
        return model.to(GPU)


@pytest.mark.parametrize("name, settings", [
    *((name, {}) for name in FAMILIES), *((name, {"r_drop": 1.0}) for name in SOME),
    ("transformer-pre", {"guided_alignment": 0.5, "links": torch.tensor([[0, 0, 1], [1, 2, 0]])}),
    ("before-coverage", {"coverage_loss": 1.0})])
def test_an_update_is_that_of_a_processor_and_waits_for_nothing(name, settings):
    *expected, _ = updated(make_model(name), **settings)
    *found, waited = updated(on_gpu(make_model(name)), **settings)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert not waited


@pytest.mark.parametrize("name", MODELS)
def test_an_update_in_bfloat16_is_near_that_in_float32_and_waits_for_nothing(name):
    expected = updated(make_model(name).float(), pieces=1)
    found = updated(on_gpu(make_model(name).float()), "bfloat16", pieces=1)
    torch.testing.assert_close(found[:2], expected[:2], rtol=0.05, atol=0.0)
    assert found[0] != expected[0] and found[0].dtype == torch.float32 and not found[3]


@pytest.mark.parametrize("name", SOME)
def test_what_is_dropped_there_changes_the_loss_and_waits_for_nothing(name):
    losses = [updated(on_gpu(make_model(name, dropout=dropout).float()), "bfloat16", pieces=1) for dropout in (0, 0.3)]
    assert losses[0][0] != losses[1][0] and not losses[1][3]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SOME)
def test_search_finds_what_it_finds_on_a_processor(name, strategy):
    settings, demands = STRATEGIES[strategy]
    batch = Batch.of(sixty_four()[:6])
    each = {name: [demands[name]] * len(batch) for name in ("force", "prefixes") if name in demands}
    wanted = DecodeConfig(max_length=8, **settings), Demands(**demands | each | {"lines": range(len(batch))})
    expected = search(make_model(name), batch, *wanted)
    model = on_gpu(make_model(name))
    with at_work():
        found = search(model, batch.to(GPU), *wanted)
    assert [[one.tokens for one in row] for row in found] == [[one.tokens for one in row] for row in expected]
    for row, others in zip(found, expected, strict=True):
        assert [one.score for one in row] == pytest.approx([one.score for one in others], abs=1e-5)


@pytest.fixture
def gpu(monkeypatch):
    """A context in which training runs there."""
    monkeypatch.setattr(loop, "pick_device", lambda name: GPU)
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, *rest, **named: save_file(  # it does so itself by CUDA
        {name: tensor.cpu() for name, tensor in tensors.items()}, *rest, **named))
    return at_work()


def trained(corpus, folder, name, **settings):
    """A run without dropout."""
    return loop.train(make_config(corpus, name, model={"dropout": 0.0}, precision="float32", **settings), folder,
                      quiet=True)


@pytest.mark.parametrize("name", ["after-general", "conv", "transformer-post"])
def test_a_training_goes_on_and_its_model_translates(name, corpus, tmp_path, request):
    settings, lines = {"metric": "bleu", "ema": 0.5, "average": 2}, ["a b c", "d d"]
    expected = trained(corpus, tmp_path / "processor", name, steps=8, **settings)
    with request.getfixturevalue("gpu"):
        trained(corpus, tmp_path / "gpu", name, steps=4, **settings)
        run = trained(corpus, tmp_path / "gpu", name, steps=8, **settings)
        found = regard.load(run.folder, device="gpu", engine="torch").translate(lines)
        losses = [[row["loss"] for row in each.metrics()] for each in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 10
    assert [one.text for one in found] == [one.text for one in regard.load(run.folder, engine="torch").translate(lines)]


def test_a_step_of_training_waits_once(corpus, tmp_path, gpu):
    waited = []
    with gpu as waits:
        for steps in (3, 8):
            waits.clear()
            trained(corpus, tmp_path / f"{steps}", "transformer-pre", steps=steps, validate_every=100, clip=1.0)
            waited.append(sum(waits.values()))
    assert waited[1] - waited[0] == 8 - 3


def test_the_benchmark_of_training_takes_turns_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import train

    write_reversal(tmp_path)
    for side, name in (("source", "en"), ("target", "de")):
        (tmp_path / f"train.{side}").rename(tmp_path / f"train.{name}")
    with at_work():
        speeds, _ = train.measure(
            train.settings(tmp_path, "tiny", 64), train.SIZES["tiny"], GPU, "bfloat16", rounds=1, block=1, warmup=1)
    assert all(speed > 0 for each in speeds.values() for speed in each) and len(speeds) == 3
