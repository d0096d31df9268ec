"""The demo's page: complete, self-contained, and safe whatever the texts are."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from demo_results import findings_in
from regard.demo import report
from regard.demo.report import LOOKS, write_report
from regard.errors import MissingExtra, RunError


class Page(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def every(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return findings_in(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    path = write_report(found, tmp_path_factory.mktemp("page") / "report.html")
    return Page(path.read_text(encoding="utf-8"))


def test_it_holds_the_figures(page):
    text = re.sub(r"\s+", " ", page.text)
    for wanted in ("138,721 pairs", "281,344", "45.6%", "31.4%", "78%", "CH AE T B AA T", "regard translate", "BSD"):
        assert wanted in text
    assert "not comparable with published ones" in text


def test_it_needs_no_network_and_runs_no_script(page):
    addresses = [value for _, attributes in page.tags for name, value in attributes.items()
                 if name in ("src", "srcset") or (name == "href" and attributes.get("rel"))]
    assert len(addresses) >= 11
    assert all(address.startswith("data:") for address in addresses)
    assert not page.every("script")
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.every("meta"))


def test_pictures_have_words_and_every_look_is_there(page):
    images = page.every("img")
    assert len(images) == 4  # two charts, and two models with attention
    assert all(len(image["alt"]) > 20 for image in images)
    assert [source["media"] for source in page.every("source")] == 2 * [media for media in LOOKS if media != "all"]
    for attributes in [*images, *page.every("source")]:
        kind, _, content = (attributes.get("src") or attributes["srcset"]).partition(";base64,")
        start = b"<?xml" if kind == "data:image/svg+xml" else b"\x89PNG"
        assert base64.b64decode(content).startswith(start)


def test_tables_have_headers_and_it_fits_a_telephone(page):
    assert len(page.every("table")) == 4
    assert all(header.get("scope") in ("row", "col") for header in page.every("th"))
    assert any(meta.get("name") == "viewport" for meta in page.every("meta"))


def test_wrong_phones_are_marked(page):
    assert len(page.every("mark")) == 5  # of the fixed vector: two replaced, three missing


def test_text_never_becomes_markup(found, tmp_path):
    hostile = replace(found, words=["<script>alert(1)</script>", "<img onerror=x>"], title_phones="<b> </mark>")
    page = Page(write_report(hostile, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.every("script") and not page.every("b")
    assert len(page.every("img")) == 4
    assert "<script>alert(1)</script>" in page.text


def test_a_missing_extra_is_named(found, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"report needs .*jinja2.* pip install 'regard\[demo\]'"):
        write_report(found, tmp_path / "report.html")


def test_a_place_that_cannot_be_written(found, tmp_path):
    with pytest.raises(RunError, match=r"cannot write the report.*start the demo again"):
        write_report(found, tmp_path)
