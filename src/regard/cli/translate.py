"""`regard translate` and `regard score`: one line out for each line in, always and in order."""

import json
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from regard.cli import options as asks
from regard.cli.options import Checkpoint, Device, Json, RunFolder, RunFolders, open_translator
from regard.cli.output import progress, results, say
from regard.errors import ConfigError, DataError

if TYPE_CHECKING:
    from regard.translator import Translation


Put = Callable[[BinaryIO, int, "Translation", str | None], None]

CHUNK, PATIENCE = 2**16, 0.05
"""Bytes that are read at once at most; seconds that lines wait for others, in all, before they are translated."""


def translate(
    runs: RunFolders,
    input: asks.Input = None, output: asks.Output = None, nbest: asks.NBest = None, as_json: asks.AsJson = False,
    token_scores: asks.TokenScores = False, tree: asks.Tree = False,
    beam: asks.Beam = None, length_penalty: asks.LengthPenalty = None, length_penalty_kind: asks.PenaltyKind = None,
    coverage_penalty: asks.CoveragePenalty = None, groups: asks.Groups = None, diversity: asks.Diversity = None,
    sample: asks.Sample = None, temperature: asks.Temperature = None, top_k: asks.TopK = None, top_p: asks.TopP = None,
    seed: asks.Seed = None,
    min_length: asks.MinLength = None, max_length: asks.MaxLength = None, min_ratio: asks.MinRatio = None,
    max_ratio: asks.MaxRatio = None, max_extra: asks.MaxExtra = None,
    prefix: asks.Prefix = None, prefix_file: asks.PrefixFile = None, force: asks.Force = None,
    force_file: asks.ForceFile = None, ban: asks.Ban = None, no_repeat_ngram: asks.NoRepeat = None,
    replace_unknown: asks.ReplaceUnknown = None,
    engine: asks.Engine = "auto", precision: asks.Precision = None, checkpoint: Checkpoint = "best",
    device: Device = "auto", batch_tokens: asks.BatchTokens = None, batch_sentences: asks.BatchSentences = None,
) -> None:
    """Translate text, one line out for each line in.

    The order is kept, and only a newline ends a line. At most 4,096 lines are read ahead, and lines that come slowly
    are answered as they come. A line that could not be translated comes out empty, and standard error tells its
    number and why. FILE of --output is written under another name and appears, whole, when all is done. With --nbest 2
    and more, each translation is a line of its own: line number, score and text, with tabs between. Several RUNs that
    share their vocabularies answer as one, by the mean of their probabilities.

    The engine ctranslate2 (an extra) converts a run once, checks that it translates as the run does, and keeps that in
    RUN/engines. Standard error tells which engine it was. RUN may be what `regard export` made.

    What is not said here, the [decode] of the first RUN says. A phrase counts as the tokenizer writes it; a line whose
    prefix or phrases cannot be had comes out empty, with its reason.

    \b
    Examples:
      echo "A dog runs." | regard translate runs/en-de
      regard translate runs/en-de --input test.en --output test.de --beam 5
      regard translate runs/en-de runs/en-de-2 --nbest 5 --json < test.en
      regard translate runs/en-de --sample --top-p 0.9 --seed 7 < test.en
      regard translate runs/en-de --engine ctranslate2 --precision int8 < test.en
      regard translate runs/en-de --prefix "Ein" --force "Hund" --ban "Katze" < test.en
    """
    _refuse(prefix, prefix_file, force, force_file, token_scores, tree, as_json)
    translator = open_translator(runs, checkpoint, device, engine, precision)
    unreadable: dict[int, str] = {}
    put = _put_json if as_json else _put_nbest if (nbest or 1) > 1 else _put_text
    drawn = output is not None or not sys.stdout.isatty()
    started = time.monotonic()
    with _source(input) as source, results(output) as out, progress("translating", drawn=drawn) as advance:
        translations = translator.stream(
            _lines(source, unreadable), beam=beam, nbest=nbest, length_penalty=length_penalty,
            length_penalty_kind=length_penalty_kind, coverage_penalty=coverage_penalty, groups=groups,
            diversity=diversity, sample=sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            min_length=min_length, max_length=max_length, min_ratio=min_ratio, max_ratio=max_ratio, max_extra=max_extra,
            prefix=_beside(prefix_file) if prefix_file else prefix,
            force=map(_phrases, _beside(force_file)) if force_file else force or None,
            ban=ban or None, no_repeat_ngram=no_repeat_ngram, replace_unknown=replace_unknown,
            token_scores=token_scores or None, tree=tree or None, scores=put is not _put_text,
            batch_tokens=batch_tokens, batch_sentences=batch_sentences)
        done, failed = _write(translations, unreadable, out, put, advance)
    say(_summary(done, failed, time.monotonic() - started, translator.taken))


def _write(translations: Iterator["Translation"], unreadable: dict[int, str], out: BinaryIO, put: Put,
           advance: Callable[[], None]) -> tuple[int, int]:
    """Print each translation as it comes; returns how many lines there were, and how many were not translated."""
    done = failed = 0
    for done, translation in enumerate(translations, start=1):
        problem = unreadable.pop(done, translation.problem)
        put(out, done, translation, problem)
        if problem is not None:
            failed += 1
            say(f"line {done:,}: not translated: {problem}")
        advance()
    return done, failed


def _phrases(line: str) -> list[str]:
    """The phrases of a line of --force-file."""
    return line.split("\t") if line else []


def _refuse(prefix: str | None, prefix_file: Path | None, force: list[str] | None, force_file: Path | None,
            token_scores: bool, tree: bool, as_json: bool) -> None:
    """Refuse what this command line cannot mean, all of it at once."""
    reasons = [f"--{name} and --{name}-file are two answers to one question: give one of them"
               for name, one, other in (("prefix", prefix, prefix_file), ("force", force, force_file)) if one and other]
    reasons += [f"--{name} can only be printed with --json: add it, or leave --{name} out"
                for name, wanted in (("token-scores", token_scores), ("tree", tree)) if wanted and not as_json]
    if reasons:
        raise ConfigError("regard translate: " + "\n".join(reasons))


def score(
    run: RunFolder,
    source: Annotated[Path, typer.Option(metavar="FILE", help="The sources, one a line.")],
    target: Annotated[Path, typer.Option(metavar="FILE", help="Line n is scored as the translation of source line n.")],
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Tell how likely the model finds given translations.

    Prints the log-probability of each line in nats, its end symbol counted in: 0 is certainty, and longer lines score
    lower. The sum, and the mean of a token, go to standard error. Nothing is written elsewhere.

    \b
    Example:
      regard score runs/en-de --source test.en --target test.de > test.scores
    """
    from regard.text.corpus import read_lines

    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise DataError(f"{target} has {len(targets):,} lines and {source} has {len(sources):,}. Line n of one must "
                        "translate line n of the other")
    translator = open_translator(run, checkpoint, device)
    log_probabilities = translator.score(sources, targets)
    lengths = [len(ids) + 1 for ids in translator.tokenizers.target.encode(targets)]
    for log_probability, tokens in zip(log_probabilities, lengths, strict=True):
        line = {"log_probability": log_probability, "tokens": tokens}
        typer.echo(json.dumps(line) if as_json else f"{log_probability:.4f}")
    total, tokens = sum(log_probabilities), sum(lengths)
    mean = f", {total / tokens:.4f} for each of {tokens:,} tokens" if tokens else ""
    say(f"{len(sources):,} lines: log-probability {total:,.4f} nats in all{mean}")


@contextmanager
def _source(path: Path | None) -> Iterator[BinaryIO]:
    """What is translated: a file, or standard input."""
    if path is not None:
        with path.open("rb") as file:
            yield file
        return
    if sys.stdin.isatty():
        say("Reading lines from the keyboard; Ctrl-D on an empty line ends them.")
    yield sys.stdin.buffer


def _lines(source: BinaryIO, unreadable: dict[int, str]) -> Iterator[str | None]:
    """The lines as `regard.text.corpus.read_lines` reads them, but one by one, and without giving up on a bad one; and
    None where the next one is not there yet.

    Args:
        source: bytes.
        unreadable: gets the number, from 1, and the fault of each line that is not UTF-8; it is given as empty.
    """
    number = 0
    for raw in _raw_lines(source):
        if raw is None:
            yield None
            continue
        number += 1
        raw = raw.removesuffix(b"\r")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            unreadable[number] = f"not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}"
            line = ""
        yield line.removeprefix("\ufeff") if number == 1 else line


def _raw_lines(source: BinaryIO) -> Iterator[bytes | None]:
    """The bytes of each line without its end; None where no more comes for now, and lines have come since the last."""
    parts: list[bytes] = []
    owed, patience = False, PATIENCE
    while chunk := source.read1(CHUNK):  # type: ignore[attr-defined]  # standard input and files are buffered
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
        owed, started = owed or bool(others), time.monotonic()
        more = not owed or _more(source, patience)
        patience -= min(patience, time.monotonic() - started)
        if not more:
            yield None
            owed, patience = False, PATIENCE
    if last := b"".join(parts):
        yield last


def _more(source: BinaryIO, patience: float) -> bool:
    """Whether more comes within so many seconds; no, where the system cannot tell."""
    try:
        return bool(select.select([source], [], [], patience)[0])
    except (OSError, ValueError):  # no file of the system's, or Windows
        return False


def _beside(path: Path) -> Iterator[str]:
    """The lines of --prefix-file or --force-file, one by one; raises DataError at one that is not UTF-8, or where the
    file cannot be read."""
    unreadable: dict[int, str] = {}
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}. Check the path and its permissions") from None
    with file:
        for line in _lines(file, unreadable):
            for number, fault in unreadable.items():
                raise DataError(f"{path}:{number}: {fault}. Give a file in UTF-8")
            if line is not None:
                yield line


def _put_text(out: BinaryIO, number: int, translation: "Translation", problem: str | None) -> None:
    """One line: the best text."""
    _put(out, "" if problem else _one_line(translation.text))


def _put_nbest(out: BinaryIO, number: int, translation: "Translation", problem: str | None) -> None:
    """A line for each translation: number of the input line, score, text."""
    if problem:
        _put(out, f"{number}\t\t")
        return
    for each in (translation, *translation.alternatives):
        _put(out, f"{number}\t{each.score:.4f}\t{_one_line(each.text)}")


def _put_json(out: BinaryIO, number: int, translation: "Translation", problem: str | None) -> None:
    """One JSON object a line."""
    values = _values(translation)
    values["alternatives"] = [_values(each) for each in translation.alternatives]
    _put(out, json.dumps({**values, "problem": problem}, ensure_ascii=False))


def _values(translation: "Translation") -> dict[str, Any]:
    values = {name: getattr(translation, name) for name in ("text", "score", "parts", "log_probability", "tokens")}
    asked = {name: getattr(translation, name) for name in ("log_probabilities", "entropies", "tree")}
    return values | {name: value for name, value in asked.items() if value is not None}


def _one_line(text: str) -> str:
    """The text without what would end a line: tokens of bytes or characters can spell a newline."""
    return text.replace("\n", " ")


def _put(out: BinaryIO, line: str) -> None:
    """Write a line at once, so that whoever waits at the other end of a pipe has it."""
    out.write(line.encode("utf-8", errors="replace") + b"\n")
    out.flush()


def _summary(done: int, failed: int, seconds: float, taken: str) -> str:
    """Such as "translated 1,000 lines in 5.1 s (196 a second); 2 could not be translated; engine torch, float32"."""
    rate = f" ({done / seconds:,.0f} a second)" if done > seconds else ""
    bad = f"; {failed:,} could not be translated" if failed else ""
    return f"translated {done:,} line{'' if done == 1 else 's'} in {seconds:.1f} s{rate}{bad}; engine {taken}"
