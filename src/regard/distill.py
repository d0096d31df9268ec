"""Sequence-level knowledge distillation (Kim and Rush 2016): a teacher rewrites the targets that a student learns from.

    FOLDER/distill.json   what is being made, and how far it has come; written whole after each chunk
    FOLDER/1-train.de     the first training corpus: line n is the teacher's translation of source line n
    FOLDER/2-more.tsv     one that is a file of pairs: source TAB translation
    FOLDER/config.toml    the config with these in the place of the targets; written last

A chunk is on the disk before distill.json counts it in. What was written after that, before a kill, is cut off again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from regard.config import Config, CorpusConfig, write_config
from regard.engines.converted import about
from regard.errors import ConfigError, RunError
from regard.text.corpus import PLACES_NAMED, TAB, each_pair, read_pairs
from regard.training.checkpoint import MANIFEST, UNFINISHED, disk_errors, flush, read_json, write_whole
from regard.training.lock import lock
from regard.training.run import LOCK, Run
from regard.translator import Translation, Translator

ABOUT = "distill.json"
FORMAT = 1
CHUNK = 1000
"""Lines that are translated and written at a time."""

Choose = Callable[[Sequence[str], str], str]
"""Picks one of several texts, best first, given the reference."""


@dataclass
class Part:
    """One training corpus on its way.

    Attributes:
        file: what it becomes, in the folder.
        lines: of the source.
        done, bytes: lines that are written, and how long the file is with them.
        kept: lines that keep their reference, for they could not be translated; places: the first of them, and why.
    """

    file: str
    lines: int
    done: int = 0
    bytes: int = 0
    kept: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Distilled:
    """What `distill` made.

    Attributes:
        config: to train the student with.
        parts: the corpora.
        seconds: of this sitting.
        engine: that translated; empty where nothing was left to do.
    """

    config: Path
    parts: list[Part]
    seconds: float
    engine: str


def distill(translator: Translator, teachers: Sequence[str], config: Config, out: Path, *,
            beam: int | None = None, closest: str | None = None, say: Callable[[str], object] = lambda line: None,
            progress: Callable[[int, int], object] = lambda done, total: None) -> Distilled:
    """Have a teacher translate the sources of all training corpora, or go on where that was interrupted.

    Args:
        translator: the teacher; its own [decode] says how it searches.
        teachers: what it was loaded from, by `digest_of`: one that is another now is refused.
        config: whose training corpora are translated. Its model and settings are the student's.
        out: the folder; new, empty, or one in which this was begun before.
        beam: hypotheses kept; None: as the teacher's [decode] says.
        closest: "bleu" or "chrf": of all hypotheses of the beam, take the one that is closest to the reference by
            sacreBLEU's score of a sentence (Kim and Rush 2016, section 3.3); None: the best (section 3.2).
        say: told of what a person should know.
        progress: called with the lines that are done, and all there are, at the start and after each chunk.

    Raises:
        DataError: a corpus cannot be used.
        ConfigError: a setting that cannot be, or a corpus with a word alignment, which is that of the reference.
        RunError: the folder holds something else, was begun otherwise, is in use, or cannot be written.
    """
    started, out = time.monotonic(), out.resolve()
    asked: dict[str, Any] = {} if beam is None else {"beam": beam}
    _refuse(translator, config, beam, closest)
    translator.translate([], **asked)  # refuses what cannot be asked of it
    decode = {**translator.config.decode.model_dump(mode="json"), **asked}
    checked = [_checked(corpus, config.data.root) for corpus in config.data.train]
    record = {"teachers": list(teachers), "texts": [digest for _, digest in checked], "closest": closest,
              "decode": {name: value for name, value in decode.items() if name != "batch_tokens"}}
    _refuse_strangers(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock(out / LOCK, say):
        parts = _begun(out, record) or [Part(f"{number}-{_name(corpus)}", lines) for number, (corpus, (lines, _)) in
                                        enumerate(zip(config.data.train, checked, strict=True), 1)]
        _write_about(out, record, parts)
        work = _Work(translator, asked, CLOSEST[closest](config.data.bleu_tokenize), decode["beam"] if closest else 1)
        total = sum(part.lines for part in parts)
        progress(sum(part.done for part in parts), total)
        for part, corpus in zip(parts, config.data.train, strict=True):
            for _ in work.chunks(part, corpus, config.data.root, out, parts.index(part)):
                _write_about(out, record, parts)
                progress(sum(part.done for part in parts), total)
        made = out / "config.toml"
        if made.is_file():
            say(f"{made}: is there already, and stays as it is")
        else:
            write_whole(made, lambda file: write_config(_student(config, out, parts), file))
    return Distilled(made, parts, time.monotonic() - started, translator.taken if work.lines else "")


@dataclass
class _Work:
    """The translating.

    Attributes:
        translator, asked: who does it, and how.
        choose: which of the outputs is taken.
        outputs: of each line.
        lines: translated so far.
    """

    translator: Translator
    asked: dict[str, Any]
    choose: Choose
    outputs: int
    lines: int = 0

    def chunks(self, part: Part, corpus: CorpusConfig, root: Path, out: Path, number: int) -> Iterator[None]:
        """Write what is left of a corpus, stopping after each chunk; then it is on the disk, and the part knows."""
        path, pairs = out / part.file, islice(each_pair(corpus, root), part.done, None)
        if part.bytes and (not path.is_file() or path.stat().st_size < part.bytes):
            raise RunError(f"{path}: is missing or cut short: it had {part.bytes:,} bytes. Put it back, or delete the "
                           f"folder {out} and begin anew")
        part.bytes = _append(path, part.bytes, [])
        while chunk := list(islice(pairs, CHUNK)):
            lines = self.translated(chunk, part, (corpus.pairs or corpus.source or path).name, number)
            if corpus.pairs is not None:
                lines = [f"{source}{TAB}{line.replace(TAB, ' ')}" if source or line else ""
                         for (source, _), line in zip(chunk, lines, strict=True)]
            part.bytes = _append(path, part.bytes, lines)
            part.done += len(chunk)
            self.lines += len(chunk)
            yield

    def translated(self, chunk: Sequence[tuple[str, str]], part: Part, name: str, number: int) -> list[str]:
        """The new target of each pair: its reference where there is no other."""
        asked = self.asked | ({"nbest": self.outputs} if self.outputs > 1 else {})
        settings = self.translator.config.decode
        if settings.sample:  # draws follow from the seed and the line, which is counted from the chunk's first
            seed = hashlib.sha256(f"{settings.seed} {number} {part.done}".encode()).digest()
            asked["seed"] = int.from_bytes(seed[:4])
        lines = []
        found = self.translator.translate([source for source, _ in chunk], **asked)
        for line, ((source, reference), translation) in enumerate(zip(chunk, found, strict=True), part.done + 1):
            text = self.choose(_texts(translation), reference)
            if source.strip() and not text.strip():
                part.kept += 1
                if len(part.places) < PLACES_NAMED:
                    part.places.append(f"{name}:{line}: {translation.problem or 'the output is empty'}")
            lines.append(text if source.strip() and text.strip() else reference)
        return lines


def digest_of(folder: Path, checkpoint: str) -> str:
    """SHA-256 of a teacher's weights: of a run's checkpoint, or of what `regard export` wrote."""
    told = about(folder)
    if told and told["to"] == "ctranslate2":
        return hashlib.sha256(json.dumps(told["files"], sort_keys=True).encode()).hexdigest()
    return str(read_json(Run.open(folder).find(checkpoint) / MANIFEST).get("model.safetensors"))


def _refuse(translator: Translator, config: Config, beam: int | None, closest: str | None) -> None:
    """Refuse what cannot be distilled."""
    if closest not in CLOSEST:
        raise ConfigError(f'closest = "{closest}": expected {" or ".join(name for name in CLOSEST if name)}')
    width = beam or translator.config.decode.beam
    if closest and width == 1:
        raise ConfigError(f'closest = "{closest}" chooses among the hypotheses of a beam, and beam = 1 has one: give a '
                          "wider beam")
    if any(corpus.alignment is not None for corpus in config.data.train):
        raise ConfigError("[data] train: alignment links the words of the references, which the teacher's translations "
                          "do not have: leave alignment (and guided_alignment) out")


def _refuse_strangers(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier distillation."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; the translations need a folder. Choose another --out")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if ABOUT not in names and names - {LOCK, UNFINISHED + ABOUT}:
        raise RunError(f"{out}: holds other files, and no distillation made it; nothing was written. Choose another "
                       "--out")


def _begun(out: Path, record: Mapping[str, Any]) -> list[Part] | None:
    """How far the corpora of an earlier sitting are; None: there was none.

    Raises:
        RunError: it was begun with another teacher, text or search.
    """
    if not (out / ABOUT).is_file():
        return None
    told = read_json(out / ABOUT)
    if told.get("format") != FORMAT:
        raise RunError(f"{out / ABOUT}: is of format {told.get('format')}; this version reads format {FORMAT}. Update "
                       "regard, or choose another --out")
    then = told["asked"]
    differ = [f"{name} = {value!r} (was {then['decode'].get(name)!r})" for name, value in record["decode"].items()
              if then["decode"].get(name) != value]
    if then["closest"] != record["closest"]:
        differ.append(f"closest = {record['closest']!r} (was {then['closest']!r})")
    differ += [what for name, what in (("teachers", "another teacher, or another checkpoint of it"),
                                       ("texts", "other training text")) if then[name] != record[name]]
    if differ:
        raise RunError(f"{out}: was begun otherwise, and now there is {', '.join(differ)}. Put that back to go on, or "
                       "choose another --out")
    return [Part(**part) for part in told["parts"]]


def _write_about(out: Path, record: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Write down what is being made, and how far it is."""
    text = json.dumps({"format": FORMAT, "asked": record, "parts": [asdict(part) for part in parts]}, indent=1)
    write_whole(out / ABOUT, lambda file: file.write_text(text, encoding="utf-8"))


def _append(path: Path, start: int, lines: Sequence[str]) -> int:
    """Put lines on the disk in the place of all that a file holds from some byte on; returns its length."""
    with disk_errors(path):
        with path.open("ab") as file:
            file.truncate(start)
            file.write("".join(f"{line}\n" for line in lines).encode())
        flush(path)
        return path.stat().st_size


def _student(config: Config, out: Path, parts: Sequence[Part]) -> Config:
    """The config with the teacher's translations in the place of the targets, and with whole paths."""
    data = config.data

    def whole(corpus: CorpusConfig, **others: Path) -> CorpusConfig:
        paths = {name: data.root / path for name in ("source", "target", "pairs") if (path := getattr(corpus, name))}
        return corpus.model_copy(update=paths | others)

    train = [whole(corpus, **{"pairs" if corpus.pairs else "target": out / part.file})
             for corpus, part in zip(data.train, parts, strict=True)]
    changes = {"root": out, "train": train, "valid": whole(data.valid), "test": data.test and whole(data.test),
               "prepared": None}
    return config.model_copy(update={"data": data.model_copy(update=changes)})


def _name(corpus: CorpusConfig) -> str:
    path = corpus.pairs or corpus.target
    assert path is not None
    return path.name


def _checked(corpus: CorpusConfig, root: Path) -> tuple[int, str]:
    """How many pairs a corpus has, and the SHA-256 of its files, in constant memory; raises DataError."""
    try:
        lines = sum(1 for _ in each_pair(corpus, root))
        digests = []
        for path in (corpus.source, corpus.target, corpus.pairs):
            if path is not None:
                with (root / path).open("rb") as file:
                    digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    except ValueError:
        read_pairs(corpus, root)  # knows what to say
        raise
    return lines, " ".join(digests)


def _texts(translation: Translation) -> list[str]:
    """The outputs for a line, best first, each as one line."""
    return [each.text.replace("\n", " ") for each in (translation, *translation.alternatives)]


def _closest_by(metric: Any) -> Choose:
    """Take the text with the highest score against the reference; of equals, the teacher's own first."""
    def choose(texts: Sequence[str], reference: str) -> str:
        return max(texts, key=lambda text: float(metric.sentence_score(text, [reference]).score))
    return choose


def _best(tokenize: str) -> Choose:
    return lambda texts, reference: texts[0]


def _by_bleu(tokenize: str) -> Choose:
    from sacrebleu.metrics.bleu import BLEU

    return _closest_by(BLEU(tokenize=tokenize, effective_order=True))


def _by_chrf(tokenize: str) -> Choose:
    from sacrebleu.metrics.chrf import CHRF

    return _closest_by(CHRF())


CLOSEST: dict[str | None, Callable[[str], Choose]] = {None: _best, "bleu": _by_bleu, "chrf": _by_chrf}
