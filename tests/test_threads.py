"""Work side by side: the same results in the same order, errors told, and torch's threads as they were."""

import threading
import time

import pytest
import torch

import regard
from conftest import make_config, write_reversal
from regard.engines.threads import side_by_side
from regard.training.loop import train


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers):
    used = set()

    def work(number):
        used.add((threading.current_thread().name, torch.get_num_threads()))
        time.sleep(0.02 * (number % 3 == 0))
        return number**2

    assert list(side_by_side(work, range(9), workers)) == [number**2 for number in range(9)]
    assert used == {("MainThread", 2)} if workers == 1 else {threads for _, threads in used} == {1} and len(used) > 1
    assert torch.get_num_threads() == 2 and list(side_by_side(work, [], workers)) == []


def test_an_error_there_is_an_error_here():
    def work(number):
        if number == 3:
            raise ValueError("the third")
        return number

    found = side_by_side(work, range(9), 2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(found)
    assert torch.get_num_threads() == 2


def test_whoever_stops_half_way_leaves_nothing_behind():
    begun = []
    found = side_by_side(lambda number: begun.append(number) or time.sleep(0.01), range(1000), 2)
    next(found)
    found.close()
    assert len(begun) < 100 and torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["transformer-pre", "after-general", "conv"])
def test_a_translation_is_that_of_one_thread(tmp_path, name):
    write_reversal(tmp_path)
    translator = regard.load(train(make_config(tmp_path, name, steps=30), tmp_path / name, quiet=True).folder)
    lines = [" ".join("abcd"[(7 * line + place) % 4] for place in range(1 + line % 9)) for line in range(150)]
    asked = [{"beam": 3, "nbest": 2}, {"beam": 1}, {"sample": True, "seed": 3}]
    several = [translator.translate(lines, batch_tokens=60, **each) for each in asked]
    torch.set_num_threads(1)
    for each, found in zip(asked, several, strict=True):
        alone = translator.translate(lines, **each)
        assert [one.text for one in found] == [one.text for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-5)
