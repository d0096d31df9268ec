"""Text in, translations out: what a program imports.

    translator = regard.load("runs/en-de")
    translator.translate("A dog runs.").text
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from regard.config import Config
from regard.config_model import RNNDecoderConfig, TransformerConfig
from regard.data.batches import Batch
from regard.decode.ensemble import Ensemble, attention_of
from regard.decode.options import Asked, Options
from regard.decode.search import Demands, Hypothesis, Node, forced, limits_of, search
from regard.engines.engine import Engine, Found, Job, Torch
from regard.engines.opening import open_engines
from regard.errors import ConfigError, DataError, RegardError
from regard.heap import give_back
from regard.look.trace import Trace
from regard.model.seq2seq import Seq2Seq
from regard.model.state import Taps
from regard.text.tokenizer import EOS, SPECIALS, UNK, Tokenizer, Tokenizers

WINDOWS = (64, 4096)
"""Lines that `stream` reads ahead, to sort them by length: few at first, so that output begins soon, then ever more."""
CHARACTERS = 2**20
"""Characters that it reads ahead at most, and the line that goes past them."""


@dataclass(frozen=True)
class Translation:
    """One output.

    Attributes:
        text: the output; empty for an empty input and for a line that could not be translated.
        score: what it was ranked by: parts["model"] / parts["length"] + parts["coverage"]; NaN with scores=False.
        log_probability: of its tokens given the source, the end symbol included, nats; NaN with scores=False.
        tokens: as people are shown them, without the end symbol.
        alternatives: the others of the n best, best first; of samples, as they were drawn.
        problem: why the line could not be translated; None when all is well.
        parts: of the score: "model", its log-probability; "length", what divides it; "coverage", what is added.
        log_probabilities: with `token_scores`, of each token, the end symbol included.
        entropies: with `token_scores`, of what the model expected in place of each token, nats.
        tree: with `tree`, each continuation that the beam looked at: a `regard.decode.hypotheses.Node` as a dict, its
            token as people are shown it.
    """

    text: str
    score: float = 0.0
    log_probability: float = 0.0
    tokens: list[str] = field(default_factory=list)
    alternatives: list["Translation"] = field(default_factory=list)
    problem: str | None = None
    parts: dict[str, float] = field(default_factory=dict)
    log_probabilities: list[float] | None = None
    entropies: list[float] | None = None
    tree: list[dict[str, Any]] | None = None


def load(path: str | Path | Sequence[str | Path], checkpoint: str = "best", device: str = "cpu",
         engine: str | None = None, precision: str | None = None) -> "Translator":
    """Open a run for translation, or several as an ensemble: at each step, the mean of their probabilities.

    Args:
        path: the run's folder, or what `regard export` made of it; or a list of folders of runs that share their
            vocabularies; the first one's [decode] holds the defaults.
        checkpoint: "best" by its validation score, "last", "average", "step-00001000", or a checkpoint's path.
        device: "cpu", "cuda", or "auto": a GPU where there is one, but for ctranslate2.
        engine: "torch", which does everything; "ctranslate2", which does greedy and beam search with Transformers and
            is faster on a processor; "auto", for each call the fastest that can do what it asks (`Translator.taken`
            tells which). None: torch for a run, and what an exported folder was exported for.
        precision: "float32", "bfloat16" or "int8", of weights and products. None: float32, or that of the export.

    Raises:
        RunError: there is no such run, or no such checkpoint.
        CheckpointError: the checkpoint is damaged, or does not fit the run's config.
        ConfigError: models that do not fit together, or what the engine named cannot do, with all reasons.
        MissingExtra: the engine named is not installed.
    """
    paths = [Path(each) for each in ([path] if isinstance(path, str | Path) else path)]
    opened = open_engines(paths, checkpoint, device, engine, precision)
    return Translator(opened.own, opened.tokenizers, opened.configs[0], opened.configs[1:], opened.engines,
                      opened.against, opened.checkpoints)


class Task(NamedTuple):
    """One text to translate: its number from 1, what its outputs begin with, and phrases that they hold."""

    number: int
    text: str
    prefix: str = ""
    force: tuple[str, ...] = ()


class Ids(NamedTuple):
    """A task in tokens."""

    source: list[int]
    prefix: list[int]
    force: list[list[int]]


def tasks_of(lines: Iterable[str | None], prefix: str | Iterable[str],
             force: Iterable[Any]) -> Iterator[Task | None]:
    """Texts with what is asked of each, and each None as it is; raises DataError when there are not as many prefixes or
    lists of phrases."""
    shared = shared_phrases(force)
    beside: dict[str, Iterator[Any]] = {
        "prefix": repeat(prefix) if isinstance(prefix, str) else iter(prefix),
        "force": repeat(shared) if shared is not None else map(tuple, force)}
    number = 0
    for text in lines:
        if text is None:
            yield None
            continue
        number += 1
        each: dict[str, Any] = {name: next(values, None) for name, values in beside.items()}
        for name, value in each.items():
            if value is None:
                raise DataError(f"{name}: {number - 1:,} of them, and there are more texts; give one for each text")
        yield Task(number, text, each["prefix"], each["force"])
    for name, values in beside.items():
        if not isinstance(values, repeat) and next(values, None) is not None:
            raise DataError(f"{name}: more than {number:,} of them, and {number:,} texts; give one for each text")


def windows(tasks: Iterable[Task | None], size: int) -> Iterator[list[Task]]:
    """Tasks that are translated together: `size` of them, then ever more; fewer where their texts are long, or where a
    None says that those before it wait for no others."""
    window: list[Task] = []
    characters = 0
    for task in tasks:
        if task is not None:
            window.append(task)
            characters += len(task.text)
        if len(window) >= size or characters >= CHARACTERS or (window and task is None):
            yield window
            size = min(2 * size, WINDOWS[1]) if len(window) >= size else size
            window, characters = [], 0
    if window:
        yield window


def shared_phrases(force: Iterable[Any]) -> tuple[str, ...] | None:
    """Phrases that are meant for all texts; None if there is a list for each."""
    if isinstance(force, str):
        return (force,)
    return tuple(force) if isinstance(force, list | tuple) and all(isinstance(each, str) for each in force) else None


class Translator:
    """A trained model with its tokenizers.

    Args:
        model: with its weights, on its device, or as an engine; None where a folder was exported without it.
        tokenizers: of source and target.
        config: the run's; its [decode] holds the defaults of `translate`.
        others: of an ensemble, the configs of the other models.
        engines: that may serve a call, the fastest first; none: torch, with the model.
        against: why no faster one is among them.
        checkpoints: the names of the models' checkpoints, where they have any.

    Attributes:
        engine: that took the last call; None before the first.
        taken: its name and precision, such as "ctranslate2, float32", and in brackets why no faster one took it.
    """

    def __init__(self, model: Seq2Seq | Ensemble | Torch | None, tokenizers: Tokenizers, config: Config,
                 others: Sequence[Config] = (), engines: Sequence[Engine] = (), against: Sequence[str] = (),
                 checkpoints: Sequence[str] = ()):
        self.tokenizers, self.config = tokenizers, config
        self.configs = [config, *others]
        self._own = Torch(model) if isinstance(model, Seq2Seq | Ensemble) else model
        self.engines: list[Engine] = [*engines] or [self._own] if self._own else [*engines]
        self.against, self.checkpoints = list(against), list(checkpoints)
        self.engine: Engine | None = None
        self.taken = ""

    @property
    def model(self) -> Seq2Seq | Ensemble:
        """The model in torch, in eval mode; raises ConfigError where a folder was exported without it."""
        if self._own is None:
            raise ConfigError("this folder was exported for another engine, which shows nothing of its inside: load "
                              "the run that it was made from")
        return self._own.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @overload
    def translate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; it counts as one text
        self, lines: str, **asked: Unpack[Asked]
    ) -> Translation: ...
    @overload
    def translate(self, lines: Sequence[str], **asked: Unpack[Asked]) -> list[Translation]: ...
    def translate(self, lines: str | Sequence[str], **asked: Unpack[Asked]) -> Translation | list[Translation]:
        """Translate one text, or many in their order.

        Args:
            lines: one text, or a list of them.
            asked: how, such as beam=5, nbest=3, sample=True or prefix="Ein": see `Asked`.

        Returns:
            a Translation, or a list of as many as there are texts. A text that cannot be translated has a `problem`.

        Raises:
            ConfigError: what cannot be, such as more outputs than hypotheses; all of it at once.
            DataError: not as many prefixes or lists of phrases as there are texts.
        """
        found = list(self.stream([lines] if isinstance(lines, str) else lines, **asked))
        return found[0] if isinstance(lines, str) else found

    def stream(self, lines: Iterable[str | None], **asked: Unpack[Asked]) -> Iterator[Translation]:
        """As `translate`, one by one in input order, and without keeping them, for input of any length.

        It reads ahead of what it gives, up to WINDOWS lines or CHARACTERS. A None among the lines stands for no line:
        those before it are answered before the next is read, as they must be where that one comes late, or depends on
        the answers.
        """
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        prefix, force = given.get("prefix", ""), given.get("force", ())
        shared = shared_phrases(force)
        if shared == ():
            given.pop("force", None)
        if "ban" in given:
            given["ban"] = shared_phrases(given["ban"]) or tuple(given["ban"])
        options = self._options(given)
        ban = self._target_ids(options.ban)
        everywhere = Task(0, "", prefix if isinstance(prefix, str) else "", shared or ())
        obstacles = _obstacles(everywhere, self._target_ids([everywhere.prefix, *everywhere.force]), ban)
        if reasons := [*(f'ban: "{phrase}" holds no token' for phrase, ids in ban.items() if not ids), *obstacles]:
            raise ConfigError("\n".join(reasons))
        engine = self._engine(options, {name for name in ("prefix", "force") if given.get(name) not in (None, "")})
        for window in windows(tasks_of(lines, prefix, force), WINDOWS[isinstance(lines, list | tuple)]):
            yield from self._window(engine, window, options, ban)
            if len(window) >= WINDOWS[1]:
                give_back()  # else what lies free between the results of many windows comes to some 40 MB

    def score(self, sources: Sequence[str], targets: Sequence[str]) -> list[float]:
        """The log-probability of each given target, its end symbol included, in nats.

        Raises:
            DataError: not as many targets as sources, or a source that is longer than [decode] max_source_tokens.
        """
        if len(sources) != len(targets):
            raise DataError(f"{len(sources):,} sources and {len(targets):,} targets: target n must belong to source n")
        source_ids, target_ids = self.tokenizers.source.encode(sources), self.tokenizers.target.encode(targets)
        longest = self.config.decode.max_source_tokens
        for number, ids in enumerate(source_ids, start=1):
            if len(ids) > longest:
                raise DataError(f"source {number:,} has {len(ids):,} tokens, over the {longest:,} that [decode] "
                                "max_source_tokens allows; nothing was scored")
        found = self.engines[-1].forced(source_ids, target_ids, self.config.decode.batch_tokens)
        return [math.fsum(values) for values in found]

    def look(self, source: str, target: str | None = None, beam: int | None = None) -> Trace:
        """Where the model looks: the attention of every token of an output, also of one found by beam search.

        Args:
            source: one text.
            target: the output to explain; None: the model's own translation.
            beam: for its own translation; None: as [decode] says.

        Raises:
            DataError: the source is empty, or longer than [decode] max_source_tokens.
        """
        options = self._options({} if beam is None else {"beam": beam})
        tokens = self.tokenizers.source.tokens(source)
        for problem in _too_long(tokens.ids, options):
            raise DataError(f"cannot look: {problem}")
        if not tokens.ids:
            raise DataError("cannot look: the source text is empty")
        if target is None:
            ids = search(self.model, Batch.of([tokens.ids]).to(self.device), options, Demands(lines=[1]))[0][0].tokens
        else:
            ids = [*self.tokenizers.target.encode([target])[0], EOS]
        # One forced pass gives the attention of every step at once; it equals that of the search, step by step.
        taps = Taps()
        log_p = self._forced(tokens.ids, [ids], taps)[0, : len(ids)].tolist()
        return Trace(
            source=[*tokens.texts, SPECIALS[EOS]],
            target=self.tokenizers.target.texts(ids),
            source_text=source,
            target_text=self.tokenizers.target.decode([ids])[0] if target is None else target,
            cross=_stack(taps, "cross", len(ids)),
            encoder=_stack(taps, "encoder", len(tokens.ids) + 1),
            decoder=_stack(taps, "decoder", len(ids), len(ids)),
            log_probabilities=log_p,
            model=" with ".join(_describe(config) for config in self.configs),
        )

    def _options(self, given: Mapping[str, Any]) -> Options:
        return Options.of(self.config.decode, given, [config.model for config in self.configs])

    def _target_ids(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The tokens of each text in the target's vocabulary."""
        different = list(dict.fromkeys(texts))
        return dict(zip(different, self.tokenizers.target.encode(different), strict=True))

    def _forced(self, source: Sequence[int], outputs: Sequence[Sequence[int]], taps: Taps) -> Tensor:
        """Log-probabilities of outputs, with or without their </s>; the taps get where they look."""
        targets = [ids[:-1] if ids[-1:] == [EOS] else ids for ids in outputs]
        return forced(self.model, Batch.of([source] * len(targets), targets).to(self.device), taps)

    def _engine(self, options: Options, asked: Set[str]) -> Engine:
        """The first engine that can do what a call asks, made ready."""
        against = list(self.against)
        for engine in self.engines:
            why, last = list(engine.refusals(options, asked)), engine is self.engines[-1]
            if why and last:
                raise ConfigError("\n".join(f"{engine.name} cannot do what was asked: {reason}" for reason in why))
            try:
                if not why:
                    engine.open()
                    self.engine = engine
                    self.taken = f"{engine.name}, {engine.precision}" + f" ({'; '.join(against)})" * bool(against)
                    return engine
            except RegardError as error:
                if last:
                    raise
                why = [str(error)]
            against += [f"{engine.name}: {reason}" for reason in why]
        raise AssertionError("a translator has an engine")

    def _window(self, engine: Engine, tasks: Sequence[Task], options: Options,
                ban: Mapping[str, list[int]]) -> list[Translation]:
        """Translate some texts, longest first, and give them back in their order."""
        read = self._read(tasks, options, ban)
        results = [Translation("", problem=each if isinstance(each, str) else None) for each in read]
        rows = [row for row, each in enumerate(read) if not isinstance(each, str) and each.source]
        jobs = [Job(tasks[row].number, *read[row]) for row in rows]
        for found in engine.search(jobs, options, ban):
            chosen = [tasks[rows[place]] for place in found.places]
            for place, one in zip(found.places, self._translations(chosen, jobs, found, options), strict=True):
                results[rows[place]] = one
        return results

    def _read(self, tasks: Sequence[Task], options: Options, ban: Mapping[str, list[int]]) -> list[Ids | str]:
        """Each task in tokens, or why it cannot be done."""
        encode = self.tokenizers.source.encode
        try:
            sources: list[list[int] | str] = [*encode([task.text for task in tasks])]
        except DataError:  # one of them is no text; find out which
            sources = [_ids_or_fault(encode, task.text) for task in tasks]
        target = self._target_ids(text for task in tasks for text in (task.prefix, *task.force))
        limits = limits_of(options)
        read: list[Ids | str] = []
        for task, source in zip(tasks, sources, strict=True):
            if isinstance(source, str) or not source or task.text.isspace():
                read.append(source if isinstance(source, str) else Ids([], [], []))
                continue
            prefix, longest = target[task.prefix], limits.between(len(source) + 1)[1]
            problems = [*_too_long(source, options), *_obstacles(task, target, ban)]
            if len(prefix) > longest:
                problems.append(f"the prefix has {len(prefix):,} tokens, and this output may have {longest:,}")
            read.append("; ".join(problems) or Ids(source, prefix, [target[phrase] for phrase in task.force]))
        return read

    def _translations(self, tasks: Sequence[Task], jobs: Sequence[Job], found: Found,
                      options: Options) -> Iterator[Translation]:
        """What was found of some tasks, for people."""
        outputs = [each[: options.outputs] for each in found.hypotheses]
        texts = iter(self._texts(tasks, outputs, options))
        for row, (place, hypotheses) in enumerate(zip(found.places, outputs, strict=True)):
            several = [(one, next(texts)) for one in hypotheses]
            if not options.sample:  # of equal texts, the first alone, which is the best
                best: dict[str, Hypothesis] = {}
                for one, text in several:
                    best.setdefault(text, one)
                several = [(one, text) for text, one in best.items()]
            tree = self._tree(found.trees[row]) if found.trees else None
            if not several:
                longest = limits_of(options).between(len(jobs[place].source) + 1)[1]
                yield Translation("", problem=f"no output of at most {longest:,} tokens was found that keeps all "
                                  "rules: loosen one of them, or use a wider beam", tree=tree)
                continue
            others = [self._translation(*each, options.scores) for each in several[1 : options.nbest]]
            yield self._translation(*several[0], options.scores, others, tree)

    def _texts(self, tasks: Sequence[Task], outputs: Sequence[Sequence[Hypothesis]], options: Options) -> list[str]:
        """The text of each hypothesis of each task, in a row."""
        texts = self.tokenizers.target.decode([one.tokens for each in outputs for one in each])
        if options.replace_unknown:
            pairs = [(task.text, one.tokens) for task, each in zip(tasks, outputs, strict=True) for one in each]
            texts = [self._filled(source, ids) if UNK in ids else text
                     for (source, ids), text in zip(pairs, texts, strict=True)]
        return texts

    def _translation(self, one: Hypothesis, text: str, scores: bool, alternatives: Sequence[Translation] = (),
                     tree: list[dict[str, Any]] | None = None) -> Translation:
        """A hypothesis for people."""
        tokens = self.tokenizers.target.texts([id for id in one.tokens if id != EOS])
        if not scores:
            return Translation(text, math.nan, math.nan, tokens, [*alternatives], tree=tree)
        parts = {"model": one.log_probability, "length": one.length_norm, "coverage": one.coverage}
        return Translation(text, one.score, one.log_probability, tokens, [*alternatives], None, parts,
                           one.log_probabilities, one.entropies, tree)

    def _tree(self, nodes: Sequence[Node]) -> list[dict[str, Any]]:
        """A tree for people."""
        tokens = self.tokenizers.target.texts([node.token for node in nodes])
        return [node._asdict() | {"token": token} for node, token in zip(nodes, tokens, strict=True)]

    def _filled(self, source: str, ids: Sequence[int]) -> str:
        """An output's text with the source token that each <unk> looked at most (Luong et al. 2015b) in its place."""
        tokens, taps = self.tokenizers.source.tokens(source), Taps()
        self._forced(tokens.ids, [ids], taps)
        attention = attention_of(taps)
        assert attention is not None
        places = attention[0, :, : len(tokens.ids)].argmax(-1).tolist()
        words = {at: source[slice(*tokens.spans[places[at]])] for at, id in enumerate(ids) if id == UNK}
        return _insert(self.tokenizers.target, ids, words)


def _ids_or_fault(encode: Callable[[list[str]], list[list[int]]], text: str) -> list[int] | str:
    """The ids of one text, or why it has none."""
    try:
        return encode([text])[0]
    except DataError as error:
        return str(error)


def _too_long(source: Sequence[int], options: Options) -> Iterator[str]:
    """Why a source cannot be translated."""
    if len(source) > options.max_source_tokens:
        yield (f"{len(source):,} tokens, over the {options.max_source_tokens:,} that [decode] max_source_tokens "
               "allows; part the text")


def _obstacles(task: Task, ids: Mapping[str, list[int]], ban: Mapping[str, list[int]]) -> Iterator[str]:
    """Why no output can begin with a task's prefix and hold its phrases."""
    if UNK in ids[task.prefix]:
        yield f'prefix "{task.prefix}" holds what the vocabulary does not'
    for phrase in task.force:
        if not ids[phrase]:
            yield f'force: "{phrase}" holds no token'
        elif UNK in ids[phrase]:
            yield f'force: "{phrase}" holds what the vocabulary does not'
        for banned, own in ban.items():
            if own and any(ids[phrase][start : start + len(own)] == own for start in range(len(ids[phrase]))):
                yield f'force: "{phrase}" holds "{banned}", which is banned'


def _insert(tokenizer: Tokenizer, ids: Sequence[int], words: Mapping[int, str]) -> str:
    """The text of ids with words in the places of some of them, which have no text of their own."""
    if tokenizer.kind == "space":
        pieces = [words.get(at) or tokenizer.decode([[id]])[0] for at, id in enumerate(ids)]
        return " ".join(piece for piece in pieces if piece)
    text = tokenizer.decode([ids])[0]
    for at in sorted(words, reverse=True):
        before = len(tokenizer.decode([ids[:at]])[0])
        text = text[:before] + words[at] + text[before:]
    return text


def _stack(taps: Taps, kind: str, rows: int, columns: int | None = None) -> Tensor | None:
    """All layers' attention of one kind, float32 (layers, heads, rows, columns) on the CPU; None if there is none."""
    found = [taps[f"{kind}.{layer}"][0] for layer in range(len(taps)) if f"{kind}.{layer}" in taps]
    if not found:
        return None
    heads = [weights if weights.dim() == 3 else weights[None] for weights in found]
    return torch.stack(heads)[:, :, :rows, :columns].float().cpu()


def _describe(config: Config) -> str:
    """A model in a few words."""
    encoder, decoder = config.model.encoder, config.model.decoder
    if isinstance(config.model, TransformerConfig):
        return f"transformer, {encoder.layers} + {decoder.layers} layers, {config.model.heads} heads"
    name = encoder.kind if encoder.kind == decoder.kind else f"{encoder.kind} to {decoder.kind}"
    if not isinstance(decoder, RNNDecoderConfig):
        return f"{name}, {encoder.layers} + {decoder.layers} layers"
    if decoder.attention == "none":
        return f"{name} ({decoder.cell}), fixed vector"
    return f"{name} ({decoder.cell}), {decoder.score} attention {decoder.attention} the cell"
