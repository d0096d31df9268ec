"""Memory of `regard translate` as its input grows, measured from outside."""

import subprocess
import sys
from pathlib import Path

import pytest

import regard
from conftest import make_config, write_reversal

LONG = 40_000
"""Lines of the longer input."""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_ten_times_the_lines_take_the_same_memory(tmp_path, engine):
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2", reason="the extra 'ctranslate2' is not installed")
    write_reversal(tmp_path)
    config = make_config(tmp_path, "transformer-pre", steps=2, validate_every=2)
    run = regard.train(config, tmp_path / "run", quiet=True)
    (tmp_path / "test").write_text("a b c d\nb\nd c a\n", encoding="utf-8")
    script = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    done = subprocess.run(
        [sys.executable, script, run.folder, "--source", tmp_path / "test", "--engines", engine, "--lines", "10000",
         str(LONG), "--beam", "2"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
