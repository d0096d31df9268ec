"""`regard verify`: it finds that a run goes on exactly, and where it does not; and it leaves the run alone."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from conftest import make_config, write_reversal
from regard.cli import app
from regard.config import TokenizerConfig, write_config
from regard.errors import RunError
from regard.training import loop
from regard.training import verify as module
from regard.training.loop import train
from regard.training.run import Run
from regard.training.verify import verify_checkpoints, verify_resume


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("verify")
    write_reversal(folder)
    return train(make_config(folder, accumulate=2, average=2, minutes=9, patience=9), folder / "run", quiet=True)


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(monkeypatch):
    """What would be done in processes of their own is done in this one, which is faster."""
    def trained(folder, last, advance):
        monkeypatch.setattr(sys, "argv", ["", str(folder), str(last)])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            module.main()
        for _ in said.getvalue().splitlines():
            advance()

    monkeypatch.setattr(module, "_train_in_a_process", trained)


def regard(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="regard")


@pytest.mark.slow
def test_from_the_command_line_in_processes_of_their_own(run):
    before = files(run.folder)
    result = regard("verify", run.folder, "--steps", 5, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["checkpoints"] == dict.fromkeys(("step-00000008", "step-00000012", "average"))
    assert (found["steps"], found["stopped_at"], found["equal"], found["difference"]) == (5, 2, True, None)
    assert found["losses"] == [float(row["loss"]).hex() for row in run.metrics() if row["kind"] == "train"][:5]
    assert found["sha256"].keys() == {"weights", "optimizer", "random state"}
    assert files(run.folder) == before


def test_a_run_that_goes_on_exactly(run, here):
    before, advances = files(run.folder), []
    found = verify_resume(run, 5, lambda: advances.append(1))
    assert found.difference is None and len(advances) == 10
    assert found.outcome.losses.keys() == {1, 2, 3, 4, 5} and found.outcome.standing["step"] == 5
    result = regard("verify", run.folder, "--steps", 2)
    assert result.exit_code == 0
    assert "step-00000012: whole\naverage: whole\n2 updates, and 1, a stop and 1" in result.stdout
    assert "more: the same, bit by bit, in 2 losses and in\n  weights       SHA-256 " in result.stdout
    assert files(run.folder) == before


def test_what_it_took_it_takes_from_itself_and_all_else_stays(run):
    asked = TokenizerConfig(take_from="/gone", dropout=0.1, samples=3)
    config = module._config_for(replace(run, config=run.config.model_copy(update={"tokenizer": asked})), 4)
    assert config.tokenizer == TokenizerConfig(take_from=run.folder.resolve(), dropout=0.1, samples=3)


def test_where_it_does_not_go_on_exactly_is_told(run, here, monkeypatch):
    monkeypatch.setattr(loop, "put_optimizer", lambda *given: None)
    result = regard("verify", run.folder, "--steps", 4)
    assert result.exit_code == 1
    assert re.search(r"^4 updates, and 2, a stop and 2 more: they differ\. update [34]: loss 0x\S+ in one go, 0x\S+ "
                     r"after a stop$", result.stdout, re.MULTILINE)


def test_differences_are_told_in_their_order(run):
    one = module.Outcome.of(run, 12)
    assert one.difference(module.Outcome.of(run, 12)) is None

    def other(**changes):
        return one.difference(replace(one, **changes))

    loss, norm = one.losses[7]
    assert other(losses=one.losses | {7: ("0x0", norm)}) == f"update 7: loss {loss} in one go, 0x0 after a stop"
    assert other(losses=one.losses | {7: (loss, "0x0")}) == (
        f"update 7: norm of the gradient {norm} in one go, 0x0 after a stop")
    assert other(losses={step: one.losses[step] for step in range(1, 9)}).startswith("update 9: loss 0x")
    assert other(standing=one.standing | {"position": 99}).startswith("position ")
    for part in one.tensors:
        name = sorted(one.tensors[part])[0]
        assert other(tensors=one.tensors | {part: one.tensors[part] | {name: "0"}}) == f"{part}: {name} is another"


def test_every_checkpoint_is_held_against_its_manifest(run, here, monkeypatch):
    first, last = run.checkpoints()
    os.truncate(first / "model.safetensors", 99)
    result = regard("verify", run.folder, "--steps", 2, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["equal"] and found["checkpoints"][first.name].startswith(f"{first}/model.safetensors: is damaged: it")
    assert [name for name, fault in found["checkpoints"].items() if fault is None] == [last.name, "average"]
    monkeypatch.setattr(Run, "checkpoints", lambda self: [first, last, run.step_path(10)])
    assert verify_checkpoints(run).keys() == {first.name, last.name, "average"}, "deleted since"


def test_the_data_that_is_prepared_elsewhere_is_not_touched(run, here, tmp_path):
    (run.folder / "data").rename(tmp_path / "shards")
    text = run.config_file.read_text().replace("[data]\n", f'[data]\nprepared = "{tmp_path / "shards"}"\n')
    run.config_file.write_text(text)
    before = files(tmp_path / "shards")
    assert verify_resume(Run.open(run.folder), 2).difference is None
    shutil.rmtree(tmp_path / "shards")
    assert verify_resume(Run.open(run.folder), 2).difference is None, "they are made anew, in the temporary folder"
    assert not (tmp_path / "shards").exists() and before


def test_mistakes_end_with_2(made, run, here, tmp_path):
    for arguments, message in ((("verify", tmp_path / "none"), "none: there is no such folder"),
                               (("verify", run.folder, "--steps", 1), "Invalid value for '--steps': ")):
        result = regard(*arguments)
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    before = files(run.folder)
    shutil.copytree(made.folder.parent, tmp_path / "moved")
    text = run.config_file.read_text().replace(str(made.config.data.root), str(tmp_path / "moved"))
    run.config_file.write_text(text)
    for side in ("source", "target"):
        with (tmp_path / "moved" / f"train.{side}").open("a") as file:
            file.write("a\n")
    with pytest.raises(RunError, match=r"the training data or the tokenizer settings have changed since this run"):
        verify_resume(Run.open(run.folder), 2)
    assert {name.name for name in before} == {name.name for name in files(run.folder)}


@pytest.mark.parametrize("code, kind, message", [
    ("print(1); print('train.source: is gone', file=sys.stderr); sys.exit(2)", RunError, "^train.source: is gone$"),
    (f"os.kill(os.getpid(), {int(signal.SIGKILL)})", RunError, "was killed by signal 9 .SIGKILL.. Is there memory for"),
    ("1 / 0", RuntimeError, "ended with 1:\n(.|\n)*ZeroDivisionError"),
])
def test_a_process_that_fails(code, kind, message, tmp_path, monkeypatch):
    real = module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda command, **options: real(
        [sys.executable, "-c", f"import os, sys; {code}"], **options))
    with pytest.raises(kind, match=message):
        module._train_in_a_process(tmp_path / "run", 2, lambda: None)


def test_a_training_in_a_process_says_its_mistakes(tmp_path, monkeypatch, capsys):
    write_reversal(tmp_path)
    write_config(make_config(tmp_path), tmp_path / "config.toml")
    (tmp_path / "valid.source").unlink()
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "2"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and "valid.source: cannot read it" in capsys.readouterr().err
