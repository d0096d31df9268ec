"""The command line as people use it: what it prints where, its exit codes, and every mistake with its message."""

import inspect
import io
import json
import os
import random
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from conftest import model_config
from regard import __version__
from regard.cli import app
from regard.cli.info import _told_model
from regard.cli.options import Panels
from regard.cli.start import _presets, demo
from regard.cli.translate import _lines, translate
from regard.config import parse_config
from regard.demo import run as demo_run
from regard.errors import Interrupted

COMMANDS = ["demo", "init", "prepare", "train", "translate", "score", "evaluate", "compare", "look", "info", "verify",
            "export", "distill"]

CONFIG = """
[data]
root = "data"
train = [{ source = "train.src", target = "train.tgt" }]
valid = { source = "valid.src", target = "valid.tgt" }
test = { source = "test.src", target = "test.tgt" }
bleu_tokenize = "none"
[tokenizer]
kind = "space"
shared = false
[model]
kind = "transformer"
width = 16
layers = 2
heads = 2
feedforward = 32
[train]
steps = 20
batch_tokens = 256
learning_rate = 1e-2
warmup = 10
validate_every = 10
log_every = 10
metric = "token_error_rate"
threads = 1
device = "cpu"
[decode]
beam = 2
max_source_tokens = 50
"""


def regard(*arguments, stdin=None):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="regard")


def process(*arguments, **options):
    """Run a command as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from regard.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, env=environment, timeout=60, check=False, **options)


def refused(result, *parts):
    """Check that a command ended with 2, one message and no traceback."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr and result.stdout == ""
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, its data, and a run of 20 updates."""
    folder = tmp_path_factory.mktemp("cli")
    draw = random.Random(1)
    (folder / "data").mkdir()
    for name, count in (("train", 100), ("valid", 10), ("test", 10)):
        lines = [" ".join(draw.choices("abcdefgh", k=draw.randint(1, 8))) + "\n" for _ in range(count)]
        (folder / "data" / f"{name}.src").write_text("".join(lines))
        (folder / "data" / f"{name}.tgt").write_text("".join(lines).upper())
    (folder / "tiny.toml").write_text(CONFIG)
    result = regard("train", folder / "tiny.toml", "--out", folder / "run", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return folder


@pytest.fixture(scope="module")
def run(place):
    """The run's folder."""
    return place / "run"


# --- starting


def test_help_is_instant_and_imports_nothing_heavy():
    code = ("import sys, time, regard.cli; sys.argv = ['regard', '--help']\n"
            "try: regard.cli.main()\n"
            "finally:\n"
            "    print({'torch', 'pydantic', 'numpy', 'matplotlib', 'sacrebleu'} & set(sys.modules))\n"
            "    print(time.process_time())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, heavy, seconds = done.stdout.splitlines()
    assert heavy == "set()"
    assert all(any(line.startswith(f"  {command} ") for line in shown) for command in COMMANDS)
    assert float(seconds) < 0.5  # of processor time, which other processes change little; 0.1 is usual


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "regard", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"regard {__version__}\n"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="other systems' torch comes with another OpenMP")
@pytest.mark.parametrize(("asked", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_threads_that_wait_leave_their_cores_to_others(run, monkeypatch, asked, policy):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in {**asked, "OMP_DISPLAY_ENV": "true"}.items():
        monkeypatch.setenv(name, value)
    done = process("translate", run, input=b"a b\n", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr.decode()


def test_version():
    result = regard("--version")
    assert result.exit_code == 0 and result.stdout == f"regard {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_teaches(command):
    result = regard(command, "--help")
    assert result.exit_code == 0
    assert f"regard {command}" in result.stdout.split("Example")[1].split("Options:")[0]
    assert "rites" in result.stdout or "written" in result.stdout


def test_unknown_command_and_option_name_a_near_one():
    refused(regard("trian"), "No such command 'trian'", "train")
    refused(regard("translate", "run", "--bean", "5"), "No such option", "--beam")


# --- init


def test_init_lists_and_prints_presets():
    listed = regard("init", "--list").stdout.splitlines()
    names = ["conv", "en-de-transformer", "pairs-tsv", "rnn-attention", "rnn-fixed"]
    assert [line.split()[0] for line in listed] == names
    assert regard("init", "rnn-fixed").stdout == _presets()["rnn-fixed"]


@pytest.mark.parametrize("name", _presets())
def test_presets_parse_and_every_setting_has_a_comment(name):
    text = _presets()[name]
    parse_config(tomllib.loads(text), where=name, base=Path())
    settings = [line for line in text.splitlines() if "=" in line and not line.startswith(("#", " "))]
    assert len(settings) > 20
    assert [line for line in settings if "#" not in line] == []


def test_unknown_preset_names_a_near_one():
    refused(regard("init", "rnn-atention"), 'ConfigError: regard init: there is no preset "rnn-atention"',
            'Did you mean "rnn-attention"?', "pairs-tsv")
    refused(regard("init"), "which preset?", "rnn-fixed")


@pytest.mark.parametrize("name", _presets())
def test_presets_train(name, place, tmp_path):
    pairs = [f"{s}\t{t}\n" for s, t in zip((place / "data/train.src").read_text().splitlines(),
                                           (place / "data/train.tgt").read_text().splitlines(), strict=True)]
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").write_text("".join(pairs))
    for old, new in (("train", "train"), ("valid", "val"), ("test", "test_2016")):
        (tmp_path / f"{new}.en").write_bytes((place / f"data/{old}.src").read_bytes())
        (tmp_path / f"{new}.de").write_bytes((place / f"data/{old}.tgt").read_bytes())
    (tmp_path / "my.toml").write_text(_presets()[name])
    small = ["model.width=16", "train.steps=2", "train.validate_every=1", "train.threads=1", "train.batch_tokens=100"]
    settings = [part for setting in small for part in ("--set", setting)]
    settings += ["--set", f"data.root={tmp_path}"]
    result = regard("train", tmp_path / "my.toml", *settings, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run/checkpoints/step-00000002/model.safetensors").is_file()
    translated = regard("translate", tmp_path / "run", stdin="a b\n")
    assert translated.exit_code == 0, translated.output


# --- demo


def test_demo_hands_its_options_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("regard.demo.run.run", lambda *arguments: calls.append(arguments))
    assert regard("demo", "--out", tmp_path, "--minutes", "0.5").exit_code == 0
    assert calls == [(tmp_path, 0.5, "pronounce")]


def test_demo_has_the_defaults_of_the_library():
    library = inspect.signature(demo_run.run).parameters
    here = inspect.signature(demo).parameters
    assert {name: here[name].default for name in ("minutes", "task")} == {
        name: library[name].default for name in ("minutes", "task")
    }


def test_faults_of_demo(tmp_path):
    refused(regard("demo", "--task", "spell", "--out", tmp_path / "d"), 'ConfigError: demo: there is no task "spell"')
    refused(regard("demo", "--minutes", "0", "--out", tmp_path / "d"), "ConfigError: demo: minutes = 0.0")
    assert list(tmp_path.iterdir()) == []


# --- prepare and train


def test_prepare_then_train_in_the_default_run(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = regard("prepare", place / "tiny.toml", "--set", "train.steps=3")
    assert first.exit_code == 0 and first.stdout == ""
    assert "train.src + train.tgt: 100 pairs" in first.stderr
    assert f"regard train {place / 'tiny.toml'} --set train.steps=3" in first.stderr
    made = (tmp_path / "runs/tiny/data/manifest.json").read_bytes()
    assert regard("prepare", place / "tiny.toml").exit_code == 0
    assert (tmp_path / "runs/tiny/data/manifest.json").read_bytes() == made
    trained = regard("train", place / "tiny.toml", "--set", "train.steps=3")
    assert trained.exit_code == 0 and "done: 3 updates" in trained.stderr
    assert "train.src + train.tgt" not in trained.stderr  # the data was up to date


def test_prepare_leaves_a_trained_run_s_config_alone(place, run):
    before = (run / "config.toml").read_bytes()
    assert regard("prepare", place / "tiny.toml", "--set", "model.width=32", "--out", run).exit_code == 0
    assert (run / "config.toml").read_bytes() == before


def test_a_run_s_own_config_goes_on_in_that_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = regard("train", run / "config.toml")
    assert result.exit_code == 0 and "going on from" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_fresh_needs_force(place, run):
    refused(regard("train", place / "tiny.toml", "--out", run, "--fresh"), "RunError:", "--force")


def test_force_alone_is_refused(place, run):
    refused(regard("train", place / "tiny.toml", "--out", run, "--force"), "ConfigError:", "--fresh is not given")


@pytest.mark.parametrize(("setting", "said"), [
    ("train.patience=1", "ended by train.patience = 1,"), ("train.minutes=1e-9", "ended by train.minutes = 1e-09,")])
def test_a_training_that_ends_early_says_by_what(place, tmp_path, setting, said):
    result = regard("train", place / "tiny.toml", "--out", tmp_path / "run", "--set", "train.steps=1000", "--set",
                    setting, "--set", "train.validate_every=1", "--set", "train.learning_rate=1e-9")
    assert result.exit_code == 0 and " updates of 1,000, " + said in result.stderr


def test_interrupted_training_saves_and_tells_how_to_go_on(place, tmp_path):
    command = [sys.executable, "-c", "from regard.cli import main; main()", "train", place / "tiny.toml", "--out",
               tmp_path / "run", "--set", "train.steps=1000000", "--set", "train.validate_every=1000000"]
    training = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert training.stderr is not None
    next(line for line in training.stderr if line.startswith("step "))
    training.terminate()
    rest = training.stderr.read()
    assert training.wait() == 143
    assert "Traceback" not in rest and "saved" in rest and "The same command" in rest
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


def test_each_signal_has_its_exit_code(place, monkeypatch):
    def train(*_, **__):
        raise Interrupted(signal.SIGINT, "Stopped at step 7.")

    monkeypatch.setattr("regard.training.loop.train", train)
    result = regard("train", place / "tiny.toml")
    assert result.exit_code == 130 and result.stderr == "Stopped at step 7.\n"


def test_faults_of_a_config(place, tmp_path):
    refused(regard("train", tmp_path / "no.toml"), "ConfigError: ", "no.toml: cannot read the config")
    refused(regard("train", tmp_path), "ConfigError: ", "Is a directory")
    setting = ("train", place / "tiny.toml", "--set")
    refused(regard(*setting, "model.widht=3"), 'unknown key "widht". Did you mean "width"?')
    refused(regard(*setting, "model.width=wide"), "ConfigError: ", "width = 'wide'")
    refused(regard(*setting, "steps=3"), "expected section.key=value")
    assert list(tmp_path.iterdir()) == []


def test_faults_of_the_data(place, tmp_path):
    (tmp_path / "train.src").write_text("a\nb\nc\n")
    (tmp_path / "train.tgt").write_text("A\nB\n")
    arguments = ("train", place / "tiny.toml", "--set", f"data.root={tmp_path}", "--out", tmp_path / "run")
    refused(regard(*arguments), "DataError: ", "train.tgt has 2 lines and", "has 3")
    (tmp_path / "train.tgt").unlink()
    refused(regard(*arguments), "DataError: ", "train.tgt: cannot read it: No such file")


def test_a_run_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    refused(regard("train", place / "tiny.toml", "--out", tmp_path / "file"), "RunError: ", "is a file")
    refused(regard("train", place / "tiny.toml", "--out", tmp_path / "file" / "run"), "RunError: ", "Not a directory")


# --- translate


def test_one_line_out_for_each_line_in(run):
    source = "a b c\n\n☃ unseen\nA\u2028B\u0085C\rD\x00E\nlast without end"
    result = regard("translate", run, stdin=source)
    assert result.exit_code == 0
    assert result.stdout_bytes.count(b"\n") == 5 and result.stdout_bytes.endswith(b"\n")
    assert "translated 5 lines in " in result.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_whole_whatever_comes_at_once(monkeypatch, tmp_path, size):
    text = "\ufeffä b\n\n☃ long line\r\nA\u2028\x85\rB\n\n\nlast"
    expected = ["ä b", "", "☃ long line", "A\u2028\x85\rB", "", "", "last"]
    monkeypatch.setitem(_lines.__globals__, "CHUNK", size)  # the module goes by the name of its command
    unreadable = {}
    (tmp_path / "text").write_text(text, newline="")
    for source in (io.BytesIO(text.encode()), (tmp_path / "text").open("rb")):
        found = list(_lines(source, unreadable))
        assert [line for line in found if line is not None] == expected and unreadable == {}
        assert (found == expected) is isinstance(source, io.BufferedReader)  # a file never keeps one waiting
        source.close()


def test_a_pipe_that_gives_a_line_now_and_then():
    read, write = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(write, "wb", buffering=0) as pipe:
        lines = _lines(source, {})
        pipe.write(b"a\nb\nhalf")
        assert [next(lines) for _ in range(3)] == ["a", "b", None]
        pipe.write(b" c\n")
        assert [next(lines) for _ in range(2)] == ["half c", None]
        pipe.write(b"d")
        pipe.close()
        assert list(lines) == ["d"]


def test_translation_does_not_depend_on_how_it_is_called(run, place, tmp_path):
    source = place / "data/test.src"
    piped = regard("translate", run, stdin=source.read_text()).stdout
    result = regard("translate", run, "--input", source, "--output", tmp_path / "out", "--batch-sentences", "3")
    assert result.exit_code == 0 and result.stdout == ""
    assert (tmp_path / "out").read_text() == piped
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_is_plain_lines_where_there_is_no_terminal(run, monkeypatch):
    monkeypatch.setattr("regard.cli.output.QUIET_SECONDS", 0)
    said = regard("translate", run, stdin="a\nb\n").stderr.splitlines()
    assert said[:2] == ["translating: 1 lines", "translating: 2 lines"]
    assert "translating: 10 of 10 lines" in regard("evaluate", run).stderr.splitlines()


def test_no_lines_in_no_lines_out(run):
    result = regard("translate", run, stdin="")
    assert result.exit_code == 0 and result.stdout == "" and "translated 0 lines" in result.stderr


def test_bad_lines_come_out_empty_and_are_reported(run):
    result = regard("translate", run, stdin=b"\xef\xbb\xbfa b\r\nb\xff c\n" + b"a " * 10_000 + b"\na b\n")
    assert result.exit_code == 0
    lines = result.stdout_bytes.split(b"\n")
    assert len(lines) == 5 and lines[1] == lines[2] == b""
    assert lines[0] == lines[3]  # neither the byte order mark nor the carriage return counts
    assert "line 2: not translated: not UTF-8: byte 2 of the line is 0xff" in result.stderr
    assert "line 3: not translated: " in result.stderr
    assert "translated 4 lines" in result.stderr and "; 2 could not be translated" in result.stderr


def test_nbest_lines_hold_number_score_and_text(run):
    best = regard("translate", run, stdin="a b\nc\n").stdout.splitlines()
    result = regard("translate", run, "--nbest", "2", stdin="a b\nc\n")
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "1", "2", "2"]
    assert [lines[0][2], lines[2][2]] == best
    assert float(lines[0][1]) >= float(lines[1][1])


def test_json_lines(run):
    result = regard("translate", run, "--json", "--nbest", "2", stdin=b"a b\n\xff\n")
    good, bad = map(json.loads, result.stdout.splitlines())
    assert good["problem"] is None and good["text"] == regard("translate", run, stdin="a b\n").stdout[:-1]
    assert len(good["alternatives"]) == 1 and good["alternatives"][0]["score"] <= good["score"] < 0
    assert good["log_probability"] < 0 and isinstance(good["tokens"], list)
    assert bad["text"] == "" and bad["problem"].startswith("not UTF-8")


def lines_of(run, *arguments, stdin="a b c\nd\n"):
    """The JSON lines of one `regard translate`."""
    result = regard("translate", run, "--json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_option_of_the_search_reaches_it(run, tmp_path):
    plain = lines_of(run, "--beam", "4")
    assert plain[0]["parts"].keys() == {"model", "length", "coverage"} and plain[0]["parts"]["coverage"] == 0
    assert "tree" not in plain[0] and "entropies" not in plain[0]
    assert all(line["text"].startswith("C A") for line in lines_of(run, "--prefix", "C A"))
    assert all("H G" in line["text"] for line in lines_of(run, "--force", "H G", "--force", "A"))
    assert not any("C" in line["tokens"] for line in lines_of(run, "--ban", "C", "--ban", "A B"))
    (tmp_path / "file").write_text("A\tB C\n\n")
    forced = lines_of(run, "--force-file", tmp_path / "file")
    assert "B C" in forced[0]["text"] and "A" in forced[0]["tokens"] and forced[1]["problem"] is None
    (tmp_path / "file").write_text("\nB C\n")
    prefixed = lines_of(run, "--prefix-file", tmp_path / "file")
    assert prefixed[1]["text"].startswith("B C") and prefixed[0] == lines_of(run, "--engine", "torch")[0]
    assert {len(line["tokens"]) for line in lines_of(run, "--min-length", "5", "--max-length", "5")} <= {4, 5}
    assert all(len(line["tokens"]) <= 2 for line in lines_of(run, "--max-ratio", "0", "--max-extra", "2"))
    assert len(lines_of(run, "--min-ratio", "2.5", "--max-ratio", "3")[0]["tokens"]) >= 9
    for line in lines_of(run, "--no-repeat-ngram", "1", "--min-length", "6"):
        assert len(set(line["tokens"])) == len(line["tokens"])
    gnmt = lines_of(run, "--length-penalty", "0.5", "--length-penalty-kind", "gnmt", "--coverage-penalty", "0.3")
    for line in gnmt:
        ended = len(line["tokens"]) + 1
        assert line["parts"]["length"] == pytest.approx(((5 + ended) / 6) ** 0.5) and line["parts"]["coverage"] < 0
    grouped = lines_of(run, "--beam", "4", "--groups", "2", "--diversity", "5", "--nbest", "3")
    assert len(grouped[0]["alternatives"]) == 2 and grouped[0]["alternatives"] != lines_of(
        run, "--beam", "4", "--nbest", "3")[0]["alternatives"]
    noted = lines_of(run, "--token-scores", "--tree")[0]
    assert sum(noted["log_probabilities"]) == pytest.approx(noted["log_probability"], abs=1e-5)
    assert len(noted["entropies"]) == len(noted["tokens"]) + 1 and noted["tree"][0]["parent"] == -1
    filled = lines_of(run, "--replace-unknown", *[part for each in "ABCDEFGH" for part in ("--ban", each)],
                      "--min-length", "3", "--max-length", "3", stdin="q w\n")[0]
    assert filled["tokens"][:2] == ["<unk>"] * 2 and set(filled["text"].split()) <= {"q", "w"} and filled["text"]


def test_sampling_from_the_command_line(run):
    drawn = lines_of(run, "--sample", "--seed", "3", "--nbest", "5")
    assert drawn == lines_of(run, "--sample", "--seed", "3", "--nbest", "5") and len(drawn[0]["alternatives"]) == 4
    assert drawn != lines_of(run, "--sample", "--seed", "4", "--nbest", "5")
    likeliest = [line["tokens"] for line in lines_of(run, "--beam", "1")]
    assert [line["tokens"] for line in lines_of(run, "--sample", "--temperature", "1e-4")] == likeliest
    assert [line["tokens"] for line in lines_of(run, "--sample", "--top-k", "1")] == likeliest
    assert [line["tokens"] for line in lines_of(run, "--sample", "--top-p", "1e-6")] == likeliest
    assert lines_of(run, "--no-sample") == lines_of(run)


def test_several_runs_answer_as_one(run, place, tmp_path):
    assert regard("train", place / "tiny.toml", "--out", tmp_path / "other", "--set", "train.seed=2", "--set",
                  "train.steps=5", "--quiet").exit_code == 0
    both = regard("translate", run, tmp_path / "other", "--json", stdin="a b c\n")
    one, mean = lines_of(run, stdin="a b c\n")[0], json.loads(both.stdout)
    assert both.exit_code == 0 and mean["problem"] is None and mean["score"] != one["score"]
    twice = json.loads(regard("translate", run, run, "--json", stdin="a b c\n").stdout)
    assert twice["text"] == one["text"] and twice["score"] == pytest.approx(one["score"], abs=1e-5)
    assert regard("train", place / "tiny.toml", "--out", tmp_path / "third", "--set", "tokenizer.size=8", "--set",
                  "train.steps=1", "--quiet").exit_code == 0
    refused(regard("translate", run, tmp_path / "third", stdin="a\n"), "ConfigError: ", "third cannot answer as one",
            "the source vocabularies differ", "the target vocabularies differ")


def test_searches_that_cannot_be_are_refused_with_all_reasons(run, tmp_path):
    refused(regard("translate", run, "--beam", "4", "--groups", "3", "--top-k", "0", "--nbest", "5", stdin="a\n"),
            "ConfigError: ", "groups = 3 do not divide beam = 4: use beam = 6", "top_k = 0: expected 1 or more",
            "nbest = 5 with beam = 4", "means nothing without sample")
    refused(regard("translate", run, "--sample", "--beam", "4", "--force", "A", stdin="a\n"),
            "beam means nothing with sample", "force means nothing with sample")
    twice = ["--prefix", "A", "--prefix-file", "x", "--force", "A", "--force-file", "x"]
    refused(regard("translate", run, *twice, "--tree", "--token-scores", stdin="a\n"),
            "--prefix and --prefix-file are two answers", "--force and --force-file are two answers",
            "--tree can only be printed with --json", "--token-scores can only be printed with --json")
    refused(regard("translate", run, "--prefix", "q", "--ban", " ", stdin="a\n"),
            'prefix "q" holds what the vocabulary does not', 'ban: " " holds no token')
    refused(regard("translate", run, "--prefix-file", tmp_path / "no", stdin="a\n"), "no: cannot read it")
    (tmp_path / "one").write_text("A\n")
    few = regard("translate", run, "--prefix-file", tmp_path / "one", "--output", tmp_path / "out", stdin="a\nb\n")
    refused(few, "DataError: prefix: 1 of them, and there are more texts; give one for each text")
    assert not (tmp_path / "out").exists()


def test_wishes_that_one_line_cannot_have(run, tmp_path):
    (tmp_path / "file").write_text("A\n" + "A " * 40 + "\nq\n")
    result = regard("translate", run, "--prefix-file", tmp_path / "file", stdin="a\nb\nc\n")
    assert result.exit_code == 0
    assert result.stdout.startswith("A") and result.stdout.endswith("\n\n\n") and result.stdout.count("\n") == 3
    assert "line 2: not translated: the prefix has 40 tokens, and this output may have 14" in result.stderr
    assert 'line 3: not translated: prefix "q" holds what the vocabulary does not' in result.stderr
    refused(regard("translate", run, "--prefix-file", tmp_path / "no", stdin="a\n"), "no: cannot read it: No")
    (tmp_path / "bad").write_bytes(b"A\nB\xff\n")
    refused(regard("translate", run, "--force-file", tmp_path / "bad", stdin="a\nb\n"),
            "DataError: ", "bad:2: not UTF-8: byte 2 of the line is 0xff")
    many = ["--force", " ".join("ABCDEFGH" * 2)]
    result = regard("translate", run, *many, stdin="a\na b c d e f g\n")
    assert "line 1: not translated: no output of at most 14 tokens was found that keeps all rules" in result.stderr
    assert "A B C D E F G H A B C D E F G H" in result.stdout


def test_help_of_translate_shows_options_in_panels():
    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=Panels)(translate)
    shown = CliRunner().invoke(app, ["--help"]).stdout
    panels = {line[:-1]: place for place, line in enumerate(shown.splitlines()) if line[:1].isalpha()
              and line.endswith(":")}
    assert list(panels) == ["Arguments", "What is printed", "Search", "Drawing instead of searching",
                            "Length of an output, in tokens, </s> included", "What an output holds", "Model and speed",
                            "Options"]
    lines = shown.splitlines()
    for panel, option in (("Search", "--beam"), ("Drawing instead of searching", "--top-p"), ("Model and speed",
                          "--device"), ("What an output holds", "--force"), ("What is printed", "--nbest")):
        following = [place for place in panels.values() if place > panels[panel]]
        assert any(line.startswith(f"  {option} ") for line in lines[panels[panel] : min(following)])


def test_options_reach_the_search(run):
    scores = {
        penalty: json.loads(regard("translate", run, "--json", "--length-penalty", penalty, stdin="a b\n").stdout)
        for penalty in ("0", "1")
    }
    assert scores["0"]["score"] == pytest.approx(scores["0"]["log_probability"])
    assert scores["1"]["score"] > scores["1"]["log_probability"]
    refused(regard("translate", run, "--beam", "0", stdin="a\n"), "beam")
    refused(regard("translate", run, "--beam", "2", "--nbest", "3", stdin="a\n"), "nbest", "beam")


def test_checkpoints_by_name(run):
    for name in ("last", "step-00000010", run / "checkpoints/step-00000020"):
        assert regard("translate", run, "--checkpoint", name, stdin="a\n").exit_code == 0
    refused(regard("translate", run, "--checkpoint", "step-9", stdin="a\n"), 'no checkpoint "step-9"', "step-00000010")


def test_devices_by_name(run):
    assert regard("translate", run, "--device", "cpu", stdin="a\n").exit_code == 0
    refused(regard("translate", run, "--device", "gpu", stdin="a\n"), "ConfigError: --device gpu: expected auto, cpu")


def test_a_gpu_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(regard("translate", run, "--device", "cuda", stdin="a\n"), "ConfigError: --device cuda: torch sees no GPU")


def test_runs_that_cannot_be_used(place, tmp_path):
    refused(regard("translate", tmp_path / "no", stdin="a\n"), "RunError: ", "there is no such folder")
    refused(regard("translate", place / "tiny.toml", stdin="a\n"), "RunError: ", "is a file")
    regard("prepare", place / "tiny.toml", "--out", tmp_path / "run")
    refused(regard("translate", tmp_path / "run", stdin="a\n"), "RunError: ", "no checkpoint yet", "regard train")


def test_a_checkpoint_cut_short(place, tmp_path):
    arguments = ("--out", tmp_path / "run", "--set", "train.steps=1", "--quiet")
    assert regard("train", place / "tiny.toml", *arguments).exit_code == 0
    weights = tmp_path / "run/checkpoints/step-00000001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(regard("translate", tmp_path / "run", stdin="a\n"), "CheckpointError: ", "model.safetensors", "is damaged")


def test_input_and_output_that_cannot_be_used(run, tmp_path):
    refused(regard("translate", run, "--input", tmp_path / "no"), "FileNotFoundError: ", "no: No such file")
    refused(regard("translate", run, "--input", tmp_path), "IsADirectoryError: ")
    refused(regard("translate", run, "--output", tmp_path, stdin="a\n"), "IsADirectoryError: ")
    (tmp_path / "file").write_text("kept")
    refused(regard("translate", run, "--output", tmp_path / "file" / "out", stdin="a\n"), "NotADirectoryError: ")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_unfinished_output_leaves_nothing(run, tmp_path, monkeypatch):
    def stream(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("regard.translator.Translator.stream", stream)
    (tmp_path / "out").write_text("from before")
    result = regard("translate", run, "--output", tmp_path / "out", stdin="a\n")
    assert result.exit_code == 130 and "Interrupted." in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "from before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(run):
    full = regard("translate", run, "--output", "/dev/full", stdin="a b\n")
    refused(full, "OSError: No space left on device. Free some space")
    assert Path("/dev/full").is_char_device()  # and not a file of that name
    with Path("/dev/full").open("wb") as disk:
        for arguments in (("init", "rnn-fixed"), ("--help",)):
            full = process(*arguments, stdout=disk, stderr=subprocess.PIPE)
            assert full.returncode == 2 and b"No space left on device" in full.stderr
            assert b"Traceback" not in full.stderr and b"Exception ignored" not in full.stderr


def test_a_reader_that_stops_reading(run):
    read, write = os.pipe()
    os.close(read)
    done = process("translate", run, input=b"a b\n" * 100, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.parametrize("number", [13, 1])
def test_a_place_without_permission(run, tmp_path, monkeypatch, number):
    original = Path.open

    def refuse(path, mode="r", **options):
        if mode == "wb":
            raise OSError(number, os.strerror(number), str(path))
        return original(path, mode, **options)

    monkeypatch.setattr("regard.cli.output.Path.open", refuse)
    result = regard("translate", run, "--output", tmp_path / "out", stdin="a\n")
    refused(result, "PermissionError: ", "change its permissions")


# --- score, evaluate, look, info


def test_score_prints_a_number_for_each_line(run, place):
    files = ("--source", place / "data/test.src", "--target", place / "data/test.tgt")
    result = regard("score", run, *files)
    values = [float(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0 and len(values) == 10 and all(value < 0 for value in values)
    rows = [json.loads(line) for line in regard("score", run, *files, "--json").stdout.splitlines()]
    assert [row["log_probability"] for row in rows] == pytest.approx(values, abs=1e-4)
    lengths = [len(line.split()) + 1 for line in (place / "data/test.tgt").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == lengths
    total = sum(row["log_probability"] for row in rows)
    assert f"{total:,.4f} nats in all, {total / sum(lengths):.4f} for each of {sum(lengths)} tokens" in result.stderr


def test_score_agrees_with_the_search(run, tmp_path):
    best = json.loads(regard("translate", run, "--json", stdin="a b c\n").stdout)
    (tmp_path / "source").write_text("a b c\n")
    (tmp_path / "target").write_text(best["text"] + "\n")
    scored = regard("score", run, "--source", tmp_path / "source", "--target", tmp_path / "target", "--json")
    assert json.loads(scored.stdout)["log_probability"] == pytest.approx(best["log_probability"], abs=1e-4)


def test_score_refuses_differing_counts(run, place, tmp_path):
    (tmp_path / "target").write_text("A\n")
    refused(regard("score", run, "--source", place / "data/test.src", "--target", tmp_path / "target"),
            "DataError: ", "has 1 lines and", "has 10")


def test_evaluate_the_run_s_test_set(run, place):
    result = regard("evaluate", run)
    assert result.exit_code == 0
    for name in ("BLEU", "chrF", "TER", "exact match", "token error rate", "tok:none", "source tokens"):
        assert name in result.stdout
    assert "test.src + test.tgt: 10 pairs; step-000000" in result.stderr and "beam 2:" in result.stderr
    figures = json.loads(regard("evaluate", run, "--json").stdout)
    assert figures["lines"] == 10 and figures["beam"] == 2 and figures["files"] == ["test.src", "test.tgt"]
    assert sum(bucket["lines"] for bucket in figures["by_length"]) == 10
    given = ("--source", place / "data/test.src", "--target", place / "data/test.tgt")
    assert json.loads(regard("evaluate", run, *given, "--json").stdout)["scores"] == figures["scores"]


def test_evaluate_names_the_engine_and_the_precision(run):
    plain = regard("translate", run, stdin="a\n").stderr.strip().split("; engine ")[1]
    assert regard("evaluate", run).stderr.strip().endswith(f"; engine {plain}")  # both take the same one by default
    for asked, expected in (((), plain), (("--engine", "torch"), "torch, float32"),
                            (("--engine", "torch", "--precision", "bfloat16"), "torch, bfloat16")):
        figures = json.loads(regard("evaluate", run, *asked, "--json").stdout)
        assert expected.startswith(f"{figures['engine']}, {figures['precision']}")
    refused(regard("evaluate", run, "--engine", "torch", "--precision", "int8"), 'torch has no precision = "int8"')
    refused(regard("evaluate", run, "--engine", "fast"), "expected auto, torch or ctranslate2")


def test_evaluate_reports_what_was_not_translated(run, tmp_path):
    (tmp_path / "source").write_text("a\n" + "a " * 60 + "\n")
    (tmp_path / "target").write_text("A\nA\n")
    result = regard("evaluate", run, "--source", tmp_path / "source", "--target", tmp_path / "target")
    assert result.exit_code == 0 and "source:2: not translated, scored as empty: " in result.stderr


def test_evaluate_with_several_references_takes_the_closest(run, place, tmp_path):
    outputs = regard("translate", run, "--input", place / "data/test.src").stdout
    (tmp_path / "second").write_text(outputs)
    given = ("--source", place / "data/test.src", "--target", place / "data/test.tgt", "--target", tmp_path / "second")
    figures = json.loads(regard("evaluate", run, *given, "--json").stdout)
    assert figures["references"] == 2 and figures["files"][1:] == [str(given[3]), str(given[5])]
    assert figures["scores"]["exact match"]["value"] == 100 and figures["scores"]["TER"]["value"] == 0
    assert figures["scores"]["BLEU"]["signature"].startswith("nrefs:2|")


def test_evaluate_writes_a_page_only_when_asked(run):
    assert not (run / "report.html").exists()
    result = regard("evaluate", run, "--report")
    assert result.exit_code == 0 and f"wrote {run / 'report.html'}" in result.stderr and "BLEU" in result.stdout
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "Best sentences" in page
    assert result.stderr.split("; engine ")[1].split("\n")[0].split(" (")[0] in page  # such as ctranslate2, float32
    (run / "report.html").unlink()


def test_a_run_without_a_test_set_needs_files(place, tmp_path):
    config = tmp_path / "tiny.toml"
    config.write_text("".join(line + "\n" for line in CONFIG.splitlines() if not line.startswith("test = ")))
    arguments = ("--set", f"data.root={place / 'data'}", "--set", "train.steps=1", "--out", tmp_path / "run")
    assert regard("train", config, *arguments).exit_code == 0
    refused(regard("evaluate", tmp_path / "run"), "ConfigError: regard evaluate: the run's config has no [data] test",
            "Give --source FILE --target FILE")


def test_faults_of_evaluate(run, place, tmp_path):
    refused(regard("evaluate", run, "--target", place / "data/test.tgt"), "ConfigError: ", "come together")
    refused(regard("evaluate", run, "--source", tmp_path / "no", "--target", tmp_path / "no"), "DataError: ",
            "no: cannot read it: No such file")
    (tmp_path / "empty").write_text("")
    refused(regard("evaluate", run, "--source", tmp_path / "empty", "--target", tmp_path / "empty"), "DataError: ",
            "0 pairs: nothing to score")
    refused(regard("evaluate", run, "--source", place / "data/test.src"), "ConfigError: ", "come together")
    refused(regard("evaluate", run, "--tokenize", "13b"), 'Did you mean "13a"?')
    (tmp_path / "target").write_text("A\n")
    files = ("--source", place / "data/test.src", "--target", tmp_path / "target")
    refused(regard("evaluate", run, *files), "DataError: ", "target has 1 lines")


def test_look_shows_tokens_and_draws(run, tmp_path):
    result = regard("look", run, "a b c", "--target", "A C", "--layer", "2", "--head", "1", "--png", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "layer 2 of 2, head 1 of 2" in result.stdout and "C" in result.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_faults_of_look(run):
    refused(regard("look", run, "a b", "--layer", "3"), "ConfigError: layer 3", "layers 1 to 2")
    refused(regard("look", run, "a b", "--head", "0"), "ConfigError: head 0", "heads 1 to 2")
    refused(regard("look", run, "a " * 10_000), "DataError: cannot look: 10,000 tokens, over the 50")
    refused(regard("look", run, ""), "DataError: cannot look: the source text is empty")


def test_info_tells_what_a_run_is(run):
    result = regard("info", run)
    assert result.exit_code == 0 and result.stderr == ""
    for part in ("transformer", "100 pairs", "20 of 20 updates", "step-00000020", "regard translate", "torch"):
        assert part in result.stdout
    facts = json.loads(regard("info", run, "--json").stdout)
    assert facts["training"]["step"] == 20 and facts["best"]["metric"] == "token_error_rate"
    assert facts["checkpoints"] == ["step-00000010", "step-00000020"]


def test_info_tells_size_and_what_is_not_at_its_default():
    assert _told_model(model_config("transformer-relative")) == (
        "transformer: width = 8, layers = 2, dropout = 0.0, heads = 2, kv_heads = 1, feedforward = 12, "
        'positions = "relative", encoder_layers = 1')
    assert _told_model(model_config("mixed-transformer-before")) == (
        'encoder transformer: width = 8, layers = 2, dropout = 0.0, heads = 2, feedforward = 12, positions = "rotary"; '
        'decoder rnn: width = 6, layers = 1, dropout = 0.0, attention = "before", coverage = true; tie = "none"; '
        "reverse_source = true")


def test_info_of_a_run_that_is_only_prepared(place, tmp_path):
    regard("prepare", place / "tiny.toml", "--out", tmp_path / "run")
    result = regard("info", tmp_path / "run")
    assert result.exit_code == 0 and "not yet" in result.stdout and "regard translate" not in result.stdout


def test_info_counts_every_parameter(run):
    import regard as library

    model = library.load(run).model
    counted = json.loads(regard("info", run, "--json").stdout)["best"]["parameters"]
    assert counted == sum(weights.numel() for weights in model.parameters())


def test_info_refuses_what_is_no_run(tmp_path):
    refused(regard("info", tmp_path), "RunError: ", "is not a run")
