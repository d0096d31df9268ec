"""Fonts: which families cover a text, with and without the extra "fonts", and what is said when none does."""

import dataclasses
import logging
from collections.abc import Iterator

import matplotlib
import pytest
from matplotlib.font_manager import FontEntry, fontManager

from regard.look import fonts

noto = pytest.importorskip("noto_cjk_sans_otc", reason="the extra 'fonts' is not installed")


@pytest.fixture(autouse=True)
def fresh_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with no fonts but matplotlib's own."""
    own = [entry for entry in fontManager.ttflist if entry.name.startswith("DejaVu")]
    monkeypatch.setattr(fontManager, "ttflist", own)
    fontManager._findfont_cached.cache_clear()  # type: ignore[attr-defined]
    fonts._add_extra.cache_clear()
    yield
    fonts._add_extra.cache_clear()


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra were not installed."""
    monkeypatch.setattr(fonts, "_EXTRA_PACKAGE", "no_such_package")


def install_as(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make Noto's font a system font of another name."""
    own = list(fontManager.ttflist)
    fontManager.addfont(noto.FONT_PATH)
    entry: FontEntry = fontManager.ttflist[len(own)]
    monkeypatch.setattr(fontManager, "ttflist", [*own, dataclasses.replace(entry, name=name)])


@pytest.mark.parametrize("text", ["A dog runs.", "Žluťoučký kůň, Übergröße, Łódź", "ˈʃɪp θɪŋ ðə", "Ещё собака",
                                  "σκύλος", "שלום", "مرحبا", "␣ ◌́ … → ↓ □"])
def test_what_matplotlib_has_itself_needs_nothing_more(text: str) -> None:
    assert fonts.choose(text) == (["DejaVu Sans"], "")
    assert all(entry.name.startswith("DejaVu") for entry in fontManager.ttflist)


@pytest.mark.parametrize(("text", "family"), [
    ("两个孩子正在公园里踢足球。", "Noto Sans CJK SC"),
    ("兩個孩子正在公園裡踢足球。", "Noto Sans CJK SC"),
    ("大きな犬が雪の中を走っています。", "Noto Sans CJK JP"),
    ("カタカナ", "Noto Sans CJK JP"),
    ("개가 달린다", "Noto Sans CJK KR"),
])
def test_the_extra_covers_chinese_japanese_and_korean(text: str, family: str) -> None:
    families, missing = fonts.choose(text + " with Łódź and ʃ")
    assert families[0] == "DejaVu Sans" and missing == ""
    known = {entry.name for entry in fontManager.ttflist}  # matplotlib before 3.11 reads only the first face of a file
    assert families[1:] == [family if family in known else "Noto Sans CJK JP"]


def test_a_font_of_the_system_is_used_without_the_extra(monkeypatch: pytest.MonkeyPatch, no_extra: None) -> None:
    install_as(monkeypatch, "Ming of the House")
    assert fonts.choose("狗") == (["DejaVu Sans", "Ming of the House"], "")


def test_without_any_font_the_characters_are_named_once_each(no_extra: None) -> None:
    assert fonts.choose("狗 dog 狗 跑") == (["DejaVu Sans"], "狗跑")


def test_a_font_whose_file_is_gone_is_passed_over(monkeypatch: pytest.MonkeyPatch, no_extra: None) -> None:
    base = next(entry for entry in fontManager.ttflist if entry.name == "DejaVu Sans")
    gone = dataclasses.replace(base, name="Noto Sans CJK SC", fname="/no/such/font.otf")
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist, gone])
    assert fonts.choose("狗").missing == "狗"


@pytest.mark.parametrize("name", ["Noto Color Emoji", "Apple Color Emoji", ".LastResort", "Adobe Blank"])
def test_fonts_that_cannot_draw_what_they_promise_are_never_chosen(
    name: str, monkeypatch: pytest.MonkeyPatch, no_extra: None
) -> None:
    install_as(monkeypatch, name)
    assert fonts.choose("狗") == (["DejaVu Sans"], "狗")


def test_the_warning_is_one_line_that_names_the_characters_and_the_extra(
    caplog: pytest.LogCaptureFixture, no_extra: None
) -> None:
    fonts.report("狗跑")
    assert [record.getMessage() for record in caplog.records] == [
        "The picture shows □ in place of 狗 跑: no installed font has them. For Chinese, Japanese and Korean: "
        "pip install 'regard[fonts]'"]
    assert caplog.records[0].levelno == logging.WARNING


def test_the_warning_does_not_offer_the_extra_to_who_has_it(caplog: pytest.LogCaptureFixture) -> None:
    fonts.report("🙂")
    assert caplog.messages == [
        "The picture shows □ in place of 🙂: no installed font has them. Install a font that does."]


def test_the_warning_is_short_for_many_characters(caplog: pytest.LogCaptureFixture, no_extra: None) -> None:
    fonts.report("".join(chr(0x4E00 + index) for index in range(50)))
    assert "and 30 more" in caplog.text and len(caplog.messages[0]) < 250


def test_nothing_missing_is_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    fonts.report("")
    assert caplog.records == []


def test_no_setting_of_matplotlib_is_changed() -> None:
    before = matplotlib.rcParams.copy()
    fonts.choose("狗")
    assert matplotlib.rcParams.copy() == before
