"""What a training can be told, each shown to act, and resumed to the bit."""

import hashlib
import json
import math

import pytest
import torch

from conftest import make_config
from regard.errors import ConfigError, Interrupted, RunError
from regard.training import checkpoint as checkpoints
from regard.training import gradients as module
from regard.training.gradients import size
from regard.training.interrupt import Stop
from regard.training.loop import Trainer, train
from regard.training.objective import loss_of
from regard.training.run import Run
from test_loop import trainer_of

OPTIONS = {
    "adam": {"optimizer": "adam", "weight_decay": 0.01},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "linear", "final_learning_rate": 0.1},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "adafactor": {"optimizer": "adafactor", "schedule": "cosine"},
    "ema": {"ema": 0.9, "average": 2},
    "r_drop": {"r_drop": 5.0},
    "freeze": {"freeze": ["encoder", "decoder.embedding"]},
    "auto": {"accumulate": "auto"},
    "stochastic_depth": {"model": {"stochastic_depth": 0.5}},
    "many together": {"optimizer": "adafactor", "ema": 0.99, "r_drop": 1.0, "freeze": ["encoder.embedding"],
                      "accumulate": 2, "model": {"stochastic_depth": 0.2, "attention_dropout": 0.1}},
    "conv": {"name": "conv", "ema": 0.9, "r_drop": 1.0, "model": {"stochastic_depth": 0.5}},
    "copying": {"name": "after-everything", "ema": 0.9, "r_drop": 1.0, "optimizer": "sgd"},
}


def outcome(run):
    """Losses, and the last and the best weights with the optimizer's state."""
    rows = [(row["kind"], row["step"], row.get("loss"), row.get("rows")) for row in run.metrics()]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for path in (run.checkpoints()[-1], run.best())
               for file in sorted(path.glob("*.safetensors"))]
    return rows, digests


def train_in_parts(config, folder, monkeypatch, stops=(2, 7)):
    """Train, stopped by a signal at some steps and started again each time."""
    arrived = []

    def fit(self, stop):
        def step(number):
            if number in stops and number not in arrived:
                arrived.append(number)
                stop.signal = 15

        monkeypatch.setattr(self.reporter, "step", step)
        real(self, stop)

    real = Trainer.fit
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        for _ in stops:
            with pytest.raises(Interrupted):
                train(config, folder, quiet=True)
        return train(config, folder, quiet=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_is_uninterrupted(name, corpus, tmp_path, monkeypatch):
    config = make_config(corpus, **{"name": "transformer-pre"} | OPTIONS[name])
    expected = outcome(train(config, tmp_path / "whole", quiet=True))
    assert outcome(train_in_parts(config, tmp_path / "parts", monkeypatch)) == expected
    assert all(loss is None or math.isfinite(loss) for _, _, loss, _ in expected[0])


@pytest.mark.parametrize("name, changes", [
    (name, options) for name, options in OPTIONS.items() if name not in ("auto", "conv", "copying")])
def test_each_changes_what_is_learned(name, changes, corpus, tmp_path):
    plain = train(make_config(corpus, model={"dropout": 0.2}), tmp_path / "plain", quiet=True)
    other = train(make_config(corpus, **changes), tmp_path / "other", quiet=True)
    left, right = (checkpoints.load(run.find("last")).model for run in (plain, other))
    assert any(not torch.equal(left[name], right[name]) for name in left)


# --- the average of the weights ------------------------------------------------------------------------------------


def test_the_averaged_weights_are_validated_saved_and_translate(corpus, tmp_path):
    config = make_config(corpus, ema=0.8, steps=8, validate_every=8)
    trainer, _ = trainer_of(config, tmp_path / "run")
    expected = {name: weights.detach().clone() for name, weights in trainer.model.named_parameters()}
    update = trainer.update

    def watched():
        result, step = update(), trainer.standing.step + 1
        share = min(0.8, (1 + step) / (10 + step))
        for name, weights in trainer.model.named_parameters():
            expected[name] = share * expected[name] + (1 - share) * weights.detach()
        return result

    trainer.update = watched
    trainer.fit(Stop())
    saved, trained = checkpoints.load(trainer.run.find("last")), dict(trainer.model.named_parameters())
    for name, weights in saved.model.items():
        torch.testing.assert_close(weights, expected[name])
        assert not torch.equal(weights, trained[name])
        assert torch.equal(saved.optimizer[f"trained.{name}"], trained[name])
    with trainer.ema.in_model():
        scores = trainer.validation.scores(trainer.model)
    row, = (row for row in trainer.run.metrics() if row["kind"] == "valid")
    assert row["loss"] == scores["loss"] == saved.state["score"] != trainer.validation.scores(trainer.model)["loss"]
    from regard.translator import load

    for name, weights in load(trainer.run.folder).model.named_parameters():
        assert torch.equal(weights, saved.model[name])


def test_the_average_may_begin_and_end_in_the_midst_of_a_training(corpus, tmp_path):
    for steps, ema in ((4, 0.0), (8, 0.9), (12, 0.0)):
        run = train(make_config(corpus, steps=steps, ema=ema), tmp_path / "run", quiet=True)
        held = checkpoints.load(run.find("last")).optimizer
        assert any(name.startswith("trained.") for name in held) == bool(ema)
    expected = train(make_config(corpus), tmp_path / "whole", quiet=True)
    left, right = (checkpoints.load(one.find("last")).model for one in (run, expected))
    assert all(torch.equal(left[name], right[name]) for name in left), "the weights that learn are never touched"


# --- frozen weights ------------------------------------------------------------------------------------------------


def test_frozen_weights_stay(corpus, tmp_path):
    config = make_config(corpus, "transformer-post", freeze=["encoder", "decoder.layers.0"], ema=0.9)
    trainer, _ = trainer_of(config, tmp_path / "run")
    before = {name: weights.detach().clone() for name, weights in trainer.model.named_parameters()}
    trainer.fit(Stop())
    saved = checkpoints.load(trainer.run.find("last"))
    for name, weights in saved.model.items():
        assert torch.equal(weights, before[name]) == name.startswith(("encoder.", "decoder.layers.0.")), name
    assert not [name for name in saved.optimizer if "encoder" in name or "decoder.layers.0." in name]


def test_a_wrong_name_is_told_before_anything_is_made(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r'freeze: no weight\'s name begins with "encodr". There are: decoder, enc'):
        train(make_config(corpus, freeze=["encodr"]), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# --- numbers that are none -----------------------------------------------------------------------------------------


def poison(monkeypatch, *attempts, value=math.nan, part="loss"):
    """Make the loss, or the gradient alone, no number at some calls, counted over all trainings from 1."""
    calls = []

    def loss(model, batch, *others):
        found, surprise = loss_of(model, batch, *others)
        calls.append(batch)
        if len(calls) not in attempts:
            return found, surprise
        if part == "loss":
            return found * value, surprise * value
        model.output.register_hook(lambda grad: grad * (math.nan if calls[-1] is batch else 1))
        return found, surprise

    monkeypatch.setattr(module, "loss_of", loss)
    return calls


@pytest.mark.parametrize("part, value", [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan)])
def test_an_update_that_is_no_number_is_not_made_and_its_batch_is_named(part, value, corpus, tmp_path, monkeypatch):
    trainer, said = trainer_of(make_config(corpus, steps=6, validate_every=6), tmp_path / "run")
    poison(monkeypatch, 3, value=value, part=part)
    update, norms = trainer.update, []

    def watched():
        before = [weights.detach().clone() for weights in trainer.model.parameters()]
        norms.append(update()[1])
        same = all(map(torch.equal, before, trainer.model.parameters()))
        assert same == (len(norms) == 3) and all(weights.grad is None for weights in trainer.model.parameters())
        return (math.nan if len(norms) == 3 else 1.0), norms[-1]

    trainer.update = watched
    trainer.fit(Stop())
    rows = trainer.order.rows(0, 2)[0].tolist()
    assert said.getvalue().count("no update was made") == 1
    assert ("Warning: the loss or its gradient is not a number at step 3, epoch 0, position 2; no update was made. Its "
            f"rows of the prepared data: {', '.join(map(str, rows[:5]))}") in said.getvalue()
    row, = (row for row in trainer.run.metrics() if row["kind"] == "skipped")
    assert (row["step"], row["epoch"], row["position"], row["rows"]) == (3, 0, 2, rows)
    assert [row["step"] for row in trainer.run.metrics() if row["kind"] == "train"] == [1, 2, 4, 5, 6]
    assert (trainer.standing.step, trainer.standing.skipped, trainer.standing.skipped_in_row) == (6, 1, 0)
    json.loads(trainer.run.metrics_file.read_text().splitlines()[2], parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("most", [1, 3])
def test_too_many_of_them_in_a_row_end_the_training(most, corpus, tmp_path, monkeypatch):
    poison(monkeypatch, 2, 3 if most == 3 else 2, *range(5, 9))  # with most = 3, two in a row are not yet too many
    trainer, said = trainer_of(make_config(corpus, max_skipped=most, steps=20, validate_every=4), tmp_path / "run")
    with pytest.raises(RunError) as error:
        trainer.fit(Stop())
    last, standing = 2 if most == 1 else 7, trainer.standing
    assert standing.step + 1 == last
    assert str(error.value) == (
        f"{trainer.run.folder}: the loss or its gradient is not a number at step {last}, epoch {standing.epoch}, "
        f"position {standing.position}, the {most}. of such updates in a row; none of them was made. Checkpoints "
        "before them are whole. Try a lower train.learning_rate (it is 0.01) or a longer train.warmup (4), with "
        "--fresh")
    assert said.getvalue().count("no update was made") == (0 if most == 1 else 4)
    assert len(trainer.run.checkpoints()) == (most == 3)


def test_a_skipped_update_is_skipped_again_after_going_on(corpus, tmp_path, monkeypatch):
    bad = {3, 6, 7, 8}

    def loss(model, batch, *others):
        found, surprise = loss_of(model, batch, *others)
        return (found * math.nan, surprise) if step_of["trainer"].standing.step + 1 in bad else (found, surprise)

    step_of, real = {}, Trainer.resume
    monkeypatch.setattr(Trainer, "resume", lambda self: (step_of.update(trainer=self), real(self)))
    monkeypatch.setattr(module, "loss_of", loss)
    config = make_config(corpus, ema=0.9)
    expected = outcome(train(config, tmp_path / "whole", quiet=True))
    assert [step for kind, step, *_ in expected[0] if kind == "skipped"] == sorted(bad)
    assert outcome(train_in_parts(config, tmp_path / "parts", monkeypatch, (3, 6, 7))) == expected
    with pytest.raises(RunError, match=r"not a number at step 8, .*, the 3. of such updates in a row"):
        train_in_parts(make_config(corpus, max_skipped=3), tmp_path / "few", monkeypatch, (6, 7))


def test_a_first_update_that_is_skipped_leaves_a_checkpoint_to_go_on_from(corpus, tmp_path, monkeypatch):
    poison(monkeypatch, 1)
    run = train_in_parts(make_config(corpus), tmp_path / "run", monkeypatch, (1,))
    assert run.metrics()[0]["kind"] == "skipped" and run.metrics()[-1]["step"] == 12


def test_weights_that_are_no_numbers_are_never_saved(corpus, tmp_path):
    trainer, _ = trainer_of(make_config(corpus, max_skipped=100), tmp_path / "run")
    update = trainer.update

    def update_and_harm():
        result = update()
        if trainer.standing.step == 5:
            with torch.no_grad():
                trainer.model.output[4, 0] = math.inf
        return result

    trainer.update = update_and_harm
    with pytest.raises(RunError, match=r"weights are no numbers any more at step 8, so they were not saved. Check"):
        trainer.fit(Stop())
    assert [path.name for path in trainer.run.checkpoints()] == ["step-00000004"]


@pytest.mark.parametrize("metric", ["bleu", "token_error_rate"])
def test_outputs_of_a_model_whose_loss_is_no_number_are_worth_nothing(metric, corpus, tmp_path, monkeypatch):
    trainer, _ = trainer_of(make_config(corpus, steps=4, metric=metric), tmp_path / "run")
    monkeypatch.setattr(trainer.validation, "scores", lambda model: {"loss": math.nan, metric: 0.0})
    trainer.fit(Stop())
    assert trainer.standing.best_score is None and trainer.run.validated() == []


@pytest.mark.parametrize("name, settings", [
    ("transformer-pre", {}), ("after-general", {"optimizer": "sgd", "clip": 0.0})])
def test_a_learning_rate_that_is_far_too_high_is_told_of_once(name, settings, corpus, tmp_path):
    config = make_config(corpus, name, learning_rate=1e3, steps=90, validate_every=90, **settings)
    trainer, said = trainer_of(config, tmp_path / "run")
    try:
        trainer.fit(Stop())
    except RunError as error:  # where it comes to that
        assert "Try a lower train.learning_rate (it is 1000.0)" in str(error)
    assert said.getvalue().count("The learning rate") == 1
    assert "is probably too high: try train.learning_rate = 3e+02" in said.getvalue()
    step = int(said.getvalue().split("Warning: step ")[1].split(",")[0])
    assert step <= 10


def test_an_ordinary_training_is_not_warned_of(corpus, tmp_path):
    trainer, said = trainer_of(make_config(corpus, steps=120, validate_every=120), tmp_path / "run")
    trainer.fit(Stop())
    assert "Warning" not in said.getvalue() and trainer.standing.lowest < trainer.standing.running + 1


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_training_whose_memory_runs_out_goes_on_and_is_resumed_to_the_bit(corpus, tmp_path, monkeypatch):
    """Memory that holds 40 padded tokens, in an update of two pieces, with dropout."""
    refused = []

    def loss(model, batch, *others):
        if size(batch) > 40:
            refused.append(size(batch))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(model, batch, *others)

    monkeypatch.setattr(module, "loss_of", loss)
    config = make_config(corpus, accumulate=2, batch_tokens=100)
    expected = outcome(train(config, tmp_path / "whole", quiet=True))
    assert refused
    assert outcome(train_in_parts(config, tmp_path / "parts", monkeypatch)) == expected
    state = checkpoints.load(Run.open(tmp_path / "parts").find("last")).state
    assert state["too_large"] == min(refused)


def test_without_dropout_the_losses_are_those_of_a_larger_memory(corpus, tmp_path, monkeypatch):
    config = make_config(corpus, model={"dropout": 0.0}, precision="float32")
    runs = [train(config, tmp_path / "large", quiet=True)]
    real = loss_of

    def loss(model, batch, *others):
        if size(batch) > 30:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(model, batch, *others)

    monkeypatch.setattr(module, "loss_of", loss)
    runs.append(train(config, tmp_path / "small", quiet=True))
    left, right = ([row["loss"] for row in run.metrics()] for run in runs)
    assert left == pytest.approx(right, rel=1e-4)


def test_memory_is_measured_before_the_first_update_and_not_again(corpus, tmp_path, monkeypatch):
    measured, real = [], module.Gradients.measure
    monkeypatch.setattr(module.Gradients, "measure", lambda self, order: (measured.append(order), real(self, order)))
    config = make_config(corpus, accumulate="auto")
    train_in_parts(config, tmp_path / "run", monkeypatch)
    assert len(measured) == 1
    plain = train(make_config(corpus), tmp_path / "plain", quiet=True)
    assert outcome(Run.open(tmp_path / "run")) == outcome(plain), "where all fits, auto is the same as 1"


def test_memory_that_runs_out_in_validation_parts_its_batches(corpus, tmp_path, monkeypatch):
    from regard.training import validation

    trainer, _ = trainer_of(make_config(corpus, metric="token_error_rate"), tmp_path / "run")
    expected, rows = trainer.validation.scores(trainer.model), []
    real = validation.greedy

    def greedy(model, batch, limits):
        rows.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, limits)

    monkeypatch.setattr(validation, "greedy", greedy)
    assert trainer.validation.scores(trainer.model) == pytest.approx(expected) and max(rows) > 2
    monkeypatch.setattr(validation, "greedy", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.validation.scores(trainer.model)
