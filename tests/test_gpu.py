"""`on_a_gpu` passes, on a GPU that is not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_it_works_on_a_gpu_that_is_not_here():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu", "-p", "no:cacheprovider",
                           str(HERE / "on_a_gpu.py")], capture_output=True, text=True, cwd=HERE.parent,
                          env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stdout[-5000:]
