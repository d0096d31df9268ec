"""What a training is said to take, against what it takes."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_batch, make_config, make_model, model_config
from regard import cli
from regard.config import write_config
from regard.data.shards import prepare
from regard.errors import ConfigError
from regard.model.cells import Cell
from regard.training import plan
from regard.training.plan import GPU, forecast, gpu_named, growth, operations, parameters, saved_bytes


@pytest.fixture
def planned(corpus):
    """A config over a small corpus, and its forecast."""
    config = make_config(corpus, steps=20, validate_every=8, precision="float32")
    return config, forecast(config, prepare(config, corpus / "run"), 0.2, print)


@pytest.mark.parametrize("name", ["transformer-post", "conv"])
def test_operations_are_those_that_torch_counts(name):
    """Torch counts the products that it makes; a table of token vectors is none of them."""
    model, batch = make_model(name, tie="all", sizes=(9, 9)).float(), make_batch([(14, 14)] * 4)
    with FlopCounterMode(display=False) as counter:
        model.project(model(batch)).sum().backward()
    tokens = float(batch.target_mask.sum())
    found = operations(model, model_config(name), tokens, tokens, 15.0)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_parameters_are_parted_and_shared_ones_count_once():
    for name in ("transformer-post", "fixed-lstm", "mixed-conv-after"):
        model = make_model(name)
        parts = parameters(model)
        assert parts.pop("parameters") == sum(parts.values()) == sum(each.numel() for each in model.parameters())
        assert all(parts.values())


def test_a_forecast_adds_up(planned):
    _, found = planned
    assert found.updates == 20 and found.precision == "float32"
    assert found.seconds == pytest.approx(20 * found.update_seconds + 3 * found.validation_seconds)
    assert found.update_seconds > 0 and found.validation_seconds > 0 and found.activations > 0
    assert found.memory > 4 * 4 * found.parameters
    assert 20 * 30 < found.target_tokens < 20 * 64


def test_memory_is_that_of_a_long_training_with_its_validations(corpus, monkeypatch):
    config, measured = make_config(corpus, steps=20), []
    whole = plan.measured_validation
    monkeypatch.setattr(plan, "measured_validation", lambda *given: measured.append("validation") or whole(*given))
    monkeypatch.setattr(plan.machine, "peak_memory", lambda device: measured.append("memory") or 1000)
    monkeypatch.setattr(plan, "growth", lambda peaks, updates: 250)
    assert forecast(config, prepare(config, corpus / "run"), 0.1, print).memory == 1250
    assert measured[-2:] == ["validation", "memory"]


def test_the_heap_grows_with_each_doubling_of_the_updates_as_it_has():
    assert growth([1000, 1100, 1100, 1200], 16) == 200  # 100 in each of two doublings, and two are to come
    assert growth([1000, 1000, 1000, 1000], 300) == 0
    assert growth([1000, 1100, 1100, 1200], 3) == 0  # there are no more
    assert growth([0, 0, 300, 300], 10**6) == growth([0, 0, 300, 300], 300) > 0


def test_memory_is_seen_for_some_updates_even_where_the_time_is_short(corpus, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "growth", lambda peaks, updates: seen.extend(peaks) or 0)
    config = make_config(corpus, steps=100)
    forecast(config, prepare(config, corpus / "run"), 1.0, print)
    assert len(seen) >= plan.HEAP_SEEN and min(seen) > 0


def test_minutes_end_a_forecast_too(corpus):
    config = make_config(corpus, steps=10**7, minutes=1.5)
    assert forecast(config, prepare(config, corpus / "run"), 0.1, print).seconds == 90


def test_twice_the_gpus_take_half_the_time_and_share_what_is_sharded(planned):
    _, found = planned
    one, two = (found.on(GPU(100, 10), count) for count in (1, 2))
    assert one["seconds"] == 2 * two["seconds"] == pytest.approx(found.operations * 20 / (0.3 * 100e12))
    assert one["memory"] == one["memory_sharded"] == 18 * found.parameters + found.activations
    assert two["memory"] - two["memory_sharded"] == 9 * found.parameters


def test_what_autograd_keeps_is_counted_once():
    x = torch.randn(100, requires_grad=True)
    with saved_bytes() as saved:
        y = torch.exp(2 * x)
        _ = y * y  # y is kept by both
    assert sum(saved.values()) == 400


def test_what_a_function_of_our_own_keeps_is_counted():
    """It is made where no gradient is, so that it looks like a leaf; an LSTM keeps 8 numbers of each state."""
    cell, x = Cell("lstm", 4, 4), torch.randn(2, 6, 4)
    with saved_bytes() as saved:
        cell(x)
    assert sum(saved.values()) >= 8 * 4 * x.numel()


def test_an_unknown_gpu_is_refused():
    assert gpu_named("H100").teraflops == 989
    with pytest.raises(ConfigError, match="--gpu abacus: known are rtx4090"):
        gpu_named("abacus")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.app([*map(str, arguments)])
    return ended.value.code, capsys.readouterr()


def test_the_command_tells_and_writes_no_checkpoint(corpus, tmp_path, capsys):
    write_config(make_config(corpus, steps=20), tmp_path / "plan.toml")
    out = ("--out", tmp_path / "run", "--seconds", "0.1")
    code, told = run(capsys, "plan", tmp_path / "plan.toml", *out, "--gpus", "2", "--gpu", "l4")
    assert code == 0 and "parameters" in told.out and "on 2 GPUs of 121 TFLOP/s, 30% of it" in told.out
    assert "ms an update" in told.out and not list((tmp_path / "run" / "checkpoints").iterdir())
    code, told = run(capsys, "plan", tmp_path / "plan.toml", *out, "--json", "--gpus", "2", "--teraflops", "5",
                     "--gigabytes", "8")
    found = json.loads(told.out)
    assert found["gpus"]["seconds"] == pytest.approx(found["operations"] * 20 / (2 * 5e12 * 0.3))
