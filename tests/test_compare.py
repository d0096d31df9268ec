"""Comparisons: of outputs by the library, and of runs and files as people call it, with every refusal."""

import json
import random
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import regard
from conftest import make_config
from regard.cli import app
from regard.config import CorpusConfig, read_config, write_config
from regard.errors import ConfigError, DataError, RunError
from regard.evaluate.comparison import Contestant, System, common_ground, compare, short_names, translated
from regard.evaluate.significance import Draws
from regard.evaluate.testset import TestSet as Lines
from regard.metrics import BETTER, bleu, chrf
from regard.translator import Translation

FEW = ("--resamples", "50", "--trials", "50")


def command(*arguments):
    """Run `regard compare` in this process."""
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], prog_name="regard")


def refused(result, *parts):
    """Check that the command ended with 2, one message and no figures."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr and result.stdout == ""
    for part in parts:
        assert part in result.stderr


def write(path, lines):
    """A file of lines."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A test set of 12 lines, the second with an empty source; outputs of it; and two runs whose config names it."""
    folder = tmp_path_factory.mktemp("compare")
    draw = random.Random(1)
    for name, count in (("train", 60), ("valid", 6), ("test", 12)):
        lines = [" ".join(draw.choices("abcd", k=draw.randint(1, 5))) for _ in range(count)]
        if name == "test":
            lines[1] = ""
        write(folder / f"{name}.source", lines)
        write(folder / f"{name}.target", [line[::-1] for line in lines])
    right = (folder / "test.target").read_text().splitlines()
    write(folder / "good.out", [*right[:-1], "a d"])
    write(folder / "bad.out", ["a b", "", *["b"] * 10])
    for name, row in (("one", "transformer-pre"), ("two", "after-general")):
        config = make_config(folder, row)
        test = CorpusConfig(source="test.source", target="test.target")
        config = config.model_copy(update={"data": config.data.model_copy(update={"test": test})})
        regard.train(config, folder / name, quiet=True)
    return folder


@pytest.fixture
def files(place):
    """The options that name the test set."""
    return "--source", place / "test.source", "--target", place / "test.target"


def changed(place, tmp_path, run, name, **data):
    """A run with the weights of another one, and other settings of [data]."""
    folder = tmp_path / name
    folder.mkdir()
    for part in ("tokenizer", "checkpoints"):
        (folder / part).symlink_to(place / run / part)
    config = read_config(place / run / "config.toml")
    write_config(config.model_copy(update={"data": config.data.model_copy(update=data)}), folder / "config.toml")
    return folder


# --- the library


TEST = Lines(["a b", "c", "d e f"], [["A B", "C", "D E F"]], [1, 3, 4], 4, ("s", "t"))
SYSTEMS = [System("x/one", ["A B", "C", "D"], {}), System("x/two", ["A B", "X", "D E F"], {2: "too long"})]


def compared(**options):
    return compare(SYSTEMS, TEST, [2, 1, 7], "words", tokenize="none", draws=Draws(50, 50), **options)


def test_scores_are_those_of_the_metrics():
    found = compared()
    for system, rating in zip(SYSTEMS, found.ratings, strict=True):
        assert [score.name for score in rating.scores] == list(BETTER)
        assert rating.scores[0] == bleu(system.outputs, TEST.references, "none")
        assert rating.closeness[2] == chrf([system.outputs[2]], ["D E F"]).value
        assert [(bucket.name, bucket.lines) for bucket in rating.by_length] == [("up to 5", 2), ("6–10", 1)]
    assert found.against(1) == (1, 1, 1) and found.against(0) == (0, 3, 0)
    assert found.differing(5) == [1, 2] and found.differing(1) == [1]


def test_figures_are_plain_and_complete():
    figures = json.loads(json.dumps(compared().figures(1)))
    assert figures["baseline"] == "x/one" and figures["length_unit"] == "words"
    assert figures["test"] == {"files": ["s", "t"], "lines": 3, "sha256": TEST.sha256}
    assert figures["draws"] == {"resamples": 50, "trials": 50, "seed": 12345}
    one, two = figures["systems"]
    assert two["problems"] == {"2": "too long"}
    assert two["lines_against_baseline"] == {"nearer": 1, "as_near": 1, "farther": 1}
    assert one["lines_against_baseline"] is None
    assert one["scores"]["BLEU"]["p_bootstrap"] is one["scores"]["BLEU"]["difference"] is None
    score = two["scores"]["exact match"]
    assert score.keys() == {"value", "signature", "mean", "interval_95", "difference", "p_bootstrap", "p_randomisation"}
    assert score["difference"] == 0 and 0 < score["p_bootstrap"] <= 1 and score["p_randomisation"] == 1
    assert [bucket["lines"] for bucket in two["by_length"]] == [2, 1]
    assert figures["sentences"] == [{
        "line": 3, "source": "c", "references": ["C"],
        "outputs": [{"name": "x/one", "text": "C", "chrF": pytest.approx(100)},
                    {"name": "x/two", "text": "X", "chrF": 0}],
    }]


def test_the_same_seed_gives_the_same_figures():
    assert compared().figures(3) == compared().figures(3)


def test_outputs_that_do_not_fit_the_test_set_are_refused():
    with pytest.raises(DataError, match="2 outputs and 3 references"):
        compare([SYSTEMS[0], System("y", ["a", "b"], {})], TEST, [1, 1, 1], "words")


def test_a_translator_s_outputs_and_problems():
    def stream(lines, beam):
        assert beam == 3
        return (Translation("" if line == "c" else line.upper(), problem="no" if line == "c" else None)
                for line in lines)

    called = []
    engine = SimpleNamespace(name="torch", precision="bfloat16")
    system = translated("run", SimpleNamespace(stream=stream, engine=engine), TEST, 3, lambda: called.append(1))
    assert system == System("run", ["A B", "", "D E F"], {2: "no"}, "torch", "bfloat16") and len(called) == 3


@pytest.mark.parametrize(("names", "expected"), [
    (["runs/a", "runs/b"], ["a", "b"]), (["a/x/out", "b/x/out"], ["a/x/out", "b/x/out"]),
    (["a/out", "b/out", "c"], ["a/out", "b/out", "c"]), (["/out", "out"], ["//out", "out"]), (["."], ["."]),
])
def test_names_as_short_as_tells_them_apart(names, expected):
    assert short_names(names) == expected


def test_a_system_is_a_run_or_a_file(place, tmp_path):
    assert Contestant.open(place / "one").run.folder == place / "one"
    assert Contestant.open(place / "good.out").lines[-1] == "a d"
    with pytest.raises(DataError, match=r"no: there is no such run or file\. Expected a run's folder, or a file"):
        Contestant.open(tmp_path / "no")
    with pytest.raises(RunError, match="is not a run"):
        Contestant.open(tmp_path)


# --- what cannot be compared


def test_runs_share_their_test_set_and_their_tokenization(place):
    test, words = common_ground([Contestant.open(place / name) for name in ("one", "good.out", "two")])
    assert len(test) == 11 and words == "none"


def test_files_alone_are_scored_the_standard_way(place):
    outputs = [Contestant.open(place / name) for name in ("good.out", "bad.out")]
    given = Lines.read(place / "test.source", [place / "test.target"])
    assert common_ground(outputs, given) == (given, "13a") and common_ground(outputs, given, "char")[1] == "char"
    with pytest.raises(ConfigError, match='tokenize = "14a" is not a tokenization'):
        common_ground(outputs, given, "14a")


def test_all_reasons_are_told_at_once(place, tmp_path):
    unlike = changed(place, tmp_path, "two", "unlike", bleu_tokenize="13a",
                     test=CorpusConfig(source="valid.source", target="valid.target"))
    without = changed(place, tmp_path, "two", "without", test=None)
    short = write(tmp_path / "short.out", ["a"] * 11)
    result = command(place / "one", unlike, without, short)
    refused(result, "ConfigError: these cannot be compared:\n",
            f'  {unlike}: its config says [data] bleu_tokenize = "13a", and that of {place / "one"} "none"\n',
            f"  {unlike}: its test set is not that of {place / 'one'}: valid.source + valid.target and "
            "test.source + test.target have 6 and 11 lines\n",
            f"  {without}: its config has no [data] test\n",
            f"  {short} has 11 lines and test.source has 12. An output file holds one line for each source line",
            "--source FILE --target FILE", "--tokenize")
    assert len(result.stderr.splitlines()) == 6


def test_test_sets_of_one_length_are_told_apart_by_their_lines(place, tmp_path):
    lines = (place / "test.target").read_text().splitlines()
    write(tmp_path / "t", [*lines[:4], "other", *lines[5:]])
    test = CorpusConfig(source=place / "test.source", target=tmp_path / "t")
    changed(place, tmp_path, "two", "other", test=test)
    refused(command(place / "one", tmp_path / "other"), "have another reference first in line 5")


def test_unlike_tokenization_can_be_overruled(place, tmp_path, files):
    unlike = changed(place, tmp_path, "two", "unlike", bleu_tokenize="13a")
    refused(command(place / "one", unlike, *files, *FEW), "bleu_tokenize")
    result = command(place / "one", unlike, "--tokenize", "char", "--json", *FEW)
    assert result.exit_code == 0
    signatures = [system["scores"]["BLEU"]["signature"] for system in json.loads(result.stdout)["systems"]]
    assert len(set(signatures)) == 1 and "tok:char" in signatures[0]


def test_files_without_a_test_set_are_refused(place):
    refused(command(place / "good.out", place / "bad.out"), "there is no run among them that names a test set",
            "give --source and --target")


def test_one_alone_and_one_twice_are_refused(place):
    refused(command(place / "one"), "expected two or more runs or output files", "regard evaluate RUN")
    refused(command(place / "one", place / "one" / ".." / "one"), "is given twice")
    refused(command(), "Missing argument")


def test_faults_of_the_files(place, tmp_path, files):
    refused(command(place / "one", tmp_path / "no"), "DataError: ", "there is no such run or file")
    refused(command(place / "one", tmp_path), "RunError: ", "is not a run")
    refused(command(place / "one", place / "two", *files[:2]), "regard compare: --source and --target come together")
    refused(command(place / "one", place / "two", *files[:3], write(tmp_path / "t", ["a"])), "t has 1 lines and")
    empty = write(tmp_path / "empty", [])
    refused(command(place / "one", place / "two", "--source", empty, "--target", empty), "nothing to score")
    (tmp_path / "raw").write_bytes(b"\xff\n")
    refused(command(place / "one", tmp_path / "raw"), "raw:1: byte 1 of the line, 0xff, is not UTF-8")


def test_faults_of_the_draws(place, files):
    outputs = (place / "good.out", place / "bad.out", *files)
    refused(command(*outputs, "--resamples", "0"), "ConfigError: resamples = 0: expected 1 or more")
    refused(command(*outputs, "--seed", "0"), "seed = 0: expected 1 or more")
    refused(command(*outputs, "--trials", "1000000000"), "trials = 1,000,000,000 on 11 lines", "give --trials 36363636")
    refused(command(*outputs, "--sentences", "-1"), "--sentences")


def test_the_engine_that_is_named_translates(place, files):
    for asked, expected in (((), "float32"), (("--precision", "bfloat16"), "bfloat16")):
        result = command(place / "one", place / "bad.out", *files, *FEW, "--engine", "torch", *asked, "--json")
        run, file = json.loads(result.stdout)["systems"]
        assert (run["engine"], run["precision"], file["engine"], file["precision"]) == ("torch", expected, None, None)
        assert f"{place / 'one'}: engine torch, {expected}" in result.stderr
    refused(command(place / "one", place / "two", *files, "--engine", "ctranslate2"), 'cannot carry kind = "rnn"')


def test_options_about_translating_are_refused_where_nothing_is_translated(place, files):
    refused(command(place / "good.out", place / "bad.out", *files, "--beam", "3", "--device", "cpu"),
            "--beam, --device say how runs translate, and there are only files of outputs")


def test_a_page_that_cannot_be_written(place, files, tmp_path):
    result = command(place / "good.out", place / "bad.out", *files, *FEW, "--html", tmp_path / "no" / "page.html")
    assert result.exit_code == 2 and "FileNotFoundError: " in result.stderr
    assert "BLEU" in result.stdout  # the figures are not lost


# --- the command


def test_outputs_on_the_terminal(place, files):
    result = command(place / "good.out", place / "bad.out", *files, *FEW, "--sentences", "2")
    assert result.exit_code == 0, result.output
    for wanted in ("BLEU ↑", "TER ↓", "good.out", "±, baseline", "p, bootstrap", "p, randomised", "50 trials",
                   "50 bootstrap resamples", "seed 12345", "the baseline, good.out,", "█", "BLEU by words",
                   "nrefs:1|case:mixed|eff:no|tok:13a", "The lines on which they differ most, by chrF", "source",
                   "reference"):
        assert wanted in result.stdout, wanted
    assert result.stdout.count("\nsource") == 2
    assert "test.target: 11 pairs; 1 left out" in result.stderr


def test_outputs_as_json(place, files):
    arguments = (place / "good.out", place / "bad.out", *files, *FEW, "--json")
    result = command(*arguments)
    figures = json.loads(result.stdout)
    right = (place / "test.target").read_text().splitlines()
    given = (place / "good.out").read_text().splitlines()
    kept = [place for place, line in enumerate(right) if line]
    outputs, references = [given[row] for row in kept], [right[row] for row in kept]
    score = figures["systems"][0]["scores"]["BLEU"]
    assert score["value"] == bleu(outputs, references).value and figures["test"]["lines"] == 11
    assert [system["name"] for system in figures["systems"]] == [str(place / name) for name in ("good.out", "bad.out")]
    assert command(*arguments).stdout == result.stdout
    other = json.loads(command(*arguments, "--seed", "2").stdout)
    assert other["draws"]["seed"] == 2 and other["systems"][1] != figures["systems"][1]


def test_runs_and_a_file_together(place):
    result = command(place / "one", place / "good.out", place / "two", *FEW, "--json", "--beam", "1")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["length_unit"] == f"tokens of {place / 'one'}"
    evaluated = CliRunner().invoke(app, ["evaluate", str(place / "two"), "--json", "--beam", "1"], prog_name="regard")
    alone = json.loads(evaluated.stdout)
    assert {name: score["value"] for name, score in figures["systems"][2]["scores"].items()} == {
        name: score["value"] for name, score in alone["scores"].items()}
    assert figures["test"]["sha256"] == alone["sha256"]
    assert [bucket["lines"] for bucket in figures["systems"][0]["by_length"]] == [11]


def test_several_references(place, files, tmp_path):
    write(tmp_path / "other.target", (place / "bad.out").read_text().splitlines())
    files = (*files, "--target", tmp_path / "other.target")
    result = command(place / "good.out", place / "bad.out", *files, *FEW, "--json")
    systems = json.loads(result.stdout)["systems"]
    assert systems[1]["scores"]["exact match"]["value"] == 100
    assert systems[1]["scores"]["BLEU"]["signature"].startswith("nrefs:2|")


def test_lines_that_a_run_cannot_translate_are_told(place, tmp_path):
    write(tmp_path / "s", ["a b", "a " * 60])
    write(tmp_path / "t", ["b a", "a"])
    given = ("--source", tmp_path / "s", "--target", tmp_path / "t", *FEW)
    result = command(place / "one", place / "two", *given, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert f"s:2: not translated by {place / 'two'}, scored as empty: " in result.stderr


def test_what_terminals_obey_is_shown_as_text(place, files, tmp_path):
    lines = (place / "good.out").read_text().splitlines()
    write(tmp_path / "evil.out", ["\x1b[2J[bold]x\u202e", *lines[1:]])
    result = command(place / "good.out", tmp_path / "evil.out", *files, *FEW)
    assert "\\x1b[2J[bold]x\\u202e" in result.stdout and "\x1b" not in result.stdout
