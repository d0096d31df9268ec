"""Made-up findings of the demo, for the tests of its terminal and its page."""

from pathlib import Path

import torch

from regard.demo.findings import SHORT_TITLE, Findings, Result
from regard.demo.pronounce import BUCKETS
from regard.demo.stages import STAGES, Stage
from regard.look.trace import Trace

TITLE_PHONES = "S IY K W AH N S T UW S IY K W AH N S L ER N IH NG W IH DH N UH R AH L N EH T W ER K S"


def trace_of(stage: Stage) -> Trace:
    """Attention that runs down the diagonal, in as many layers and heads as the stage has."""
    phones = ["AH", "T", "EH", "N", "SH", "AH", "N", "IH", "Z", "AO", "L", "Y", "UW", "N", "IY", "D", "</s>"]
    source = [*SHORT_TITLE.replace(" ", "▁"), "</s>"]
    layers, heads = {"rnn-fixed": (0, 0), "rnn-attention": (1, 1), "transformer": (2, 4)}[stage.name]
    rows, columns = torch.arange(len(phones))[:, None], torch.arange(len(source))[None, :]
    weights = torch.softmax(-((columns - rows * len(source) / len(phones)) ** 2) / 2.0, dim=-1)
    cross = weights.expand(layers, heads, -1, -1) if layers else None
    output = " ".join(phones[:-1])
    return Trace(source, phones, SHORT_TITLE, output, cross, None, None, [-0.1] * len(phones), stage.title)


def result_of(stage: Stage, folder: Path, rate: float, growth: float) -> Result:
    """A stage whose error grows with length."""
    wrong = TITLE_PHONES.replace("L ER N IH NG", "L AY N AE NG").replace("W ER K S", "K")
    return Result(
        stage=stage,
        folder=folder / stage.name,
        parameters=281_344,
        updates=4210,
        seconds=104.6,
        error_rate=rate + 2 * growth,
        exact_match=31.4,
        by_length=[rate + growth * place for place in range(len(BUCKETS))],
        curve=[(10.0 * place, 3.0 / (place + 0.5)) for place in range(1, 11)],
        title=TITLE_PHONES if growth < 5 else wrong,
        words=["CH AE T B AA T", "R IH G AA R D IH F AY"],
        trace=trace_of(stage),
    )


def findings_in(folder: Path) -> Findings:
    """What a demo in this folder might have found."""
    shapes = ((24.0, 10.8), (11.2, 1.3), (12.9, 1.9))
    return Findings(
        results=[result_of(stage, folder, *shape) for stage, shape in zip(STAGES, shapes, strict=True)],
        words=["chatbot", "regardify"],
        title_phones=TITLE_PHONES,
        pairs={"train": 138_721, "valid": 240, "test": 1200},
        minutes=6.0,
        seconds=354.2,
    )
