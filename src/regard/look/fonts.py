"""Fonts for a picture's labels: which of the installed ones have a glyph for each character.

matplotlib draws a text with a list of font families and takes each character from the first that has it. DejaVu Sans
comes with matplotlib and has Latin with all accents, phonetic letters, Greek, Cyrillic, Arabic and Hebrew, but no
Chinese, Japanese or Korean. Those come from the system's fonts or, on a machine without any, from the extra "fonts"
(Noto Sans CJK, SIL Open Font License). Its font is added to those that matplotlib knows; no setting is changed.
"""

import functools
import importlib.util
import logging
import unicodedata
from pathlib import Path
from typing import NamedTuple

from matplotlib.font_manager import FontEntry, FontProperties, fontManager, get_font

BASE = "DejaVu Sans"
BOX = "□"
_EXTRA_PACKAGE = "noto_cjk_sans_otc"
_CHINESE = ["Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC",
            "PingFang HK", "Hiragino Sans GB", "Microsoft YaHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"]
_JAPANESE = ["Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "Hiragino Sans", "Yu Gothic", "Meiryo",
             "IPAexGothic", "TakaoPGothic", "VL PGothic"]
_KOREAN = ["Noto Sans CJK KR", "Noto Sans KR", "Source Han Sans KR", "Apple SD Gothic Neo", "Malgun Gothic",
           "NanumGothic"]
_SYMBOLS = ["Noto Emoji", "Noto Sans Symbols 2", "Noto Sans Symbols", "Segoe UI Symbol", "Segoe UI Emoji",
            "Apple Symbols", "Symbola"]
# Colour glyphs are bitmaps, which matplotlib cannot draw; the others draw a box for every character there is.
_UNUSABLE = ("color emoji", "last resort", "lastresort", "adobe blank", "adobe notdef")
_REGULAR = (400, "normal", "regular", "book")

logger = logging.getLogger(__name__)


class Fonts(NamedTuple):
    """Fonts for one text: font families in the order in which to look for a glyph, and what none of them has."""

    families: list[str]
    missing: str


def choose(text: str) -> Fonts:
    """Find installed fonts that together have a glyph for each character.

    Args:
        text: everything to be drawn in one language; kana in it chooses Japanese forms of the ideographs, hangul
            Korean ones, else they are Chinese.

    Returns:
        The families, DejaVu Sans first, and the characters without any glyph, each once.
    """
    families = [BASE]
    missing = _without_glyph(BASE, dict.fromkeys(text))
    if missing:
        _add_extra()
    for family in _candidates(text) if missing else []:
        left = _without_glyph(family, missing)
        if len(left) < len(missing):
            families.append(family)
            missing = left
        if not missing:
            break
    return Fonts(families, "".join(missing))


def report(missing: str) -> None:
    """Log one line about characters that no installed font has; say nothing when there are none."""
    if not missing:
        return
    shown = " ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    remedy = ("Install a font that does." if _add_extra()
              else "For Chinese, Japanese and Korean: pip install 'regard[fonts]'")
    logger.warning("The picture shows %s in place of %s: no installed font has them. %s", BOX, shown, remedy)


def _candidates(text: str) -> list[str]:
    """Installed families, those known to look well first, and the ones of the text's own language before all."""
    names = [unicodedata.name(character, "") for character in set(text)]
    if any(name.startswith(("HIRAGANA", "KATAKANA")) for name in names):
        known = _JAPANESE + _CHINESE + _KOREAN
    elif any(name.startswith("HANGUL") for name in names):
        known = _KOREAN + _CHINESE + _JAPANESE
    else:
        known = _CHINESE + _JAPANESE + _KOREAN
    installed = {entry.name for entry in fontManager.ttflist if _is_plain(entry)}
    known = [family for family in known + _SYMBOLS if family in installed]
    return known + sorted(installed - {BASE, *known})


def _is_plain(entry: FontEntry) -> bool:
    """Whether a font is upright, of regular weight, and has glyphs that can be drawn."""
    return entry.style == "normal" and entry.weight in _REGULAR and not any(
        part in entry.name.lower() for part in _UNUSABLE)


def _without_glyph(family: str, characters: dict[str, None]) -> dict[str, None]:
    """Those of the characters that a family has no glyph for: all of them when its file cannot be read."""
    try:
        font = get_font(fontManager.findfont(FontProperties(family=[family]), fallback_to_default=False,
                                             rebuild_if_missing=False))
    except (OSError, RuntimeError, ValueError):  # listed, but deleted since, or of a kind FreeType cannot open
        return characters
    return {character: None for character in characters if not font.get_char_index(ord(character))}


@functools.cache
def _add_extra() -> bool:
    """Tell matplotlib of the font of the extra "fonts"; returns whether it is installed."""
    spec = importlib.util.find_spec(_EXTRA_PACKAGE)
    if spec is None or spec.origin is None:
        return False
    for path in sorted(Path(spec.origin).parent.glob("*.ttc")):
        fontManager.addfont(path)
    return True
