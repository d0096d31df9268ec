"""What the C library keeps of freed memory, each in a process of its own: the settings hold for all of it."""

import subprocess
import sys

import pytest

from regard.heap import GLIBC

pytestmark = pytest.mark.skipif(not GLIBC, reason="settings of another C library are left alone")

KEEPS = """
import resource, sys, torch
from regard.heap import keep_freed
torch.empty(1)
if sys.argv[1] == "keep":
    keep_freed(1 << 26)
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(10, 1 << 20), torch.ones(9, 1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
GIVES = """
from regard.heap import give_back
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
held = [bytearray(50_000) for _ in range(2_000)]
held = held[-1:]  # what is free lies before it
before = resident()
give_back()
print(before - resident())
"""


def told(code, *arguments):
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return int(out.stdout)


@pytest.mark.slow
def test_what_each_step_asks_for_is_not_faulted_in_anew():
    assert told(KEEPS, "keep") < told(KEEPS, "leave") / 4


def test_free_memory_between_what_is_in_use_goes_back():
    assert told(GIVES) > 50
