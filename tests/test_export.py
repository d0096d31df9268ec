"""Exports: whole, checked and loadable, or nothing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regard
from conftest import make_config, write_reversal
from regard.cli import app
from regard.engines import ct2_model
from regard.engines.converted import Unlike
from regard.errors import CheckpointError, ConfigError, DataError, MissingExtra, RunError
from regard.export import export
from regard.text.tokenizer import Tokenizer, Tokenizers
from regard.training import checkpoint as checkpoints
from regard.training.loop import train
from regard.training.run import Run

ctranslate2 = pytest.importorskip("ctranslate2", reason="the extra 'ctranslate2' is not installed")

LINES = ["a b c", "d", "", "b b a d c"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_reversal(folder)
    return {name: train(make_config(folder, name, steps=40, validate_every=20, average=2), folder / name,
                        quiet=True).folder for name in ("transformer-pre", "after-everything")}


@pytest.fixture
def run(runs):
    return runs["transformer-pre"]


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(translations):
    return [(one.text, one.tokens, one.problem, pytest.approx(one.score, abs=1e-4)) for one in translations]


def exact(translations):
    return [(one.text, one.tokens, one.problem, one.score) for one in translations]


@pytest.mark.parametrize("precision", [None, "float32", "int8"])
def test_to_ctranslate2(run, tmp_path, precision):
    out = tmp_path / "new" / "model"
    agreement = export(run, out, "ctranslate2", precision)
    about = json.loads((out / "export.json").read_text())
    assert about["to"] == "ctranslate2" and about["precision"] == (precision or "float32") == agreement.precision
    assert about["check"]["sentences"] == agreement.sentences == 6 and about["checkpoint"].startswith("step-000000")
    assert about["files"].keys() == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {
        "export.json"}
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    translator = regard.load(out)
    found = translator.translate(LINES, beam=2)
    assert translator.taken == f"ctranslate2, {precision or 'float32'}" and found[2].text == ""
    if precision != "int8":
        assert exact(found) == told(regard.load(run).translate(LINES, beam=2)) and agreement.worst < 1e-4
        assert translator.score(["a b"], ["b a"]) == pytest.approx(regard.load(run).score(["a b"], ["b a"]), abs=1e-4)
    shutil.move(out, tmp_path / "moved")
    assert exact(regard.load(tmp_path / "moved", engine="auto", device="auto").translate(LINES, beam=2)) == exact(found)


def test_what_is_exported_serves_ctranslate2_alone(run, tmp_path):
    export(run, tmp_path / "out", "ctranslate2")
    alone = ctranslate2.Translator(str(tmp_path / "out"), compute_type="float32", intra_threads=1)
    found, = alone.translate_batch([["a", "b", "c"]], beam_size=1)
    assert found.hypotheses == [regard.load(run).translate("a b c", beam=1).tokens]


def test_to_bfloat16_for_a_processor_that_has_it(run, tmp_path, monkeypatch):
    agreement = export(run, tmp_path / "out", "ctranslate2", "bfloat16")
    assert agreement.worst > 1e-4 and agreement.mean <= 0.02
    monkeypatch.setattr(ctranslate2, "get_supported_compute_types", lambda device: {"float32", "int8"})
    with pytest.raises(ConfigError, match=r'no precision = "bfloat16" for this processor: it has float32 and int8'):
        regard.load(tmp_path / "out")


def test_what_an_exported_model_cannot_be_asked(run, tmp_path):
    export(run, tmp_path / "out", "ctranslate2", "int8")
    with pytest.raises(ConfigError) as error:
        regard.load(tmp_path / "out", engine="torch", precision="float32", device="cuda")
    assert [line.split(" ", 1)[1][:30] for line in str(error.value).splitlines()] == [
        "runs on the processor here, an", "holds no checkpoint for torch:", 'holds precision = "int8", and ']
    with pytest.raises(ConfigError, match=r'holds step-000000\d\d alone, and checkpoint = "last" was asked for'):
        regard.load(tmp_path / "out", "last")
    with pytest.raises(ConfigError, match="ctranslate2 has no ensembles, and there are 2 runs"):
        regard.load([run, tmp_path / "out"])
    translator = regard.load(tmp_path / "out")
    for ask in (lambda: translator.look("a b"), lambda: translator.model, lambda: translator.device):
        with pytest.raises(ConfigError, match="exported for another engine, which shows nothing of its inside"):
            ask()
    with pytest.raises(ConfigError, match="ctranslate2 cannot do what was asked: sample"):
        translator.translate("a", sample=True)
    with pytest.raises(RunError, match="exported for CTranslate2 and holds no checkpoint"):
        export(tmp_path / "out", tmp_path / "again", "folder")


def test_commands_on_an_exported_folder(run, tmp_path):
    out, test = tmp_path / "out", ("--source", tmp_path / "lines", "--target", tmp_path / "right")
    export(run, out, "ctranslate2", "int8")
    (tmp_path / "lines").write_text("a b c\nd\nb b a d c\n")
    (tmp_path / "right").write_text("c b a\nd\nc d a b b\n")
    about = json.loads((out / "export.json").read_text())
    said = command("info", out)
    assert said.exit_code == 0 and "train" not in said.stdout.split("Go on with:")[1] and "look" not in said.stdout
    for part in (f"to ctranslate2, int8, from {about['checkpoint']}, by regard {regard.__version__}", "6 sentences: ",
                 "transformer: width = 8", f"regard evaluate {out}"):
        assert part in said.stdout
    facts = json.loads(command("info", out, "--json").stdout)
    assert facts["export"] == about and facts["training"] is facts["best"] is None and facts["checkpoints"] == []

    judged = command("evaluate", out, *test)
    assert judged.exit_code == 0 and judged.stderr.rstrip().endswith("; engine ctranslate2, int8")
    figures = json.loads(command("evaluate", out, *test, "--json").stdout)
    assert (figures["engine"], figures["precision"], figures["checkpoint"]) == (
        "ctranslate2", "int8", about["checkpoint"])
    same = json.loads(command("evaluate", run, *test, "--json", "--precision", "int8").stdout)
    assert same["scores"] == figures["scores"] and same["checkpoint"] == figures["checkpoint"]
    refused = command("evaluate", out, *test, "--report")
    assert refused.exit_code == 2 and "was exported for another engine" in refused.stderr
    assert not (out / "report.html").exists()

    page = tmp_path / "page.html"
    compared = command("compare", run, out, *test, "--engine", "auto", "--resamples", "20", "--trials", "20", "--html",
                       page, "--json")
    systems = json.loads(compared.stdout)["systems"]
    assert [(each["engine"], each["precision"]) for each in systems] == [
        ("ctranslate2", "float32"), ("ctranslate2", "int8")]
    assert f"{out}: engine ctranslate2, int8" in compared.stderr
    assert "to ctranslate2, int8, from" in page.read_text() and "ctranslate2, float32" in page.read_text()


def test_info_on_an_exported_run(run, tmp_path):
    export(run, tmp_path / "out", "folder", checkpoint="step-00000020")
    said = command("info", tmp_path / "out").stdout
    assert "to folder, float32, from step-00000020" in said and "20 of 40 updates" in said
    assert "regard train" not in said and "regard look" in said


def test_a_damaged_export_is_refused(run, tmp_path, monkeypatch):
    export(run, tmp_path / "out", "ctranslate2")
    weights = tmp_path / "out" / "model.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"model.bin: is missing or damaged"):
        regard.load(tmp_path / "out")
    weights.write_bytes(content)
    assert regard.load(tmp_path / "out").translate("a").problem is None
    (tmp_path / "out" / "export.json").write_text('{"format": 2, "to": "ctranslate2"}')
    with pytest.raises(RunError, match=r"export.json: is of format 2, and this is regard .*, which reads format 1"):
        regard.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["transformer-pre", "after-everything"])
@pytest.mark.parametrize("checkpoint", ["best", "average", "step-00000020"])
def test_to_a_folder(runs, tmp_path, name, checkpoint):
    out = tmp_path / "out"
    assert export(runs[name], out, "folder", checkpoint=checkpoint) is None
    kept, = (out / "checkpoints").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["manifest.json", "model.safetensors", "state.json"]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.toml", "export.json", "tokenizer"]
    assert len({path.stat().st_mode for path in out.rglob("*") if path.is_file()}) == 1
    assert exact(regard.load(out).translate(LINES)) == exact(regard.load(runs[name], checkpoint).translate(LINES))
    export(out, tmp_path / "again", "folder")
    assert exact(regard.load(tmp_path / "again").translate(LINES)) == exact(regard.load(out).translate(LINES))


def test_the_mean_of_several_runs(runs, run, tmp_path):
    first, second = (Run.open(run).folder / "checkpoints" / f"step-000000{step}" for step in (20, 40))
    for name, kept in (("a", first), ("b", second)):
        export(run, tmp_path / name, "folder", checkpoint=kept.name)
    assert export([tmp_path / "a", tmp_path / "b"], tmp_path / "out", "folder") is None
    found = dict(regard.load(tmp_path / "out").model.named_parameters())
    ends = [checkpoints.load(path).model for path in (first, second)]
    assert ends[0].keys() == found.keys()
    for name, weights in found.items():
        torch.testing.assert_close(weights, (ends[0][name] + ends[1][name]) / 2)
    done = command("export", tmp_path / "a", tmp_path / "b", "--to", "folder", "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    again, out = (exact(regard.load(tmp_path / name).translate(LINES)) for name in ("again", "out"))
    assert again == out
    for others, reason in ((["b"], r"several runs become one in a folder.*--to folder"),
                           ([runs["after-everything"]], r'a: it was trained with .*"rnn" \(here "transformer"\)')):
        to = "ctranslate2" if others == ["b"] else "folder"
        with pytest.raises(ConfigError, match=reason):
            export([tmp_path / "a", *(tmp_path / other for other in others)], tmp_path / "no", to)
    changed = Tokenizer.train("char", 20, ["a b c d e f"])
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    Tokenizers(changed, changed).save(tmp_path / "c" / "tokenizer")
    with pytest.raises(ConfigError, match=r"(?s)the source vocabularies differ.*the target vocabularies differ"):
        export([tmp_path / "a", tmp_path / "c"], tmp_path / "no", "folder")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_exported_is_refused_with_all_reasons(runs, run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError) as error:
        export(runs["after-everything"], out, "ctranslate2", "int4")
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        'precision = "int4"', '[model] kind = "rnn"', "[model] reverse_source = true"]
    with pytest.raises(ConfigError, match=r'to = "onnx": expected ctranslate2 or folder'):
        export(run, out, "onnx")
    with pytest.raises(ConfigError, match=r"precision means nothing for a folder.*\nsample means nothing for a folder"):
        export(run, out, "folder", "int8", sample=["a"])
    with pytest.raises(RunError, match=r'has no checkpoint "step-1"'):
        export(run, out, "folder", checkpoint="step-1")
    with pytest.raises(DataError, match="the sample holds no line that can be translated"):
        export(run, out, "ctranslate2", sample=["", " "])
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(run, tmp_path):
    (mine := tmp_path / "mine").mkdir()
    (mine / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in (mine, tmp_path / "file", run):
        for force in (False, True):
            with pytest.raises(RunError, match="is there already, and no export made it; nothing was written"):
                export(run, taken, "folder", force=force)
    out = tmp_path / "out"
    out.mkdir()  # empty: as good as none
    export(run, out, "folder")
    with pytest.raises(RunError, match=r"is there already; nothing was written. Add --force to replace it"):
        export(run, out, "ctranslate2")
    export(run, out, "ctranslate2", force=True)
    assert regard.load(out).engines[0].name == "ctranslate2" and not (out / "checkpoints").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out"]
    assert (mine / "file").read_text() == "mine"


def test_a_wrong_export_is_not_kept(run, tmp_path, monkeypatch):
    export(run, tmp_path / "out", "ctranslate2", "int8")
    original = ct2_model._norm

    def broken(spec, norm):
        original(spec, norm)
        spec.gamma = spec.gamma * 1.01

    monkeypatch.setattr(ct2_model, "_norm", broken)
    for arguments, kept in (((tmp_path / "new", "ctranslate2"), None), ((tmp_path / "out", "ctranslate2"), "int8")):
        with pytest.raises(Unlike, match=r"worst difference of a token's log-probability .* over the 0.0001"):
            export(run, *arguments, force=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        assert kept is None or json.loads((tmp_path / "out" / "export.json").read_text())["precision"] == kept
    result = command("export", run, "--to", "ctranslate2", "--out", tmp_path / "new")
    assert result.exit_code == 1 and result.stdout == "" and not (tmp_path / "new").exists()
    assert result.stderr.startswith("Unlike: the model in CTranslate2 (float32) does not translate as ours: worst")


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    export(run, tmp_path / "out", "folder")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("regard.engines.check.compare", interrupt)
    for name in ("new", "out"):
        with pytest.raises(KeyboardInterrupt):
            export(run, tmp_path / name, "ctranslate2", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and regard.load(tmp_path / "out").model


def test_a_place_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written: Not a directory"):
        export(run, tmp_path / "file" / "out", "ctranslate2")


def test_without_the_package(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(MissingExtra, match=r"pip install 'regard\[ctranslate2\]'"):
        export(run, tmp_path / "out", "ctranslate2")
    assert not list(tmp_path.iterdir())
    export(run, tmp_path / "out", "folder")


def test_the_command(run, tmp_path):
    (tmp_path / "sample").write_text("a b\nc\n\nd a\n")
    result = command("export", run, "--to", "ctranslate2", "--out", tmp_path / "a", "--sample", tmp_path / "sample")
    assert result.exit_code == 0 and result.stderr == f"{tmp_path / 'a'}: written\n"
    assert result.stdout.startswith("3 sentences: 3 outputs the same; a token's log-probability differs by ")
    result = command("export", run, "--to", "folder", "--out", tmp_path / "b", "--checkpoint", "last", "--json")
    assert json.loads(result.stdout) == {"out": str(tmp_path / "b"), "to": "folder", "check": None}
    result = command("export", run, "--to", "ctranslate2", "--out", tmp_path / "b", "--force", "--json")
    assert json.loads(result.stdout)["check"]["sentences"] == 6
    for folder in ("a", "b"):
        result = CliRunner().invoke(app, ["translate", str(tmp_path / folder)], input="a b c\n\n")
        assert result.exit_code == 0 and result.stdout == regard.load(run).translate("a b c").text + "\n\n"
        assert result.stderr.endswith("; engine ctranslate2, float32\n")
    (tmp_path / "targets").write_text("b a\nc\n\na d\n")
    result = command("score", tmp_path / "a", "--source", tmp_path / "sample", "--target", tmp_path / "targets")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 4
    for arguments, message in ((("--to", "onnx"), 'ConfigError: to = "onnx": expected'),
                               (("--to", "folder", "--precision", "int8"), "ConfigError: precision means nothing"),
                               (("--to", "ctranslate2", "--sample", tmp_path / "no"), "DataError: ")):
        result = command("export", run, "--out", tmp_path / "c", *arguments)
        assert result.exit_code == 2 and result.stderr.startswith(message) and result.stdout == ""
    assert not (tmp_path / "c").exists() and Path(tmp_path / "a").is_dir()
