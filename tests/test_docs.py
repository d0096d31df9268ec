"""The pages of docs/ say what the code says: quotations are quotations, figures and pages are there."""

import re
import tomllib
from pathlib import Path

import pytest

from regard.config import parse_config
from regard.config_train import TrainConfig
from regard.training.optimizer import OPTIMIZERS
from regard.training.schedule import SCHEDULES

ROOT = Path(__file__).parent.parent
TRAINING = [ROOT / "docs" / name for name in ("training.md", "training.zh.md")]
STORY = [ROOT / "docs" / name for name in ("from-rnn-to-transformer.md", "from-rnn-to-transformer.zh.md")]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", STORY, ids=lambda page: page.name)
def test_code_is_quoted_from_the_source(page):
    quotations = blocks(page, "python")
    assert len(quotations) >= 6
    for quotation in quotations:
        head, code = quotation.split("\n", 1)
        assert code in (ROOT / head.removeprefix("# ")).read_text(encoding="utf-8"), head


@pytest.mark.parametrize("page", [*STORY, *TRAINING], ids=lambda page: page.name)
def test_configs_are_read(page):
    sides = {"source": "a", "target": "b"}
    models = blocks(page, "toml")
    assert models
    for text in models:
        parse_config({"data": {"train": [sides], "valid": sides}, **tomllib.loads(text)}, page.name, ROOT)


@pytest.mark.parametrize("page", TRAINING, ids=lambda page: page.name)
def test_every_setting_of_a_training_is_told_of(page):
    told = re.findall(r"`(?:\[model\] )?(\w+)`", page.read_text(encoding="utf-8"))
    assert TrainConfig.model_fields.keys() <= set(told)
    assert {*OPTIMIZERS, *SCHEDULES} <= set(told)


def test_what_shows_a_promise_is_there():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(?:pytest|python) ([^`]+)`", text)
    assert len(commands) >= 8
    for command in commands:
        files, _, words = command.partition(" -k ")
        code = "".join((ROOT / file).read_text(encoding="utf-8") for file in files.split())
        assert [word for word in re.findall(r"\w+", words) if word not in ("and", "or") and word not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
