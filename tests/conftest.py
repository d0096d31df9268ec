"""What many tests share: a table of small models that covers every family and variant, and a tiny task."""

import random

import pytest
import torch
from pydantic import TypeAdapter

from regard.config import AnyModelConfig, parse_config
from regard.data.batches import Batch
from regard.model.seq2seq import build_model

SOURCE_SIZE, TARGET_SIZE = 11, 9

RNN = {"kind": "rnn", "width": 8, "layers": 1, "dropout": 0.0}
TRANSFORMER = {"kind": "transformer", "width": 8, "layers": 2, "dropout": 0.0, "heads": 2, "feedforward": 12}

MODELS = {
    "transformer-pre": TRANSFORMER,
    "transformer-post": TRANSFORMER | {"norm": "post", "activation": "gelu", "tie": "none"},
    "transformer-reversed": TRANSFORMER | {"heads": 4, "layers": 1, "tie": "all", "reverse_source": True},
    "fixed-elman": RNN | {"cell": "elman", "bidirectional": False},
    "fixed-elman-mean": RNN | {"cell": "elman", "layers": 2, "summary": "mean", "context": "every_step"},
    "fixed-gru-reversed": RNN | {"layers": 2, "tie": "all", "reverse_source": True},
    "fixed-gru-every-step": RNN | {"bidirectional": False, "context": "every_step", "tie": "none"},
    "fixed-lstm-max": RNN | {"cell": "lstm", "bidirectional": False, "summary": "max", "context": "every_step"},
    "fixed-lstm": RNN | {"cell": "lstm", "layers": 2},
    "before-dot": RNN | {"attention": "before", "score": "dot", "cell": "lstm"},
    "before-scaled-dot": RNN | {"attention": "before", "score": "scaled_dot", "bidirectional": False},
    "before-general": RNN | {"attention": "before", "score": "general", "cell": "elman", "summary": "max"},
    "before-concat": RNN | {"attention": "before", "score": "concat", "layers": 2, "reverse_source": True},
    "before-additive": RNN | {"attention": "before", "score": "additive"},
    "after-dot": RNN | {"attention": "after", "score": "dot", "summary": "mean"},
    "after-scaled-dot": RNN | {"attention": "after", "score": "scaled_dot", "cell": "elman", "tie": "none"},
    "after-general": RNN | {"attention": "after", "score": "general", "cell": "lstm", "layers": 2},
    "after-concat": RNN | {"attention": "after", "score": "concat", "bidirectional": False},
    "after-additive": RNN | {"attention": "after", "score": "additive", "layers": 2, "reverse_source": True},
}
FAMILIES = ["fixed-gru-every-step", "before-additive", "after-general", "transformer-pre"]
"""One model of each way a decoder meets the source."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def model_config(name, **changes):
    """The [model] section of a row of `MODELS`."""
    return TypeAdapter(AnyModelConfig).validate_python(MODELS[name] | changes)


def make_model(name, seed=1, **changes):
    """A model of `MODELS` in float64 and eval mode, its weights larger than at birth, so that outputs differ."""
    torch.manual_seed(seed)
    source_size = TARGET_SIZE if MODELS[name].get("tie") == "all" else SOURCE_SIZE
    model = build_model(model_config(name, **changes), source_size, TARGET_SIZE).double().eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.2 * torch.randn_like(weights)
    return model


def make_batch(lengths=((5, 4), (2, 6), (1, 1), (7, 3)), seed=1):
    """Random ids, valid in both vocabularies, of the given (source, target) lengths."""
    draw = random.Random(seed)
    sources, targets = ([[draw.randrange(3, TARGET_SIZE) for _ in range(pair[side])] for pair in lengths]
                        for side in (0, 1))
    return Batch.of(sources, targets)


def write_reversal(folder, pairs=60, longest=5, seed=1):
    """Files of pairs whose target is the source backwards: train.source, train.target, valid.source, valid.target."""
    draw = random.Random(seed)
    for name, count in (("train", pairs), ("valid", 6)):
        lines = [[draw.choice("abcd") for _ in range(draw.randint(1, longest))] for _ in range(count)]
        (folder / f"{name}.source").write_text("".join(" ".join(line) + "\n" for line in lines))
        (folder / f"{name}.target").write_text("".join(" ".join(line[::-1]) + "\n" for line in lines))


def make_config(folder, name="transformer-pre", *, decode=(), model=(), **train):
    """A whole config over the files of `write_reversal` in a folder."""
    settings = {"steps": 12, "batch_tokens": 64, "learning_rate": 0.01, "warmup": 4, "validate_every": 4,
                "log_every": 1, "metric": "loss", "threads": 1, "device": "cpu"}
    corpora = {part: {side: f"{part}.{side}" for side in ("source", "target")} for part in ("train", "valid")}
    return parse_config({
        "data": {"train": [corpora["train"]], "valid": corpora["valid"], "bleu_tokenize": "none"},
        "tokenizer": {"kind": "space"},
        "model": MODELS[name] | {"dropout": 0.2} | dict(model),
        "train": settings | train,
        "decode": {"beam": 2, "max_source_tokens": 20} | dict(decode),
    }, "test", folder)


@pytest.fixture
def corpus(tmp_path):
    """A folder with the files of `write_reversal`."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_reversal(folder)
    return folder
