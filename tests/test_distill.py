"""Distillation: what a teacher writes, what is kept, and that a kill does no harm."""

import json
import os
import signal
import sys

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from typer.testing import CliRunner

from children import ended, fork
from conftest import make_config
from regard import distill as module
from regard.cli import app
from regard.config import CorpusConfig, read_config, write_config
from regard.distill import digest_of, distill
from regard.errors import ConfigError, DataError, RunError
from regard.text.corpus import read_lines
from regard.training import checkpoint as checkpoints
from regard.training.loop import train
from regard.translator import load


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of one update whose weights are larger than that, so that every source gets outputs of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    draw = [" ".join("abcd"[(line * step) % 4] for step in range(1, 2 + line % 5)) for line in range(60)]
    for name, lines in (("train", draw), ("valid", draw[:4])):
        (folder / f"{name}.source").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{name}.target").write_text("".join(f"{line[::-1]}\n" for line in lines))
    made = train(make_config(folder, steps=2, validate_every=1, decode={"beam": 3}), folder / "run", quiet=True)
    generator = torch.Generator().manual_seed(1)
    for path in made.checkpoints():
        saved = checkpoints.load(path)
        wide = {name: each + 0.5 * torch.randn(each.shape, generator=generator) for name, each in saved.model.items()}
        checkpoints.save(path, checkpoints.Checkpoint(wide, saved.optimizer, saved.state))
    return made


@pytest.fixture
def student(corpus):
    """A config with its files."""
    return make_config(corpus, "fixed-elman", steps=2)


def run(teacher, config, out, **asked):
    return distill(load(teacher.folder), [digest_of(teacher.folder, "best")], config, out, **asked)


def with_train(config, *corpora, **others):
    data = config.data.model_copy(update={"train": [CorpusConfig(**each) for each in corpora], **others})
    return config.model_copy(update={"data": data})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock",)}


def test_the_targets_are_the_teacher_s_and_the_config_trains_on_them(teacher, student, corpus, tmp_path):
    out, seen = tmp_path / "out", []
    made = run(teacher, student, out, progress=lambda done, total: seen.append((done, total)))
    sources = read_lines(corpus / "train.source")
    expected = [each.text for each in load(teacher.folder).translate(sources)]
    assert read_lines(out / "1-train.target") == expected != read_lines(corpus / "train.target")
    assert made.config == out / "config.toml" and made.engine.startswith("torch")
    assert [(part.lines, part.done, part.kept) for part in made.parts] == [(60, 60, 0)] and seen == [(0, 60), (60, 60)]
    config = read_config(made.config)
    assert config.model == student.model and config.train == student.train and config.decode == student.decode
    assert config.data.train == [CorpusConfig(source=corpus / "train.source", target=out / "1-train.target")]
    trained = train(config, tmp_path / "run", quiet=True)
    assert [row["step"] for row in trained.metrics() if row["kind"] == "valid"] == [2]
    assert read_config(trained.config_file).data.valid.target == corpus / "valid.target"


def test_lines_without_a_translation_keep_their_reference(teacher, student, corpus, tmp_path):
    """Lines too long for the teacher; an empty source stays out as before, and a missing reference is filled."""
    lines = ["a b", " ".join("a" * 30), "", "c d", "   ", "b"]
    references = ["x", "long", "alone", "", "space", "\ufeffz"]
    (corpus / "a.source").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    (corpus / "a.target").write_text("\n".join(references) + "\n")
    (corpus / "b.tsv").write_text("".join(f"{one}\t{two}\n" if one or two != "alone" else "\n" for one, two in zip(
        lines, references, strict=True)))
    config = with_train(student, {"source": "a.source", "target": "a.target", "weight": 2.0}, {"pairs": "b.tsv"},
                        prepared="prepared")
    made = run(teacher, config, tmp_path / "out")
    said = [each.text for each in load(teacher.folder).translate(["a b", "c d", "b"])]
    expected = [said[0], "long", "alone", said[1], "space", said[2]]
    assert read_lines(tmp_path / "out" / "1-a.target") == expected and all(said)
    pairs = [f"{one}\t{two}" if two != "alone" else "" for one, two in zip(lines, expected, strict=True)]
    assert read_lines(tmp_path / "out" / "2-b.tsv") == pairs
    assert [part.kept for part in made.parts] == [1, 1]
    assert made.parts[0].places[0].startswith("a.source:2: 30 tokens, over the 20 that [decode] max_source_tokens")
    read = read_config(made.config).data
    assert [corpus.weight for corpus in read.train] == [2.0, 1.0] and read.prepared is None
    assert read.train[1] == CorpusConfig(pairs=tmp_path / "out" / "2-b.tsv")


@pytest.mark.parametrize("name, metric", [("bleu", BLEU(tokenize="none", effective_order=True)), ("chrf", CHRF())])
def test_the_closest_of_the_beam_is_taken(teacher, student, corpus, tmp_path, name, metric):
    run(teacher, student, tmp_path / "out", beam=4, closest=name)
    sources, references = (read_lines(corpus / f"train.{side}") for side in ("source", "target"))
    found, best = [], []
    for each, reference in zip(load(teacher.folder).translate(sources, beam=4, nbest=4), references, strict=True):
        texts = [each.text, *(other.text for other in each.alternatives)]
        scores = [metric.sentence_score(text, [reference]).score for text in texts]
        found.append(texts[scores.index(max(scores))])
        best.append(texts[0])
    assert read_lines(tmp_path / "out" / "1-train.target") == found != best


@pytest.mark.parametrize("sample", [False, True])
def test_a_kill_at_any_time_does_no_harm(teacher, student, tmp_path, monkeypatch, sample):
    """Killed within a chunk, after it is written and before it is counted in, and in between; drawn outputs too."""
    monkeypatch.setattr(module, "CHUNK", 7)

    def work(out, die=None):
        translator = load(teacher.folder)
        if sample:
            decode = translator.config.decode.model_copy(update={"sample": True, "seed": 3})
            translator.config = translator.config.model_copy(update={"decode": decode})
        with pytest.MonkeyPatch.context() as patch:
            if die is not None:
                name, at = die
                real, calls = getattr(module, name), []

                def killing(*given):
                    calls.append(1)
                    if len(calls) == at:
                        if name == "_append":
                            given[0].open("ab").write(b"half a li")
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*given)

                patch.setattr(module, name, killing)
            distill(translator, ["one"], student, out)

    work(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    for die in (("_write_about", 1), ("_append", 1), ("_append", 4), ("_write_about", 3), ("_texts", 9),
                ("_write_about", 2), ("write_whole", 7)):
        assert ended(fork(lambda die=die: work(tmp_path / "parts", die))) == -signal.SIGKILL, die
        assert not (tmp_path / "parts" / "config.toml").exists()
    work(tmp_path / "parts")
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert whole["config.toml"].replace(b"whole", b"parts") == parts["config.toml"]
    assert whole["1-train.target"] == parts["1-train.target"] and whole.keys() == parts.keys()
    assert json.loads(whole["distill.json"]) == json.loads(parts["distill.json"])
    assert len(set(whole["1-train.target"].splitlines())) > 5


def test_no_more_than_a_chunk_is_read_ahead(teacher, student, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    translator, sizes = load(teacher.folder), []
    real = translator.translate
    monkeypatch.setattr(translator, "translate", lambda lines, **_: sizes.append(len(lines)) or real(lines))
    distill(translator, ["one"], student, tmp_path / "out")
    assert sizes == [0, *[7] * 8, 4]


def test_done_is_done_and_a_config_that_was_edited_stays(teacher, student, tmp_path):
    run(teacher, student, tmp_path / "out")
    (tmp_path / "out" / "config.toml").write_text("mine")
    before, said = files(tmp_path / "out"), []
    made = run(teacher, student, tmp_path / "out", say=said.append)
    assert files(tmp_path / "out") == before and made.engine == ""
    assert said == [f"{tmp_path / 'out' / 'config.toml'}: is there already, and stays as it is"]


def test_what_is_refused(teacher, student, corpus, tmp_path):
    def refusal(kind, config=student, out="new", **asked):
        with pytest.raises(kind) as error:
            run(teacher, config, tmp_path / out, **asked)
        assert not (tmp_path / "new").exists()
        return str(error.value)

    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert "is a file; the translations need a folder" in refusal(RunError, out="file")
    assert "holds other files, and no distillation made it" in refusal(RunError, out="full")
    assert refusal(ConfigError, closest="ter") == 'closest = "ter": expected bleu or chrf'
    assert "beam = 1 has one: give a wider beam" in refusal(ConfigError, closest="bleu", beam=1)
    assert "beam = 0: expected 1 or more" in refusal(ConfigError, beam=0)
    sides = {"source": "train.source", "target": "train.target"}
    assert "alignment links the words of the references" in refusal(
        ConfigError, with_train(student, sides | {"alignment": "links"}))
    (corpus / "short").write_text("a\n")
    assert "short has 1 lines and" in refusal(DataError, with_train(student, sides | {"target": "short"}))
    (corpus / "latin").write_bytes(b"\xe9\n" * 60)
    assert "latin:1: byte 1 of the line, 0xe9, is not UTF-8" in refusal(
        DataError, with_train(student, sides | {"source": "latin"}))
    (corpus / "one.tsv").write_text("a b\n")
    assert "one.tsv:1: no tabs" in refusal(DataError, with_train(student, {"pairs": "one.tsv"}))
    assert "cannot read it: No such file" in refusal(DataError, with_train(student, sides | {"source": "none"}))


def test_another_work_does_not_go_on_in_the_same_folder(teacher, student, corpus, tmp_path, monkeypatch):
    def refusal(teachers=("one",), **asked):
        with pytest.raises(RunError) as error:
            distill(load(teacher.folder), teachers, student, tmp_path / "out", **asked)
        return str(error.value)

    distill(load(teacher.folder), ["one"], student, tmp_path / "out")
    before = files(tmp_path / "out")
    assert "was begun otherwise, and now there is beam = 2 (was 3), closest = 'bleu' (was None). Put" in refusal(
        beam=2, closest="bleu")
    assert "now there is another teacher, or another checkpoint of it." in refusal(["two"])
    (corpus / "train.target").write_text("e\n" * 60)
    assert "now there is other training text." in refusal()
    assert files(tmp_path / "out") == before


def test_a_file_that_was_cut_short_is_not_gone_on_with(teacher, student, tmp_path):
    run(teacher, student, tmp_path / "out")
    file = tmp_path / "out" / "1-train.target"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"1-train.target: is missing or cut short: it had [\d,]+ bytes\. Put it back"):
        run(teacher, student, tmp_path / "out")


def test_two_at_a_time_are_kept_apart(teacher, student, tmp_path):
    def second(done, total):
        with pytest.raises(RunError, match="is in use"):
            run(teacher, student, tmp_path / "out")

    run(teacher, student, tmp_path / "out", progress=second)


def test_the_command_tells_how_far_it_is_and_what_comes_next(teacher, student, tmp_path, monkeypatch):
    write_config(student, tmp_path / "small.toml")
    monkeypatch.setattr(module, "CHUNK", 20)
    monkeypatch.setattr(sys.modules["regard.cli.distill"], "QUIET_SECONDS", 0.0)
    command = ["distill", teacher.folder, teacher.folder, tmp_path / "small.toml", "--out", tmp_path / "out", "--beam",
               2, "--closest", "chrf", "--set", "train.steps=7", "--json"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.stderr
    assert " of 60 lines, " in result.stderr and " a second; 0:00:0" in result.stderr and " left\n" in result.stderr
    assert f"Now: regard train {tmp_path / 'out' / 'config.toml'} --out RUN\n" in result.stderr
    told = json.loads(result.stdout)
    assert told["config"] == str(tmp_path / "out" / "config.toml") and told["corpora"][0]["lines"] == 60
    assert read_config(told["config"]).train.steps == 7
    again = CliRunner().invoke(app, list(map(str, command)))
    assert again.exit_code == 0 and json.loads(again.stdout)["engine"] == ""
    wrong = CliRunner().invoke(app, ["distill", str(tmp_path), str(tmp_path / "small.toml"), "--out",
                                     str(tmp_path / "none")])
    assert wrong.exit_code == 2 and "has no config.toml" in wrong.stderr and not (tmp_path / "none").exists()


def test_an_interruption_says_how_to_go_on(teacher, student, tmp_path, monkeypatch):
    write_config(student, tmp_path / "small.toml")

    def stop(*given, **asked):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "distill", stop)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["distill", str(teacher.folder), str(tmp_path / "small.toml"), "--out", str(out)])
    assert result.exit_code == 130 and f"{out}: the same command goes on after the last whole chunk." in result.stderr


def test_teachers_are_known_by_their_weights(teacher, tmp_path):
    from regard.export import export

    first, last = (digest_of(teacher.folder, path.name) for path in teacher.checkpoints()[-2:])
    assert first != last and digest_of(teacher.folder, "best") in (first, last)
    export(teacher.folder, tmp_path / "copy", "folder", checkpoint="last")
    assert digest_of(tmp_path / "copy", "best") == last
    pytest.importorskip("ctranslate2")
    export(teacher.folder, tmp_path / "ct2", "ctranslate2")
    assert len(digest_of(tmp_path / "ct2", "best")) == 64
