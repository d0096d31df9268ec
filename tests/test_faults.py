"""A death or a refusal of the disk at every single write, fsync, rename and unlink; bits that flip, files cut short.

A child process trains, and at its k-th call that changes the disk it is killed, or the call fails; k counts up until
the training gets through. After each, what bears a checkpoint's name must be whole, and the same command must end as
if nothing had happened, to the last bit, and leave nothing lying about.
"""

import errno
import gc
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from children import ended, fork
from conftest import make_config, write_reversal
from regard.data.batches import Order
from regard.data.shards import Corpus
from regard.errors import RunError
from regard.training import checkpoint as checkpoints
from regard.training.checkpoint import verify
from regard.training.loop import train
from regard.training.progress import Reporter
from regard.training.run import LOCK, Run
from test_loop import trainer_of

SETTINGS = {"steps": 6, "validate_every": 2, "average": 2}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""What Python tells an audit hook of; it names both kinds of rename, and both of unlink, alike."""
NEVER_CALLED, WENT_ON, REFUSED, NOTHING_TO_CUT = 0, 3, 4, 5


class Disk:
    """Counts the calls of this process that change the disk, and at one of them lets a fault happen.

    Args:
        number: of that call, from 1.
        fault: what happens then; called with the kind of the call and its file.
    """

    def __init__(self, number, fault):
        self.number, self.fault, self.count = number, fault, 0
        fsync, save_file = os.fsync, checkpoints.save_file
        os.fsync = lambda handle: (self.call("fsync", ""), fsync(handle))[1]
        checkpoints.save_file = lambda tensors, path: (self.call("open", path), save_file(tensors, path))[1]
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.call(event, arguments[0])

    def call(self, kind, path):
        self.count += 1
        if self.count == self.number:
            self.fault(kind, path)


def killed(kind, path):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_it_writes(kind, path):
    """Let the file be opened, and the kernel kill the process when it has written three bytes."""
    if kind != "open":
        os._exit(NOTHING_TO_CUT)
    limit_size(path)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def too_large(kind, path):
    """Let the file be opened, and the kernel refuse what goes beyond three bytes, here and in later files."""
    if kind != "open":
        os._exit(NOTHING_TO_CUT)
    limit_size(path)


def limit_size(path):
    appended = Path(path).stat().st_size if Path(path).name == "metrics.jsonl" else 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (appended + 3, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full(kind, path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(kind, path):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


ENDS = {
    killed: {NEVER_CALLED, -signal.SIGKILL},
    killed_while_it_writes: {NEVER_CALLED, NOTHING_TO_CUT, -signal.SIGXFSZ},
    full: {NEVER_CALLED, WENT_ON, REFUSED},
    broken: {NEVER_CALLED, WENT_ON, REFUSED},
    too_large: {NEVER_CALLED, NOTHING_TO_CUT, WENT_ON, REFUSED},
}
"""How a child may end: an error in clearing away what is in nobody's way is no reason to stop."""


def child_trains(number, fault, config, folder, **options):
    """Train in a child whose disk has a fault; how the child ended."""
    def work():
        disk = Disk(number, fault)
        try:
            train(config, folder, quiet=True, **options)
        except RunError as error:
            assert ": cannot " in str(error), error
            os._exit(REFUSED)
        os._exit(WENT_ON if disk.count >= number else NEVER_CALLED)

    return ended(fork(work))


# --- the trainings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the text, and runs at several moments of one training."""
    folder = tmp_path_factory.mktemp("faults")
    write_reversal(folder)
    train(config_of(folder), folder / "whole", quiet=True)
    train(config_of(folder, steps=4), folder / "begun", quiet=True)
    shutil.copytree(folder / "begun", folder / "damaged")
    os.truncate(folder / "damaged" / "checkpoints" / "step-00000004" / "state.json", 9)
    (folder / "new").mkdir()
    return folder


def config_of(folder, **changes):
    return make_config(folder, "fixed-elman", **SETTINGS | changes)


def outcome(folder):
    """The losses of all updates, and the files of the last checkpoint and of the average."""
    run = Run.open(folder)
    files = [path for checkpoint in (run.checkpoints()[-1], run.average_path) for path in checkpoint.glob("*.safe*")]
    return ([(row["kind"], row["step"], row["loss"]) for row in run.metrics()],
            {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files})


def check(place, folder, options):
    """What bears a checkpoint's name is whole; the same command ends as the whole training, and nothing lies about."""
    run = Run(folder, config_of(place))
    for path in [*run.checkpoints(), *folder.glob("checkpoints/average")]:
        if (folder.name, path.name) != ("damaged", "step-00000004"):
            verify(path)
    if run.config_file.exists() or folder.name != "new":
        Run.open(folder)
    if folder.name == "begun":
        assert run.checkpoints()[-1].name in ("step-00000004", "step-00000006") and len(run.checkpoints()) >= 2
    train(run.config, folder, quiet=True, **options)
    assert outcome(folder) == outcome(place / "whole")
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == [folder / LOCK]


TRAININGS = {"new": {}, "begun": {}, "damaged": {}, "fresh": {"fresh": True, "force": True}}
FAULTS = (killed, killed_while_it_writes, full, broken, too_large)
EVERY = [pytest.param(name, fault, id=f"{name}-{fault.__name__}",
                      marks=pytest.mark.slow if name == "begun" else pytest.mark.proof)
         for name in TRAININGS for fault in FAULTS]


@pytest.mark.parametrize("name, fault", EVERY)
def test_every_call(name, fault, place, tmp_path):
    ends = []
    for number in itertools.count(1):
        folder = tmp_path / name
        shutil.copytree(place / ("begun" if name == "fresh" else name), folder)
        ends.append(child_trains(number, fault, config_of(place), folder, **TRAININGS[name]))
        assert ends[-1] in ENDS[fault], f"call {number} ended with {ends[-1]}"
        if ends[-1] == NEVER_CALLED:
            break
        if ends[-1] != NOTHING_TO_CUT:
            check(place, folder, TRAININGS[name])
        shutil.rmtree(folder)
    assert sum(end not in (NEVER_CALLED, NOTHING_TO_CUT) for end in ends) > 10


CALLS = "write,pwrite64,writev,fsync,fdatasync,ftruncate,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat"


def child_trains_under_strace(inject, config, folder):
    """Train in a child of whose system calls strace alters one; how the child ended, and the calls it made."""
    ready, go = os.pipe()

    def work():
        os.read(ready, 1)
        try:
            train(config, folder, quiet=True)
        except RunError as error:
            assert ": cannot " in str(error), error
            os._exit(REFUSED)
        os._exit(WENT_ON)

    child = fork(work)
    strace = subprocess.Popen(["strace", "-f", "-p", str(child), "-e", f"trace={CALLS}", *inject],
                              stderr=subprocess.PIPE, text=True)
    attached = strace.stderr.readline()
    os.write(go, b"!" * (attached != ""))
    if "attached" not in attached:
        os.kill(child, signal.SIGKILL)
        ended(child)
        pytest.skip(f"strace may not attach here: {attached}")
    lines = strace.stderr.read().splitlines()
    strace.wait()
    return ended(child), [line.split("(")[0].split()[-1] for line in lines if "(" in line]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("fault, ends", [("signal=SIGKILL", {-signal.SIGKILL}), ("error=ENOSPC", {REFUSED, WENT_ON}),
                                         ("error=EIO", {REFUSED, WENT_ON})])
def test_every_system_call(fault, ends, place, tmp_path):
    """The same as the operating system sees it: safetensors writes by itself, where Python does not look on."""
    folder = tmp_path / "begun"
    shutil.copytree(place / "begun", folder)
    end, calls = child_trains_under_strace([], config_of(place), folder)
    assert end == WENT_ON and len(calls) > 50 and {"write", "fsync", "rename", "unlinkat", "rmdir"} <= set(calls)
    for call, number in [(call, 1 + calls[:before].count(call)) for before, call in enumerate(calls)]:
        shutil.rmtree(folder)
        shutil.copytree(place / "begun", folder)
        inject = f"inject={call}:{fault}:when={number}"
        assert child_trains_under_strace(["-e", inject], config_of(place), folder)[0] in ends, inject
        check(place, folder, {})


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of a size in bytes, or changes the size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size):
        options = f"size={size}" + (",remount" if disk.is_mount() else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], capture_output=True,
                              text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr}")
        return disk

    yield resize
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # the tensors of a checkpoint are its mapped file


@pytest.mark.proof
@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_disk_that_is_really_full(place, small_disk):
    """With one page more of room each time, until it is enough."""
    refused = 0
    folder = small_disk(2**24) / "begun"
    for pages in itertools.count():
        small_disk(2**24)
        shutil.copytree(place / "begun", folder)
        gc.collect()  # a deleted file that is still mapped would give its room back in the middle of a training
        small_disk(shutil.disk_usage(folder).used + pages * resource.getpagesize())
        try:
            train(config_of(place), folder, quiet=True)
            break
        except RunError as error:
            assert "cannot be written: " in str(error) and "No space left on device" in str(error)
        refused += 1
        small_disk(2**24)
        check(place, folder, {})
        shutil.rmtree(folder)
    assert refused > 3


# --- bits that flip, files cut short


def damage(path, draw):
    """Flip a bit of one of a checkpoint's files, or cut it short; the file."""
    file = draw.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    if draw.random() < 0.2:
        data = data[: draw.randrange(len(data))]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return file


def test_250_damages_are_all_found_and_the_checkpoint_before_is_taken(place, tmp_path):
    folder, draw, damaged = tmp_path / "run", random.Random(1), []
    shutil.copytree(place / "begun", folder)
    trainer, said = trainer_of(config_of(place), folder)
    older, newest = trainer.run.checkpoints()
    for _ in range(250):
        shutil.copytree(newest, tmp_path / "kept")
        damaged.append(damage(newest, draw))
        said.seek(0)
        said.truncate()
        trainer.resume()
        assert trainer.standing.step == 2
        warning, going_on = said.getvalue().split("\n", 1)
        assert warning.startswith(f"Warning: {damaged[-1]}: ") and f"going on from {older}: step 2" in going_on
        shutil.rmtree(newest.with_name(f"damaged-{newest.name}"))
        (tmp_path / "kept").rename(newest)
    assert {file.name for file in damaged} == {path.name for path in newest.iterdir()}
    trainer.resume()
    assert trainer.standing.step == 4


# --- kills at given updates, and a clock that goes back


class Killer(Reporter):
    """Kills its own process after an update, or when it is to say something."""

    def __init__(self, config, at):
        super().__init__(config, quiet=True)
        self.at = at

    def step(self, step):
        self.kill_if(step == self.at)

    def say(self, line):
        self.kill_if(isinstance(self.at, str) and line.startswith(self.at))

    def kill_if(self, now):
        if now:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_at_the_edges(place, tmp_path):
    """Before the first update, after it, at the ends of epochs, five times in one, after the last, and at the end."""
    tokens, pieces = 48, 2
    order = Order(Corpus(place / "whole" / "data"), tokens, 1, pieces)
    first, second = (sum(map(order.updates, range(epochs))) for epochs in (1, 2))
    assert second - first > 5, "five kills in one epoch"
    config = config_of(place, steps=second + 2, batch_tokens=tokens, accumulate=pieces, validate_every=4)
    train(config, tmp_path / "whole", quiet=True)
    for at in ("model:", 1, first, *range(first + 1, first + 6), second, second + 2, "average of", "done:"):
        child = fork(lambda at=at: train(config, tmp_path / "parts", reporter=Killer(config.train, at)))
        assert ended(child) == -signal.SIGKILL, at
    train(config, tmp_path / "parts", quiet=True)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_the_script_that_kills():
    script = Path(__file__).parent.parent / "benchmarks" / "kills.py"
    done = subprocess.run([sys.executable, str(script), "--kills", "3", "--json"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] and found["validations_equal"] and found["losses_equal"] == found["updates"] == 48
    assert found["kills"] == sum(found[f"kills_in_{moment}"] for moment in ("start", "training", "save")) == 3
    assert found["sha256_killed"] == found["sha256_left_alone"]


def test_a_clock_that_goes_back_does_no_harm(place, tmp_path, monkeypatch):
    folder = tmp_path / "begun"
    shutil.copytree(place / "begun", folder)
    for age, file in enumerate(sorted(folder.rglob("*"))):  # the newest checkpoint is the oldest by the clock
        os.utime(file, (10**9 - age, 10**9 - age))
    clock = itertools.count(0, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    train(config_of(place), folder, quiet=True)
    assert outcome(folder) == outcome(place / "whole")
    seconds = [row["seconds"] for row in Run.open(folder).metrics()]
    assert seconds == sorted(seconds) and seconds[0] > 0
