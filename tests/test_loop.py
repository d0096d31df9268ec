"""The training loop: what it logs, keeps, refuses and survives. That resuming is exact is a law (test_laws.py)."""

import errno
import io
import os
import signal

import pytest
import torch
from rich.console import Console

from conftest import make_config
from regard import products
from regard.config import TokenizerConfig
from regard.data.shards import prepare
from regard.errors import CheckpointError, DataError, Interrupted, RunError
from regard.model.seq2seq import build_model
from regard.text.tokenizer import Tokenizers
from regard.training import checkpoint as checkpoints
from regard.training import loop
from regard.training.cluster import Cluster
from regard.training.loop import Stop, Trainer, pick_device, signals, train
from regard.training.progress import Reporter
from regard.training.run import Run
from regard.training.schedule import learning_rate
from regard.training.validation import Validation
from test_laws import digest


def trainer_of(config, folder):
    """A trainer that has resumed, and what it says."""
    run, said = Run.create(folder, config), io.StringIO()
    reporter = Reporter(config.train, console=Console(file=said, soft_wrap=True))
    cluster = Cluster(0, 1, pick_device(config.train.device))
    trainer = Trainer(run, prepare(config, folder), reporter, cluster)
    trainer.resume()
    return trainer, said


def steps(run):
    return [int(path.name.removeprefix("step-")) for path in run.checkpoints()]


def test_a_training_learns_and_leaves_what_it_promises(corpus, tmp_path):
    config = make_config(corpus, steps=40, validate_every=10, log_every=5, metric="token_error_rate")
    run = train(config, tmp_path / "run", quiet=True)
    rows = {kind: [row for row in run.metrics() if row["kind"] == kind] for kind in ("train", "valid")}
    assert [row["step"] for row in rows["train"]] == list(range(5, 41, 5))
    assert [row["step"] for row in rows["valid"]] == [10, 20, 30, 40]
    assert rows["valid"][-1]["loss"] < rows["valid"][0]["loss"] and rows["train"][-1]["loss"] < rows["train"][0]["loss"]
    for row in rows["train"]:
        assert row["learning_rate"] == learning_rate(row["step"], config.train)
        assert row["gradient_norm"] > 0 and row["tokens_per_second"] > 0
    assert set(rows["valid"][0]) == {"kind", "step", "loss", "token_error_rate", "seconds"}
    seconds = [row["seconds"] for row in run.metrics()]
    assert seconds == sorted(seconds) and seconds[0] > 0
    state = checkpoints.load(run.find("last")).state
    assert (state["step"], state["score"]) == (40, rows["valid"][-1]["token_error_rate"])
    assert state["versions"].keys() == {"regard", "torch", "python", "machine"}
    best = min(rows["valid"], key=lambda row: row["token_error_rate"])
    assert run.best() == run.step_path(best["step"]) and state["best_step"] == best["step"]


@pytest.mark.parametrize("ema", [0, 0.9])
def test_a_validation_scores_the_weights_that_are_saved(corpus, tmp_path, monkeypatch, ema):
    """With an output table of a size that search keeps in an order of its own."""
    monkeypatch.setattr(products, "LARGE", 1)
    run = train(make_config(corpus, steps=40, validate_every=20, metric="token_error_rate", ema=ema), tmp_path / "run",
                quiet=True)
    tokenizers = Tokenizers.load(run.folder / "tokenizer")
    validation = Validation(run.config, tokenizers, torch.device("cpu"))
    told = {row["step"]: row for row in run.metrics() if row["kind"] == "valid"}
    assert len(run.checkpoints()) == 2
    for path in run.checkpoints():
        saved = checkpoints.load(path)
        model = build_model(run.config.model, *(side.size for side in tokenizers))
        checkpoints.put_weights(model, saved.model, path)
        for name, score in validation.scores(model).items():
            assert score == pytest.approx(told[saved.state["step"]][name], abs=1e-6), (path, name)


def test_every_epoch_is_read_in_its_order_and_each_row_of_figures_is_about_its_own_window(corpus, tmp_path):
    trainer, _ = trainer_of(make_config(corpus, steps=20, log_every=3, batch_tokens=100), tmp_path / "run")
    read, updates = [], []
    batches_of, update = trainer.ahead.update, trainer.update

    def batches(epoch, position):
        read.append((epoch, position))
        found = batches_of(epoch, position)
        updates.append([sum(batch.tokens for batch in found)])
        return found

    def watched():
        result = update()
        updates[-1] += result
        return result

    trainer.ahead.update = batches
    trainer.update = watched
    trainer.fit(Stop())
    plan = [(epoch, position) for epoch in range(20) for position in range(trainer.order.updates(epoch))]
    assert read == plan[:20] and read[-1][0] > 1
    assert (trainer.standing.epoch, trainer.standing.position) == plan[20]
    for row in (row for row in trainer.run.metrics() if row["kind"] == "train"):
        tokens, losses, norms = zip(*updates[row["step"] - 3 : row["step"]], strict=True)
        assert row["loss"] == pytest.approx(sum(losses) / sum(tokens)) and row["gradient_norm"] == norms[-1]
        assert row["epoch"] == plan[row["step"]][0]


def test_drawn_segmentations_are_learned_from_epoch_by_epoch_and_gone_on_with_exactly(corpus, tmp_path):
    """Once round all samples: what is validated is segmented as ever, what is learned from has more tokens."""
    def config(steps, **tokenizer):
        made = make_config(corpus, steps=steps, batch_tokens=256, validate_every=4)
        return made.model_copy(update={"tokenizer": TokenizerConfig(size=30, **tokenizer)})

    drawn = {"dropout": 0.5, "samples": 2}
    trainer, _ = trainer_of(config(12, **drawn), tmp_path / "whole")
    plain, _ = trainer_of(config(12), tmp_path / "plain")
    assert sum(trainer.order.updates(epoch) for epoch in range(3)) < 12, "it never came round"
    assert trainer.order.sums(0)[1] != trainer.order.sums(1)[1] > plain.order.sums(0)[1] * 1.1
    assert trainer.order.sums(0) == trainer.order.sums(2)
    assert (trainer.validation.sources, trainer.validation.targets) == (
        plain.validation.sources, plain.validation.targets)
    whole = train(config(12, **drawn), tmp_path / "whole", quiet=True)
    for steps in (1, 5, 12):
        parts = train(config(steps, **drawn), tmp_path / "parts", quiet=True)
    assert digest(parts.checkpoints()[-1]) == digest(whole.checkpoints()[-1])


def test_training_again_what_is_done_changes_nothing(corpus, tmp_path):
    config = make_config(corpus, average=2)
    run = train(config, tmp_path / "run", quiet=True)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    train(config, tmp_path / "run", quiet=True)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_one_update_is_the_same_in_pieces(corpus, tmp_path):
    """The gradient is normalised by the tokens of the whole update, so parting it saves memory and changes nothing."""
    found = []
    for pieces in (1, 3, "auto"):
        config = make_config(corpus, model={"dropout": 0.0}, precision="float32", accumulate=pieces, batch_tokens=100)
        trainer, _ = trainer_of(config, tmp_path / f"run {pieces}")
        assert len(trainer.order.update(0, 0)) == (3 if pieces == 3 else 1)
        found.append(trainer.update())
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == found[0]


def test_a_validation_that_is_not_a_number_is_never_the_best(corpus, tmp_path, monkeypatch):
    trainer, _ = trainer_of(make_config(corpus, steps=6, validate_every=2), tmp_path / "run")
    losses = iter([float("nan"), 2.0, float("inf")])
    monkeypatch.setattr(trainer.validation, "scores", lambda model: {"loss": next(losses)})
    trainer.fit(Stop())
    assert (trainer.standing.best_score, trainer.standing.best_step, trainer.standing.bad) == (2.0, 4, 1)
    assert trainer.run.best() == trainer.run.step_path(4)


def test_patience_and_minutes_end_a_training(corpus, tmp_path, monkeypatch):
    trainer, _ = trainer_of(make_config(corpus, steps=100, validate_every=2, patience=2), tmp_path / "patient")
    losses = iter([3.0, 2.0, 2.0, 2.5])
    monkeypatch.setattr(trainer.validation, "scores", lambda model: {"loss": next(losses)})
    trainer.fit(Stop())
    assert (trainer.standing.step, trainer.standing.best_step) == (8, 4) and steps(trainer.run) == [4, 6, 8]
    trainer, _ = trainer_of(make_config(corpus, steps=100, minutes=1e-9), tmp_path / "late")
    trainer.fit(Stop())
    assert trainer.standing.step == 1 and steps(trainer.run) == [1]


def test_the_best_stays_though_a_stop_comes_right_after_its_validation(corpus, tmp_path, monkeypatch):
    trainer, _ = trainer_of(make_config(corpus, steps=20, validate_every=2), tmp_path / "run")
    stop, losses = Stop(), iter([3.0, 1.0, *[2.0] * 8])

    def scores(model):
        stop.signal = signal.SIGTERM if trainer.standing.step == 4 else None
        return {"loss": next(losses)}

    monkeypatch.setattr(trainer.validation, "scores", scores)
    with pytest.raises(Interrupted, match=r"Stopped at step 4 of 20 and saved in .* goes on from there exactly"):
        trainer.fit(stop)
    trainer, _ = trainer_of(trainer.config, trainer.run.folder)
    monkeypatch.setattr(trainer.validation, "scores", scores)
    trainer.fit(Stop())
    assert trainer.run.best() == trainer.run.step_path(4) and trainer.standing.best_step == 4
    assert steps(trainer.run) == [4, 18, 20]


def harm(path):
    """Cut a checkpoint short, by another file in its place: the tensors of one that is loaded lie in the old."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:100])


def test_resume_takes_the_newest_whole_checkpoint_and_keeps_it(corpus, tmp_path):
    config = make_config(corpus, average=4)
    expected = train(config, tmp_path / "whole", quiet=True)
    run = train(config, tmp_path / "run", quiet=True)
    for step in (8, 12):
        harm(run.step_path(step))
    trainer, said = trainer_of(config, run.folder)
    assert trainer.standing.step == 4
    for step in (8, 12):
        assert f"Warning: {run.step_path(step)}/model.safetensors: is damaged: it has 100 bytes" in said.getvalue()
    assert f"going on from {run.step_path(4)}: step 4, epoch " in said.getvalue()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 4]
    trainer.save(None)
    assert steps(run) == [4], "a damaged checkpoint must not count among the last ones"
    train(config, run.folder, quiet=True)
    for step in (8, 12):
        found, right = (checkpoints.load(one.step_path(step)) for one in (run, expected))
        assert all(torch.equal(found.model[name], right.model[name]) for name in right.model)


def test_resume_without_a_whole_checkpoint(corpus, tmp_path):
    config = make_config(corpus)
    run = train(config, tmp_path / "run", quiet=True)
    for path in run.checkpoints():
        harm(path)
    before = steps(run)
    with pytest.raises(CheckpointError, match=r"all of its checkpoints are damaged. Start anew with --fresh --force"):
        train(config, run.folder, quiet=True)
    assert steps(run) == before
    train(config, run.folder, quiet=True, fresh=True, force=True)


def test_a_full_disk_ends_a_training_and_it_goes_on_afterwards(corpus, tmp_path, monkeypatch):
    config = make_config(corpus)
    expected = checkpoints.load(train(config, tmp_path / "whole", quiet=True).find("last")).model
    real = checkpoints.save_file

    def full(tensors, path):
        if "step-00000008" in str(path) and "optimizer" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RunError, match=r"step-00000008: cannot be written: No space left on device. What was saved"):
        train(config, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    run = Run.open(tmp_path / "run")
    assert steps(run) == [4] and checkpoints.load(run.find("last")).state["step"] == 4
    found = checkpoints.load(train(config, run.folder, quiet=True).find("last")).model
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_average_is_the_mean_of_the_last_validated_and_is_made_again_when_damaged(corpus, tmp_path, monkeypatch):
    config = make_config(corpus, average=2, steps=13)
    run = train(config, tmp_path / "run", quiet=True)
    average = checkpoints.load(run.average_path)
    assert average.state["of"] == ["step-00000012", "step-00000013"] and average.state["step"] == 13
    parts = [checkpoints.load(run.step_path(step)).model for step in (12, 13)]
    for name, tensor in average.model.items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)
    harm(run.average_path)
    train(config, run.folder, quiet=True)
    again = checkpoints.load(run.average_path)
    assert all(torch.equal(again.model[name], average.model[name]) for name in again.model)
    assert again.state["score"] == average.state["score"]

    # Killed while it averages: the training is whole, and the same command averages.
    checkpoints.shutil.rmtree(run.average_path)
    monkeypatch.setattr(loop, "mean_weights", lambda paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config, run.folder, quiet=True)
    monkeypatch.undo()
    train(config, run.folder, quiet=True)
    assert all(torch.equal(checkpoints.load(run.average_path).model[name], average.model[name]) for name in again.model)


def test_going_on_with_other_batches_or_another_metric(corpus, tmp_path):
    train(make_config(corpus, batch_tokens=16, steps=8), tmp_path / "run", quiet=True)
    config = make_config(corpus, batch_tokens=4096, steps=16, metric="token_error_rate")
    trainer, _ = trainer_of(config, tmp_path / "run")
    assert (trainer.standing.step, trainer.standing.epoch, trainer.standing.position) == (8, 1, 0)
    assert (trainer.standing.best_score, trainer.standing.best_step) == (None, 0)
    run = train(config, tmp_path / "run", quiet=True)
    assert run.best() in [run.step_path(12), run.step_path(16)]


def test_another_model_or_other_data_is_refused_and_the_run_still_opens(corpus, tmp_path):
    run = train(make_config(corpus), tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match=r"holds checkpoints of another model"):
        train(make_config(corpus, "after-general"), run.folder, quiet=True)
    (corpus / "train.source").write_text("a\n")
    (corpus / "train.target").write_text("a\n")
    with pytest.raises(RunError, match=r"the training data or the tokenizer settings have changed since this run"):
        train(run.config, run.folder, quiet=True)
    assert Run.open(run.folder) == run


def test_faults_are_told_before_the_first_update(corpus, tmp_path):
    (corpus / "valid.source").unlink()
    with pytest.raises(DataError, match=r"valid.source: cannot read it: No such file or directory"):
        train(make_config(corpus), tmp_path / "run", quiet=True)
    assert not Run.open(tmp_path / "run").checkpoints()


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RunError, match=r'train.device = "cuda", but torch sees no GPU here. Use "auto" or "cpu"'):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


def test_signals_ask_for_a_stop_and_a_second_one_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with signals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_default_folder_is_named_after_the_data(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(make_config(corpus, steps=1), quiet=True).folder == loop.Path("runs/data")
