"""The pages of a run and of a comparison: complete, self-contained, accessible, and safe whatever the texts are."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from typer.testing import CliRunner

import regard
from conftest import make_config
from regard.cli import app
from regard.config import CorpusConfig, write_config
from regard.evaluate import report
from regard.metrics import BETTER
from regard.training.run import Run

VOID = {"meta", "link", "br", "wbr", "img", "line"}
SOURCES = ["a b c", "d", "", "a b c d a b c d", "c c", "b a", "</script> <img src=x onerror=alert(1)>", "b"]
TARGETS = ["c b a", "d", "x", "d c b a d c b a", "c c", "我 喜欢 猫", "</mark> <b>bold</b>", "a\x1b[31m b"]


class Page(HTMLParser):
    """All tags with their attributes, the text, and whether every tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text += data

    def every(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return re.sub(r"\s+", " ", self.text)


def call(*arguments):
    """Run a command in this process; it must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="regard")
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of three families, whose test set holds hostile text, and a file of outputs."""
    folder = tmp_path_factory.mktemp("pages")
    for name, lines in (("source", SOURCES), ("target", TARGETS)):
        text = "".join(f"{line}\n" for line in lines)
        for part in ("train", "valid", "test"):
            (folder / f"{part}.{name}").write_text(text * (8 if part == "train" else 1), encoding="utf-8")
    for row in ("transformer-pre", "after-general", "fixed-gru-every-step"):
        config = make_config(folder, row, metric="token_error_rate")
        test = CorpusConfig(source="test.source", target="test.target")
        config = config.model_copy(update={"data": config.data.model_copy(update={"test": test})})
        regard.train(config, folder / row, quiet=True)
    (folder / "out").write_text("".join(f"{line}\n" for line in ["</td><script>alert(2)</script>", *TARGETS[1:]]))
    return folder


@pytest.fixture(scope="module")
def run_page(place):
    """The page of the Transformer."""
    call("evaluate", place / "transformer-pre", "--report")
    return Page((place / "transformer-pre" / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compare_page(place):
    """The page of a comparison of all."""
    systems = [place / name for name in ("transformer-pre", "fixed-gru-every-step", "out", "after-general")]
    call("compare", *systems, "--resamples", "50", "--trials", "60", "--html", place / "compared.html")
    return Page((place / "compared.html").read_text(encoding="utf-8"))


@pytest.fixture(params=["run_page", "compare_page"])
def page(request):
    """Each of the pages."""
    return request.getfixturevalue(request.param)


# --- both


def test_it_needs_no_network_and_runs_no_script(page):
    addresses = [value for _, attributes in page.tags for name, value in attributes.items()
                 if name in ("src", "srcset", "href", "action", "data", "xlink:href")]
    assert addresses == ["data:,"]
    assert not page.every("script") and not any(name.startswith("on") for _, all in page.tags for name in all)
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.every("meta"))
    assert "url(" not in page.text and "@import" not in page.text


def test_texts_never_become_markup(page):
    assert not page.every("img") and not page.every("b")
    assert "<img src=x onerror=alert(1)>" in page.text and "<b>bold</b>" in page.text
    assert "a\\x1b[31m b" in page.text and "\x1b" not in page.text


def test_tables_and_charts_have_names(page):
    assert all(header.get("scope") in ("row", "col") for header in page.every("th"))
    charts = [svg for svg in page.every("svg") if svg.get("role") == "img"]
    assert charts and all(len(svg["aria-label"]) > 20 for svg in charts)
    assert {svg["class"] for svg in charts} == {"wide", "narrow"}
    assert all(svg.get("aria-hidden") == "true" for svg in page.every("svg") if svg not in charts)
    regions = [div for div in page.every("div") if div.get("class") == "scroll"]
    assert len(regions) == len(page.every("table"))
    assert all(div["tabindex"] == "0" and div["role"] == "region" and div["aria-label"] for div in regions)


def test_it_suits_telephones_the_dark_and_every_script(page):
    assert any(meta.get("name") == "viewport" for meta in page.every("meta"))
    assert any(meta.get("content") == "light dark" for meta in page.every("meta"))
    assert page.every("html") == [{"lang": "en"}] and len(page.every("h1")) == 1
    assert {"dir": "auto", "lang": "zh"} in page.every("span")


def test_headings_do_not_skip_a_level(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


def test_it_says_what_made_it(page):
    assert f"Regard {regard.__version__}, sacreBLEU 2." in page.text and "torch 2." in page.text


# --- of a run


def test_the_page_of_a_run_is_complete(place, run_page):
    for wanted in ("transformer, 2 + 2 layers, 2 heads", "7 pairs; 1 left out", "tok:none|smooth:exp", "Best sentences",
                   "Worst sentences", "test.source:6", "step-000000", "SHA-256", " of 12 updates", "mean of 2 layers",
                   "token error rate of the validation data", f"regard evaluate {place / 'transformer-pre'} --engine ",
                   "--precision float32 --report", "translated by", ", float32", *BETTER):
        assert wanted in run_page.words, wanted
    assert "length of the source in tokens, and how many lines there are" in run_page.words
    assert "token error rate, percent; lower is better" in run_page.words  # by what the run was chosen


def test_the_config_stands_in_the_page(place, run_page):
    assert (place / "transformer-pre/config.toml").read_text().strip() in run_page.text


def test_attention_is_that_of_the_model(place, run_page):
    matrices = [attributes for attributes in run_page.every("table") if attributes.get("class") == "matrix"]
    assert 1 <= len(matrices) <= 3
    shown = [round(100 * float(cell["style"].removeprefix("--w:"))) for cell in run_page.every("td")
             if "--w:" in cell.get("style", "")]
    translator = regard.load(place / "transformer-pre")
    matrix = translator.look(SOURCES[int(re.search(r"One of the best: test\.source:(\d+)", run_page.text)[1]) - 1],
                             beam=2).matrix()
    expected = [round(100 * weight) for row in matrix.tolist() for weight in row]
    assert shown[: len(expected)] == expected


def test_a_fixed_vector_has_nothing_to_show(place):
    call("evaluate", place / "fixed-gru-every-step", "--report", "--json")
    page = Page((place / "fixed-gru-every-step" / "report.html").read_text(encoding="utf-8"))
    assert "Nothing to show. This model read the whole source into one vector" in page.words
    assert not [each for each in page.every("table") if each.get("class") == "matrix"]


def test_a_test_set_of_others_and_what_was_not_translated(place, tmp_path):
    (tmp_path / "s").write_text("a b\n" + "a " * 25 + "\n" + "a " * 60 + "\n")
    (tmp_path / "t").write_text("b a\na\na\n")
    (tmp_path / "u").write_text("b\n\na\n")
    given = ("--source", tmp_path / "s", "--target", tmp_path / "t", "--target", tmp_path / "u")
    result = call("evaluate", place / "after-general", *given, "--report", "--beam", "1")
    page = Page((place / "after-general" / "report.html").read_text(encoding="utf-8"))
    assert f"wrote {place / 'after-general' / 'report.html'}" in result.stderr
    for wanted in ("3 lines, 2 references", "2 lines could not be translated", f"{tmp_path / 's'}:3: 60 tokens",
                   "nrefs:var", "reference 2", "with beam 1", f"--target {tmp_path / 'u'}", "one layer, one head"):
        assert wanted in page.words, wanted


def test_a_test_set_of_long_lines_has_no_pictures(place, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LONGEST_LOOK", 0)
    call("evaluate", place / "after-general", "--report")
    page = Page((place / "after-general" / "report.html").read_text(encoding="utf-8"))
    assert "No source of this test set is short enough to be shown here." in page.words and "rnn;" in page.words


def test_a_long_output_is_cut_and_the_page_says_so(place, monkeypatch):
    monkeypatch.setattr(report, "_CUT", 1)
    call("evaluate", place / "transformer-pre", "--report")
    text = (place / "transformer-pre" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"The first 1 of \d+ output tokens\.", text)
    bodies = re.findall(r'class="matrix".*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert bodies and all(body.count("<tr>") == 1 for body in bodies)


def test_a_run_without_curves(place, tmp_path):
    for part in ("config.toml", "tokenizer", "checkpoints"):
        (tmp_path / part).symlink_to(place / "after-general" / part)
    call("evaluate", tmp_path, "--report")
    assert "There are no curves" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).words


# --- of a comparison


def test_the_page_of_a_comparison_is_complete(place, compare_page):
    for wanted in ("4 systems on one test set", "transformer-pre against fixed-gru-every-step, out, after-general",
                   "baseline", "p, bootstrap", "p, randomised", "50 resamples", "60 trials", "seed 12345",
                   "not corrected for their number", "nrefs:1|bs:50|seed:12345", "nrefs:1|ar:60|seed:12345",
                   "as near", "Where they differ most", "</td><script>alert(2)</script>", "Settings that differ",
                   "model.kind", "validation loss, nats per target token", "Where they looked", "one layer, one head",
                   "Nothing to show. This model read the whole source", "SHA-256", f"--html {place / 'compared.html'}"):
        assert wanted in compare_page.words, wanted
    charts = [svg["aria-label"] for svg in compare_page.every("svg") if svg.get("class") == "wide"]
    assert [label.split(":")[1].split(" over")[0].strip() for label in charts[:5]] == [
        "token error rate", "BLEU", "chrF", "TER", "exact match"]
    assert len([each for each in compare_page.every("table") if each.get("class") == "matrix"]) == 2


def test_a_comparison_of_files_needs_no_run(place, tmp_path):
    given = ("--source", place / "test.source", "--target", place / "test.target", "--resamples", "9", "--trials", "9")
    call("compare", place / "out", place / "test.target", *given, "--html", tmp_path / "page.html", "--sentences", "0")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    for missing in ("While they learned", "Where they looked", "Settings that differ"):
        assert missing not in page.words
    assert "there is nothing to show, or none was asked for" in page.words
    assert "length of the source in words, and how many lines" in page.words
    assert "--sentences 0 " in page.words and "--checkpoint" not in page.words and "--seed 12345" in page.words


def test_the_best_are_set_in_bold(place, tmp_path):
    (tmp_path / "same").write_bytes((place / "test.target").read_bytes())
    call("compare", place / "out", place / "test.target", tmp_path / "same", "--source", place / "test.source",
         "--target", place / "test.target", "--html", tmp_path / "page.html", "--resamples", "20", "--trials", "20")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len([cell for cell in page.every("td") if cell.get("class") == "number best"]) == 2 * len(BETTER)


# --- what goes wrong


def test_a_missing_package_is_named_before_translating(place, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    for arguments in (("evaluate", place / "transformer-pre", "--report"),
                      ("compare", place / "out", place / "transformer-pre", "--html", place / "x.html")):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="regard")
        assert result.exit_code == 2 and result.stdout == ""
        assert 'MissingExtra: The report needs the package "jinja2"' in result.stderr
        assert "pip install 'regard[demo]'" in result.stderr


def test_a_damaged_log_is_named_and_the_scores_are_printed(place, tmp_path):
    for part in ("tokenizer", "checkpoints"):
        (tmp_path / part).symlink_to(place / "after-general" / part)
    write_config(Run.open(place / "after-general").config, tmp_path / "config.toml")
    (tmp_path / "metrics.jsonl").write_text("{\n")
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--report"], prog_name="regard")
    assert result.exit_code == 2 and "BLEU" in result.stdout and not (tmp_path / "report.html").exists()
    assert "RunError: " in result.stderr and "metrics.jsonl: cannot be read" in result.stderr
