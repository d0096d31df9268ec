"""Text in, translations out: what a program imports.

    translator = regard.load("runs/en-de")
    translator.translate("A dog runs.").text
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from regard.config import Config
from regard.config_model import RNNDecoderConfig, TransformerConfig
from regard.data.batches import Batch, by_length
from regard.decode.search import Hypothesis, Limits, beam_search, forced, greedy
from regard.errors import ConfigError, DataError
from regard.look.trace import Trace
from regard.model.seq2seq import Seq2Seq, build_model
from regard.model.state import Taps
from regard.text.tokenizer import EOS, SPECIALS, Tokenizers
from regard.training import checkpoint as checkpoints
from regard.training.run import Run

WINDOWS = (64, 4096)
"""Lines that `stream` reads ahead, to sort them by length: few at first, so that output begins soon, then ever more."""


@dataclass(frozen=True)
class Translation:
    """One output.

    Attributes:
        text: the output; empty for an empty input and for a line that could not be translated.
        score: what it was ranked by, log_probability / length ** length_penalty.
        log_probability: of its tokens given the source, the end symbol included, nats.
        tokens: as people are shown them, without the end symbol.
        alternatives: the others of the n best, best first.
        problem: why the line could not be translated; None when all is well.
    """

    text: str
    score: float = 0.0
    log_probability: float = 0.0
    tokens: list[str] = field(default_factory=list)
    alternatives: list["Translation"] = field(default_factory=list)
    problem: str | None = None


def load(path: str | Path, checkpoint: str = "best", device: str = "cpu") -> "Translator":
    """Open a run for translation.

    Args:
        path: the run's folder.
        checkpoint: "best" by its validation score, "last", "average", "step-00001000", or a checkpoint's path.
        device: "cpu", or "cuda".

    Raises:
        RunError: there is no such run, or no such checkpoint.
        CheckpointError: the checkpoint is damaged, or does not fit the run's config.
    """
    run = Run.open(path)
    chosen = run.find(checkpoint)
    tokenizers = Tokenizers.load(run.folder / "tokenizer")
    model = build_model(run.config.model, tokenizers.source.size, tokenizers.target.size)
    checkpoints.put_weights(model, checkpoints.load(chosen).model, chosen)
    return Translator(model.to(device), tokenizers, run.config)


class Translator:
    """A trained model with its tokenizers.

    Args:
        model: with its weights, on its device.
        tokenizers: of source and target.
        config: the run's; its [decode] holds the defaults of `translate`.
    """

    def __init__(self, model: Seq2Seq, tokenizers: Tokenizers, config: Config):
        self.model = model.eval()
        self.tokenizers, self.config = tokenizers, config
        self.device = next(model.parameters()).device

    @overload
    def translate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; it counts as one text
        self, lines: str, *, beam: int | None = ..., nbest: int = ..., length_penalty: float | None = ...,
        batch_tokens: int | None = ..., batch_sentences: int | None = ...,
    ) -> Translation: ...
    @overload
    def translate(
        self, lines: Sequence[str], *, beam: int | None = ..., nbest: int = ..., length_penalty: float | None = ...,
        batch_tokens: int | None = ..., batch_sentences: int | None = ...,
    ) -> list[Translation]: ...
    def translate(
        self, lines: str | Sequence[str], *, beam: int | None = None, nbest: int = 1,
        length_penalty: float | None = None, batch_tokens: int | None = None, batch_sentences: int | None = None,
    ) -> Translation | list[Translation]:
        """Translate one text, or many in their order. What an option leaves out, the run's [decode] says.

        Args:
            lines: one text, or a list of them.
            beam: hypotheses kept open; 1 is greedy.
            nbest: outputs wanted for each text, at most `beam`; those after the first are `alternatives`.
            length_penalty: rank by log-probability / length ** this.
            batch_tokens: padded source tokens × beam of one batch.
            batch_sentences: most texts of one batch.

        Returns:
            a Translation, or a list of as many as there are texts. A text that cannot be translated has a `problem`.

        Raises:
            ConfigError: an option that cannot be, such as more outputs than hypotheses.
        """
        many = [lines] if isinstance(lines, str) else lines
        found = list(self.stream(many, beam=beam, nbest=nbest, length_penalty=length_penalty,
                                 batch_tokens=batch_tokens, batch_sentences=batch_sentences))
        return found[0] if isinstance(lines, str) else found

    def stream(
        self, lines: Iterable[str], *, beam: int | None = None, nbest: int = 1, length_penalty: float | None = None,
        batch_tokens: int | None = None, batch_sentences: int | None = None,
    ) -> Iterator[Translation]:
        """As `translate`, one by one in input order, in constant memory for input of any length."""
        settings = self.config.decode
        options = Options(
            beam=settings.beam if beam is None else beam,
            nbest=nbest,
            length_penalty=settings.length_penalty if length_penalty is None else length_penalty,
            batch_tokens=settings.batch_tokens if batch_tokens is None else batch_tokens,
            batch_sentences=batch_sentences,
        )
        remaining, size = iter(lines), WINDOWS[0]
        while window := list(islice(remaining, size)):
            yield from self._window(window, options)
            size = min(2 * size, WINDOWS[1])

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
        totals = [0.0] * len(sources)
        lengths = [max(len(source), len(target)) + 1 for source, target in zip(source_ids, target_ids, strict=True)]
        for rows in by_length(lengths, self.config.decode.batch_tokens):
            batch = Batch.of([source_ids[row] for row in rows], [target_ids[row] for row in rows]).to(self.device)
            for row, total in zip(rows, forced(self.model, batch).double().sum(1).tolist(), strict=True):
                totals[row] = total
        return totals

    def look(self, source: str, target: str | None = None, beam: int | None = None) -> Trace:
        """Where the model looks: the attention of every token of an output, also of one found by beam search.

        Args:
            source: one text.
            target: the output to explain; None: the model's own translation.
            beam: for its own translation; None: as [decode] says.

        Raises:
            DataError: the source is empty, or longer than [decode] max_source_tokens.
        """
        tokens = self.tokenizers.source.tokens(source)
        if problem := self._problem(tokens.ids):
            raise DataError(f"cannot look: {problem}")
        if not tokens.ids:
            raise DataError("cannot look: the source text is empty")
        if target is None:
            settings = self.config.decode
            options = Options(settings.beam if beam is None else beam, 1, settings.length_penalty)
            ids = self._search([tokens.ids], options)[0][0].tokens
        else:
            ids = [*self.tokenizers.target.encode([target])[0], EOS]
        # One forced pass gives the attention of every step at once; it equals that of the search, step by step.
        ended = ids[-1:] == [EOS]
        batch = Batch.of([tokens.ids], [ids[:-1] if ended else ids]).to(self.device)
        taps: Taps = {}
        log_p = forced(self.model, batch, taps)[0, : len(ids)].tolist()
        return Trace(
            source=[*tokens.texts, SPECIALS[EOS]],
            target=self.tokenizers.target.texts(ids),
            source_text=source,
            target_text=self.tokenizers.target.decode([ids])[0] if target is None else target,
            cross=_stack(taps, "cross", len(ids)),
            encoder=_stack(taps, "encoder", len(tokens.ids) + 1),
            decoder=_stack(taps, "decoder", len(ids), len(ids)),
            log_probabilities=log_p,
            model=_describe(self.config),
        )

    def _window(self, lines: Sequence[str], options: "Options") -> list[Translation]:
        """Translate some lines, longest first, and give them back in their order."""
        encoded = self.tokenizers.source.encode(lines)
        results = [Translation("", problem=self._problem(ids)) for ids in encoded]
        rows = [row for row, ids in enumerate(encoded) if ids and results[row].problem is None]
        budget = max(1, options.batch_tokens // options.beam)
        for places in by_length([len(encoded[row]) + 1 for row in rows], budget, options.batch_sentences):
            batch = [rows[place] for place in places]
            for row, found in zip(batch, self._search([encoded[row] for row in batch], options), strict=True):
                results[row] = self._translation(found[: options.nbest])
        return results

    def _search(self, sources: Sequence[Sequence[int]], options: "Options") -> list[list[Hypothesis]]:
        """The hypotheses of each source, best first."""
        batch = Batch.of(sources).to(self.device)
        limits = Limits(self.config.decode.max_length)
        if options.beam == 1:
            return [[found] for found in greedy(self.model, batch, limits, options.length_penalty)]
        return beam_search(self.model, batch, options.beam, options.length_penalty, limits)

    def _translation(self, found: Sequence[Hypothesis]) -> Translation:
        """Hypotheses as text."""
        tokenizer = self.tokenizers.target
        texts = tokenizer.decode([hypothesis.tokens for hypothesis in found])
        best, *others = [
            Translation(text, one.score, one.log_probability, tokenizer.texts([id for id in one.tokens if id != EOS]))
            for text, one in zip(texts, found, strict=True)
        ]
        return Translation(best.text, best.score, best.log_probability, best.tokens, others)

    def _problem(self, ids: Sequence[int]) -> str | None:
        """Why a source cannot be translated."""
        longest = self.config.decode.max_source_tokens
        if len(ids) <= longest:
            return None
        return f"{len(ids):,} tokens, over the {longest:,} that [decode] max_source_tokens allows; part the text"


@dataclass(frozen=True)
class Options:
    """How to search: see `Translator.translate`."""

    beam: int
    nbest: int
    length_penalty: float
    batch_tokens: int = 4096
    batch_sentences: int | None = None

    def __post_init__(self) -> None:
        for name in ("beam", "nbest", "batch_tokens", "batch_sentences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: expected 1 or more")
        if self.length_penalty < 0:
            raise ConfigError(f"length_penalty = {self.length_penalty}: expected 0 or more")
        if self.nbest > self.beam:
            raise ConfigError(f"nbest = {self.nbest} with beam = {self.beam}: a search that keeps {self.beam} "
                              "hypotheses cannot give more outputs. Raise --beam, or ask for fewer")


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
