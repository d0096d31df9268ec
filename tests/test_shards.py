"""The prepared corpus: what is on disk, when it is made again, and what happens to it when things go wrong."""

import contextlib
import errno
import hashlib
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from regard.config import TokenizerConfig, parse_config, write_config
from regard.data import folder, shards
from regard.data.shards import Corpus, prepare
from regard.errors import CheckpointError, ConfigError, DataError, RunError
from regard.text.tokenizer import Tokenizer

SOURCES = ["a dog runs", "", "a cat sat on the mat", "two men", "birds"]
TARGETS = ["ein Hund läuft", "leer", "eine Katze saß auf der Matte", "zwei Männer", "Vögel"]


@pytest.fixture
def place(tmp_path):
    """A folder with text in text/, and a run to be."""
    (tmp_path / "text").mkdir()
    write(tmp_path, SOURCES, TARGETS)
    return tmp_path


def write(place, sources, targets):
    (place / "text" / "train.en").write_text("".join(line + "\n" for line in sources))
    (place / "text" / "train.de").write_text("".join(line + "\n" for line in targets))


def config(place, train=None, tokenizer=None, **data):
    return parse_config({
        "data": {"root": str(place / "text"), "train": train or [{"source": "train.en", "target": "train.de"}],
                 "valid": {"source": "val.en", "target": "val.de"}, **data},
        "tokenizer": {"kind": "char", "size": 100} | (tokenizer or {}),
        "model": {"kind": "transformer"},
    }, "test", Path())


def test_two_that_share_a_folder_make_it_once(place, monkeypatch):
    made, said, build = [], [], shards._build
    first_began = threading.Event()

    def slowly(*given):
        made.append(threading.current_thread().name)
        first_began.set()
        while not any("another training prepares it" in line for line in said):
            time.sleep(0.01)
        build(*given)

    monkeypatch.setattr(shards, "_build", slowly)
    shared = config(place, prepared="../prepared")
    first = threading.Thread(target=prepare, args=(shared, place / "run"), name="first")
    first.start()
    assert first_began.wait(10)
    second = prepare(shared, place / "other", said.append)
    first.join()
    assert made == ["first"] and len(second.train) == 4
    (place / "prepared").parent.chmod(0o555)
    assert len(prepare(shared, place / "run").train) == 4  # what is there can be read where nothing can be written
    (place / "prepared").parent.chmod(0o755)


def started(place):
    """Make it look as if the run had trained."""
    (place / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)


def files(folder):
    """Every file's bytes and time, to see whether any was touched."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_ids_on_disk_are_the_text(place):
    tokenizers, train = prepare(config(place), place / "run")
    kept = [0, 2, 3, 4]
    assert len(train) == 4
    assert tokenizers.source.decode([train.source(i) for i in range(4)]) == [SOURCES[i] for i in kept]
    assert tokenizers.target.decode([train.target(i) for i in range(4)]) == [TARGETS[i] for i in kept]
    assert train.source_lengths.tolist() == [len(SOURCES[i]) for i in kept]
    assert train.target_lengths.tolist() == [len(TARGETS[i]) for i in kept]
    assert train.tokens == (train.source_lengths.sum(), train.target_lengths.sum())
    assert train.source(1).dtype == np.int64
    assert train.source(-1).tolist() == train.source(3).tolist()
    with pytest.raises(IndexError):
        train.source(4)


def test_nothing_is_read_into_memory(place):
    _, train = prepare(config(place), place / "run")
    for array in (train._source_ids, train._source_offsets, train._target_ids, train._target_offsets):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_as_few_bytes_as_they_can(tmp_path, size, dtype):
    side = shards._Side(size)
    side.add([[size - 1, 7], []])
    side.save(tmp_path, "source")
    ids = np.load(tmp_path / "source.ids.npy", allow_pickle=False)
    assert ids.dtype == dtype and ids.tolist() == [size - 1, 7]
    assert np.load(tmp_path / "source.offsets.npy").tolist() == [0, 2, 2]


def test_manifest_says_what_is_there(place):
    said = []
    prepare(config(place, max_tokens=25), place / "run", said.append)
    manifest = json.loads((place / "run" / "data" / "manifest.json").read_text())
    assert manifest["pairs"] == 3
    assert manifest["source_tokens"] == sum(len(SOURCES[i]) for i in (0, 3, 4))
    assert manifest["left_out"] == {
        "counts": {"an empty side": 1, "a side longer than 25 tokens": 1},
        "places": {"an empty side": ["train.en:2"], "a side longer than 25 tokens": ["train.en:3"]},
    }
    data = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (place / "run" / "data").iterdir()}
    assert manifest["files"] == {name: digest for name, digest in data.items() if name != "manifest.json"}
    assert said == [
        "train.en + train.de: 4 pairs; 1 left out: an empty side (train.en:2)",
        "tokenizer: char 31, shared, from 8 lines",
        "1 left out: an empty side (train.en:2); 1 left out: a side longer than 25 tokens (train.en:3)",
        f"data: 3 pairs, 22 source and 30 target tokens, in {place / 'run' / 'data'}",
    ]


@pytest.mark.parametrize(("most", "left"), [(27, 4), (26, 3), (10, 3), (9, 2), (8, 1)])
def test_max_tokens_is_the_longest_side_kept(place, most, left):
    """The longer sides have 10, 27, 9 and 5 characters: a limit keeps those that reach it."""
    write(place, ["a dog runs", "a cat sat on the mat", "two men", "birds"], ["x" * 9, "x" * 27, "x" * 9, "x"])
    assert len(prepare(config(place, max_tokens=most), place / "run").train) == left


def test_a_vocabulary_smaller_than_asked_is_said(place):
    said = []
    prepare(config(place, tokenizer={"kind": "bpe", "size": 5000, "shared": False}), place / "run", said.append)
    source = Tokenizer.load(place / "run" / "tokenizer" / "source.json")
    assert f"tokenizer: bpe {source.size}, source, from 4 lines; they yield no more, 5,000 were asked for" in said


def test_several_corpora_follow_one_another(place, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 1)
    (place / "text" / "more.tsv").write_text("\tx\na fish\tein Fisch\na very long line\tx\n")
    both = [{"source": "train.en", "target": "train.de"}, {"pairs": "more.tsv"}]
    tokenizers, train = prepare(config(place, train=both, max_tokens=15), place / "run")
    kept = tokenizers.source.decode([train.source(i) for i in range(len(train))])
    assert kept == ["a dog runs", "two men", "birds", "a fish"]
    assert train.manifest["left_out"]["places"] == {
        "an empty side": ["train.en:2", "more.tsv:1"], "a side longer than 15 tokens": ["train.en:3", "more.tsv:3"]}


BPE = {"kind": "bpe", "size": 60}
DRAWN = BPE | {"dropout": 0.3, "samples": 3}


def test_each_sample_holds_all_pairs_in_other_segmentations(place, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 2)
    said = []
    tokenizers, train = prepare(config(place, tokenizer=DRAWN), place / "run", said.append)
    kept = [0, 2, 3, 4]
    assert len(train) == 4 and train.samples == 3 and len(train.source_lengths) == len(train.target_lengths) == 12
    for side, lines in (("source", SOURCES), ("target", TARGETS)):
        rows = [getattr(train, side)(row).tolist() for row in range(12)]
        assert getattr(tokenizers, side).decode(rows) == 3 * [lines[i] for i in kept]
        assert len({str(rows[4 * sample : 4 * sample + 4]) for sample in range(3)}) == 3
    assert train.tokens == (train.source_lengths.sum(), train.target_lengths.sum())
    source, target = train.tokens
    facts = {"pairs": 4, "corpora": [4], "samples": 3, "source_tokens": source, "target_tokens": target}
    assert train.manifest | facts == train.manifest
    assert said[2:] == [
        "tokenizer: drawing 3 segmentations of each pair, in which each merge is left out with probability 0.3 …",
        "1 left out: an empty side (train.en:2)",
        f"data: 4 pairs, 3 segmentations of each, {train.tokens[0]} source and {train.tokens[1]} target tokens, in "
        f"{place / 'run' / 'data'}"]


def test_the_same_text_is_drawn_the_same_in_each_run_and_otherwise_on_each_side(place):
    write(place, SOURCES, SOURCES)
    made = [prepare(config(place, tokenizer=DRAWN), place / name).train.manifest for name in ("run", "other")]
    assert made[0] == made[1]
    assert made[0]["files"]["source.ids.npy"] != made[0]["files"]["target.ids.npy"]


def test_the_plain_segmentation_says_what_is_left_out_and_stands_for_what_grows_too_long(place):
    """The longer sides have 27 characters at most, and more tokens than 8 where nearly all merges are left out."""
    plain = prepare(config(place, tokenizer=BPE, max_tokens=8), place / "plain").train
    train = prepare(config(place, tokenizer=BPE | {"dropout": 0.99, "samples": 2}, max_tokens=8), place / "run").train
    assert len(train) == len(plain) == 3 and train.manifest["left_out"] == plain.manifest["left_out"]
    for side in ("source", "target"):
        for row in range(6):
            own, other = getattr(train, side)(row).tolist(), getattr(plain, side)(row % 3).tolist()
            assert own == other or len(other) < len(own) <= 8
    assert train.tokens != (2 * plain.tokens[0], 2 * plain.tokens[1])


def test_what_was_prepared_before_there_was_dropout_is_not_made_anew(place):
    contents = [[hashlib.sha256((place / "text" / name).read_bytes()).hexdigest() for name in ("train.en", "train.de")]]
    settings = {"format": 1, "max_tokens": 256, "tokenizer": BPE | {"shared": True, "source": None, "target": None}}
    manifest = prepare(config(place, tokenizer=BPE), place / "run").train.manifest
    assert manifest["fingerprint"] == hashlib.sha256(
        json.dumps([contents, settings], sort_keys=True).encode()).hexdigest()
    assert "samples" not in manifest


@pytest.mark.parametrize("change", [{"dropout": 0.2}, {"samples": 4}, {"dropout": 0.0, "samples": 16}])
def test_other_dropout_makes_it_anew_and_not_once_a_run_has_begun(place, change):
    first = prepare(config(place, tokenizer=DRAWN), place / "run").train.manifest
    other = prepare(config(place, tokenizer=DRAWN | change), place / "other").train.manifest
    assert other["fingerprint"] != first["fingerprint"] and other["files"] != first["files"]
    started(place)
    with pytest.raises(RunError, match="the tokenizer settings have changed since this run began"):
        prepare(config(place, tokenizer=DRAWN | change), place / "run")


def test_taken_tokenizers_serve_dropout(place):
    prepare(config(place, tokenizer=BPE), place / "base")
    write_config(config(place, tokenizer=BPE), place / "base" / "config.toml")
    taken = {"take_from": str(place / "base"), "dropout": 0.3, "samples": 3}
    given = parse_config({**config(place).model_dump(exclude={"tokenizer", "model"}), "tokenizer": taken,
                          "model": {"kind": "transformer"}}, "test", Path())
    train = prepare(given, place / "run").train
    files = prepare(config(place, tokenizer=DRAWN), place / "other").train.manifest["files"]
    assert train.samples == 3 and train.manifest["files"] == files
    plain = given.model_copy(update={"tokenizer": TokenizerConfig(take_from=place / "base")})
    assert prepare(plain, place / "run").train.samples == 1


@pytest.mark.parametrize("samples", [0, 5, -3, "3", True, None])
def test_samples_that_the_rows_do_not_have_are_named(place, samples):
    prepare(config(place, tokenizer=DRAWN), place / "run")
    path = place / "run" / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"samples": samples}))
    with pytest.raises(DataError, match=r"manifest.json: its samples are .*, expected a number that divides 12, its"):
        prepare(config(place, tokenizer=DRAWN), place / "run")


def test_up_to_date_is_left_alone(place):
    prepare(config(place), place / "run")
    before = files(place / "run")
    said = []
    prepare(config(place), place / "run", said.append)
    assert files(place / "run") == before
    assert len(said) == 1 and said[0].startswith("data: 4 pairs")


@pytest.mark.parametrize("change", [{"tokenizer": {"size": 12}}, {"tokenizer": {"kind": "space"}}, {"max_tokens": 9},
                                    {"train": [{"source": "train.de", "target": "train.en"}]}])
def test_changed_settings_make_it_anew(place, change):
    prepare(config(place), place / "run")
    old = json.loads((place / "run" / "data" / "manifest.json").read_text())
    prepared = prepare(config(place, **change), place / "run")
    assert prepared.train.manifest["fingerprint"] != old["fingerprint"]
    assert prepared.train.manifest["files"] != old["files"]
    assert (place / "run" / "tokenizer" / "shared.json").read_bytes() == \
        (place / "run" / "data" / "shared.json").read_bytes()
    assert sorted(path.name for path in (place / "run").iterdir()) == ["data", "tokenizer"]


def test_changed_text_makes_it_anew_and_moved_text_does_not(place):
    prepare(config(place), place / "run")
    shutil.copytree(place / "text", place / "elsewhere" / "text")
    before = files(place / "run")
    prepare(config(place / "elsewhere"), place / "run")
    assert files(place / "run") == before
    write(place, [*SOURCES, "new"], [*TARGETS, "neu"])
    assert len(prepare(config(place), place / "run").train) == 5


def test_settings_beside_the_point_change_nothing(place):
    prepare(config(place), place / "run")
    before = files(place / "run")
    prepare(config(place, valid={"pairs": "other.tsv"}), place / "run")
    assert files(place / "run") == before


@pytest.mark.parametrize("change", [{"tokenizer": {"size": 12}}, {"max_tokens": 9}])
def test_a_run_that_has_begun_refuses_other_settings(place, change):
    prepare(config(place), place / "run")
    started(place)
    before = files(place / "run")
    with pytest.raises(RunError, match=r"run: the training data or the tokenizer settings have changed since this run "
                                       r"began\. Put them back .* --fresh or another --out"):
        prepare(config(place, **change), place / "run")
    assert files(place / "run") == before


def test_a_run_that_has_begun_refuses_other_text(place):
    prepare(config(place), place / "run")
    started(place)
    write(place, [*SOURCES, "new"], [*TARGETS, "neu"])
    with pytest.raises(RunError, match="have changed since this run began"):
        prepare(config(place), place / "run")


def test_a_run_that_has_begun_gets_its_deleted_data_back(place, monkeypatch):
    first = prepare(config(place, tokenizer={"kind": "bpe"}), place / "run").train.manifest
    started(place)
    shutil.rmtree(place / "run" / "data")
    monkeypatch.setattr(Tokenizer, "train", None)
    assert prepare(config(place, tokenizer={"kind": "bpe"}), place / "run").train.manifest == first


def test_a_run_that_has_begun_needs_its_tokenizer(place):
    prepare(config(place), place / "run")
    started(place)
    shared = place / "run" / "tokenizer" / "shared.json"
    content = shared.read_text()
    shared.write_text(content.replace('"a"', '"A"'))
    with pytest.raises(RunError, match=r"run/tokenizer: not the tokenizer that the prepared corpus was made with"):
        prepare(config(place), place / "run")
    shared.write_text(content[:50])
    with pytest.raises(CheckpointError, match=r"tokenizer/shared.json: not a tokenizer"):
        prepare(config(place), place / "run")
    shutil.rmtree(place / "run" / "tokenizer")
    with pytest.raises(RunError, match=r"run/tokenizer: missing, and the run has begun with it"):
        prepare(config(place), place / "run")


def test_an_altered_tokenizer_of_a_run_not_begun_is_mended(place):
    prepare(config(place), place / "run")
    shared = place / "run" / "tokenizer" / "shared.json"
    content = shared.read_bytes()
    shared.write_text("{}")
    prepare(config(place), place / "run")
    assert shared.read_bytes() == content


def test_two_runs_share_one_prepared_corpus(place):
    first = prepare(config(place, prepared="../prepared"), place / "run")
    before = files(place / "prepared")
    second = prepare(config(place, prepared="../prepared"), place / "other")
    assert files(place / "prepared") == before
    assert not (place / "run" / "data").exists()
    assert first.train.manifest == second.train.manifest
    assert (place / "other" / "tokenizer" / "shared.json").exists()


def test_a_linked_data_folder_is_followed(place):
    (place / "disk").mkdir()
    (place / "run").mkdir()
    (place / "run" / "data").symlink_to(place / "disk")
    prepare(config(place), place / "run")
    assert (place / "run" / "data").is_symlink()
    assert (place / "disk" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["source.ids.npy", "source.offsets.npy", "target.ids.npy", "target.offsets.npy",
                                  "shared.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damaged_shards_are_named(place, name, damage):
    prepare(config(place), place / "run")
    path = place / "run" / "data" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content[:-9] if damage == "cut" else content)
    with pytest.raises(DataError, match=rf"{path}: .*It is not as it was written\. .* delete the folder {path.parent}"):
        prepare(config(place), place / "run")
    shutil.rmtree(path.parent)
    assert len(prepare(config(place), place / "run").train) == 4


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "5", '{"fingerprint": "x"}',
                                     '{"fingerprint": "x", "files": []}',
                                     '{"fingerprint": "x", "files": {"../../text/train.en": "0"}}'])
def test_damaged_manifest_is_named(place, content):
    prepare(config(place), place / "run")
    (place / "run" / "data" / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"data/manifest.json: not a manifest of ours"):
        prepare(config(place), place / "run")
    assert (place / "text" / "train.en").exists()


def test_a_manifest_without_the_arrays_is_refused(place):
    prepare(config(place), place / "run")
    manifest = place / "run" / "data" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {}}))
    (place / "run" / "data" / "source.ids.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"data/source.ids.npy: .*not as it was written"):
        Corpus(place / "run" / "data")


def test_a_pickled_array_is_refused(place):
    prepare(config(place), place / "run")
    manifest = place / "run" / "data" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {}}))
    np.save(place / "run" / "data" / "source.ids.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"data/source.ids.npy: "):
        Corpus(place / "run" / "data")


def test_no_corpus(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: no prepared corpus here\. `regard prepare` or"):
        Corpus(tmp_path)


def test_no_pair_left(place):
    with pytest.raises(DataError, match=r"no pair to train on: 1 left out: an empty side \(train.en:2\); 4 left out: a "
                                        r"side longer than 2 tokens .*Raise data.max_tokens\.$"):
        prepare(config(place, max_tokens=2), place / "run")
    write(place, ["", "a"], ["b", ""])
    with pytest.raises(DataError, match=r"no pair to train on: train.en \+ train.de: 0 pairs; 2 left out"):
        prepare(config(place), place / "run")
    assert not (place / "run").exists()


def test_text_that_is_missing_or_does_not_match(place):
    prepare(config(place), place / "run")
    write(place, SOURCES, TARGETS[:-1])
    with pytest.raises(DataError, match=r"train.de has 4 lines and .*train.en has 5"):
        prepare(config(place), place / "run")
    (place / "text" / "train.de").unlink()
    with pytest.raises(DataError, match=r"text/train.de: cannot read it: No such file .*--set data.root=FOLDER"):
        prepare(config(place), place / "run")
    assert len(Corpus(place / "run" / "data")) == 4


def test_size_too_small_for_unigram_writes_nothing(place):
    with pytest.raises(ConfigError, match="size = 8 is too small for unigram"):
        prepare(config(place, tokenizer={"kind": "unigram", "size": 8}), place / "run")
    assert not (place / "run").exists()


def test_a_folder_of_other_files_is_never_touched(place):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years of work")
    for _ in range(2):
        with pytest.raises(RunError, match=r"mine: holds files that Regard did not write \(thesis.txt\)\. Expected"):
            prepare(config(place, prepared="../mine"), place / "run")
    assert sorted(path.name for path in place.iterdir()) == ["mine", "text"]
    prepare(config(place), place / "run")
    (place / "run" / "data" / "notes.txt").write_text("mine too")
    with pytest.raises(RunError, match=r"run/data: holds files that Regard did not write \(notes.txt\)"):
        prepare(config(place, max_tokens=9), place / "run")
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]
    assert len(Corpus(place / "run" / "data")) == 4


CALLS = ["mkdir", "save", "write_text", "_sync", "replace", "unlink"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError("12 wanted, 0 written")])
def test_a_disk_that_fails_leaves_the_old_or_nothing(place, monkeypatch, call, error):
    prepare(config(place), place / "run")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr({"save": np, "_sync": folder}.get(call, Path), call, fail)
        with pytest.raises(RunError, match=rf"run/data: cannot write it: .*{error.args[-1]}\. Make room.*--out"):
            prepare(config(place, max_tokens=9), place / "run")
    assert sorted(path.name for path in (place / "run").iterdir())[-2:] == ["data", "tokenizer"]
    if call in ("mkdir", "save", "write_text", "_sync", "unlink"):
        assert len(Corpus(place / "run" / "data")) == 4
    assert len(prepare(config(place, max_tokens=9), place / "run").train) == 1
    assert sorted(path.name for path in (place / "run").iterdir()) == ["data", "tokenizer"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def test_a_kill_at_any_call_is_healed_by_the_next_start(place, monkeypatch):
    """Killed at its nth write, fsync, rename or unlink, for every n, a rebuild is done in full by the next start."""
    calls = 0

    def deadly(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Killed
            return function(*arguments, **options)
        return call

    for moment in range(100):
        calls = 0
        prepare(config(place), place / "run")
        with monkeypatch.context() as patch:
            for owner, name in ((np, "save"), (folder, "_sync"), (Path, "replace"), (Path, "unlink"),
                                (Path, "write_text"), (shutil, "rmtree")):
                patch.setattr(owner, name, deadly(getattr(owner, name)))
            with contextlib.suppress(Killed):
                prepare(config(place, max_tokens=9), place / "run")
        assert len(prepare(config(place, max_tokens=9), place / "run").train) == 1
        assert sorted(path.name for path in (place / "run").iterdir()) == ["data", "tokenizer"]
        if calls <= moment:
            break
    assert calls > 20
