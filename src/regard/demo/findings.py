"""What the demo found out: its figures and outputs, gathered from finished runs, ready for a terminal and a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regard.demo.pronounce import BUCKETS, Split, bucket_of
from regard.demo.stages import Stage
from regard.look.trace import Trace
from regard.metrics import exact_match, token_error_rate
from regard.training.run import Run
from regard.translator import Translator, load

TITLE = "sequence to sequence learning with neural networks"
"""The text that all three pronounce for the reader: the title of Sutskever et al. (2014), of 50 letters and spaces."""

SHORT_TITLE = "attention is all you need"
"""The text whose attention is shown: the title of Vaswani et al. (2017)."""

_INVENTED = ("chatbot", "deepfake", "paywall", "staycation", "doomscrolling", "cryptocurrency", "bahdanauish",
             "regardify")


@dataclass(frozen=True)
class Result:
    """What came of one stage.

    Attributes:
        stage: which.
        folder: of its run.
        parameters: of its model.
        updates: that its training made.
        seconds: of training, validations included.
        error_rate: phone error rate on the test texts, percent.
        exact_match: test texts without any error, percent.
        by_length: phone error rate in each of BUCKETS, percent.
        curve: (seconds, validation loss in nats per phone), in order.
        title: its pronunciation of TITLE.
        words: its pronunciations of `Findings.words`.
        trace: where it looked in SHORT_TITLE.
    """

    stage: Stage
    folder: Path
    parameters: int
    updates: int
    seconds: float
    error_rate: float
    exact_match: float
    by_length: list[float]
    curve: list[tuple[float, float]]
    title: str
    words: list[str]
    trace: Trace


@dataclass(frozen=True)
class Findings:
    """Everything the demo shows at its end.

    Attributes:
        results: of the three stages, in order.
        words: in no dictionary, so that no model can have seen them.
        title_phones: TITLE as the dictionary pronounces it.
        pairs: of texts and pronunciations, in the training, validation and test files.
        minutes: that the user gave it.
        seconds: that it took in all.
    """

    results: list[Result]
    words: list[str]
    title_phones: str
    pairs: Mapping[Split, int]
    minutes: float
    seconds: float


def measure(
    stage: Stage, folder: Path, sources: Sequence[str], references: Sequence[str], words: Sequence[str]
) -> Result:
    """Load a finished run and see what it can do.

    Args:
        stage: what the run trained.
        folder: of the run.
        sources: the test texts.
        references: their pronunciations.
        words: to pronounce besides.
    """
    translator = load(folder)
    outputs = [translation.text for translation in translator.stream(sources)]
    title, *spoken = [translation.text for translation in translator.translate([TITLE, *words])]
    rows = Run.open(folder).metrics()
    return Result(
        stage=stage,
        folder=folder,
        parameters=count_parameters(translator),
        updates=rows[-1]["step"],
        seconds=rows[-1]["seconds"],
        error_rate=token_error_rate(outputs, references).value,
        exact_match=exact_match(outputs, references).value,
        by_length=error_by_length(sources, outputs, references),
        curve=[(row["seconds"], row["loss"]) for row in rows if row["kind"] == "valid"],
        title=title,
        words=spoken,
        trace=translator.look(SHORT_TITLE),
    )


def count_parameters(translator: Translator) -> int:
    """Trained numbers of a model."""
    return sum(weights.numel() for weights in translator.model.parameters())


def error_by_length(sources: Sequence[str], outputs: Sequence[str], references: Sequence[str]) -> list[float]:
    """Phone error rate, percent, of the texts in each of BUCKETS; each bucket must hold some."""
    rates = []
    for bucket in BUCKETS:
        rows = [row for row, source in enumerate(sources) if bucket_of(source) == bucket]
        rates.append(token_error_rate([outputs[row] for row in rows], [references[row] for row in rows]).value)
    return rates


def unheard(dictionary: Mapping[str, str]) -> list[str]:
    """New and invented words that are not in the dictionary."""
    return [word for word in _INVENTED if word not in dictionary]


def marked(output: str, reference: str) -> list[tuple[str, bool]]:
    """The phones of an output, each with whether it is right, by the fewest edits that lead to the reference.

    A phone that is missing appears as "·", and is not right.
    """
    from rapidfuzz.distance import Levenshtein

    said, wanted = output.split(), reference.split()
    phones: list[tuple[str, bool]] = []
    for edit in Levenshtein.opcodes(said, wanted):
        phones += [(phone, edit.tag == "equal") for phone in said[edit.src_start : edit.src_end]]
        if edit.tag == "insert":
            phones += [("·", False)] * (edit.dest_end - edit.dest_start)
    return phones
