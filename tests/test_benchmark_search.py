"""The benchmark of search: it runs, and gives what it says. Timings are never asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from conftest import make_config
from regard.training.loop import train

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "search.py"


@pytest.mark.slow
def test_two_versions_take_turns_on_the_same_lines(corpus, tmp_path):
    run = train(make_config(corpus, "after-general"), tmp_path / "run", quiet=True)
    command = [sys.executable, str(SCRIPT), str(run.folder), "--source", str(corpus / "valid.source"), "--against",
               str(Path(regard.__file__).parents[1]), "--beams", "2", "--rounds", "2", "--threads", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row, = json.loads(done.stdout)
    assert (row["run"], row["beam"], row["different"]) == ("run", 2, 0) and row["times"] > 0 < row["times_processor"]
    assert done.stderr.count("round 2/2  own") == done.stderr.count("round 1/2  other") == 1
    table = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1 and table[2].startswith("| run | 2 | ")
