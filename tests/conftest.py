"""What many tests share: a table of small models that covers every family and variant, and a tiny task."""

import random

import pytest
import torch
from pydantic import TypeAdapter

from regard.config import parse_config
from regard.config_model import DECODERS, ENCODERS, AnyModelConfig, MixedConfig
from regard.data.batches import Batch
from regard.model.seq2seq import build_model

SOURCE_SIZE, TARGET_SIZE = 11, 9

RNN = {"kind": "rnn", "width": 8, "layers": 1, "dropout": 0.0}
TRANSFORMER = {"kind": "transformer", "width": 8, "layers": 2, "dropout": 0.0, "heads": 2, "feedforward": 12}
CONV = {"kind": "conv", "width": 8, "layers": 2, "dropout": 0.0}

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
    "fixed-project": RNN | {"cell": "lstm", "summary": "project", "context": "every_step"},
    "fixed-input-only": RNN | {"context": "input_only", "layers": 2, "residual": True},
    "fixed-residual-variational": RNN | {"cell": "lstm", "layers": 3, "residual": True, "variational_dropout": True},
    "before-residual-variational": RNN | {"attention": "before", "layers": 2, "residual": True,
                                          "variational_dropout": True},
    "before-local-m": RNN | {"attention": "before", "window": "local_m", "window_radius": 1, "cell": "lstm"},
    "before-local-p": RNN | {"attention": "before", "score": "general", "window": "local_p", "window_radius": 2},
    "after-local-m": RNN | {"attention": "after", "score": "dot", "window": "local_m", "window_radius": 2},
    "after-local-p": RNN | {"attention": "after", "window": "local_p", "window_radius": 2, "cell": "lstm",
                            "reverse_source": True},
    "after-feeding": RNN | {"attention": "after", "score": "general", "input_feeding": True, "cell": "lstm"},
    "after-feeding-local-m": RNN | {"attention": "after", "score": "concat", "input_feeding": True, "layers": 2,
                                    "window": "local_m", "window_radius": 1, "variational_dropout": True},
    "before-coverage": RNN | {"attention": "before", "score": "general", "coverage": True, "layers": 2},
    "after-coverage": RNN | {"attention": "after", "coverage": True, "cell": "lstm"},
    "after-feeding-coverage": RNN | {"attention": "after", "score": "dot", "coverage": True, "input_feeding": True},
    "before-copy": RNN | {"attention": "before", "copy": True, "tie": "all", "cell": "elman"},
    "after-copy": RNN | {"attention": "after", "score": "scaled_dot", "copy": True, "tie": "all"},
    "after-everything": RNN | {"attention": "after", "copy": True, "tie": "all", "coverage": True, "layers": 2,
                               "input_feeding": True, "window": "local_p", "window_radius": 2, "residual": True,
                               "reverse_source": True, "cell": "lstm"},
    "conv": CONV,
    "conv-kernel-2-reversed": CONV | {"kernel": 2, "tie": "none", "layers": 1, "reverse_source": True},
    "conv-kernel-5": CONV | {"kernel": 5, "tie": "all", "layers": 3},
    "transformer-none": TRANSFORMER | {"positions": "none", "encoder_layers": 1, "decoder_layers": 3},
    "transformer-learned": TRANSFORMER | {"positions": "learned", "norm": "post", "norm_kind": "rms"},
    "transformer-relative": TRANSFORMER | {"positions": "relative", "kv_heads": 1, "encoder_layers": 1},
    "transformer-relative-reversed": TRANSFORMER | {"positions": "relative", "reverse_source": True},
    "transformer-rotary": TRANSFORMER | {"positions": "rotary", "heads": 4, "kv_heads": 2, "norm_kind": "rms",
                                         "activation": "swiglu"},
    "transformer-alibi-reversed": TRANSFORMER | {"positions": "alibi", "heads": 4, "reverse_source": True},
    "mixed-transformer-after": {"encoder": TRANSFORMER, "decoder": RNN | {"width": 6, "attention": "after",
                                                                          "score": "general"}},
    "mixed-transformer-before": {"encoder": TRANSFORMER | {"positions": "rotary"}, "tie": "none",
                                 "decoder": RNN | {"width": 6, "attention": "before", "coverage": True},
                                 "reverse_source": True},
    "mixed-rnn-transformer": {"encoder": RNN | {"width": 6, "cell": "lstm"}, "decoder": TRANSFORMER},
    "mixed-conv-after": {"encoder": CONV, "tie": "all", "decoder": RNN | {
        "attention": "after", "score": "dot", "input_feeding": True, "copy": True}},
    "mixed-rnn-conv": {"encoder": RNN | {"width": 6}, "decoder": CONV},
    "mixed-transformer-conv": {"encoder": TRANSFORMER, "decoder": CONV | {"width": 6}},
    "mixed-conv-transformer": {"encoder": CONV | {"width": 6}, "decoder": TRANSFORMER | {"positions": "relative"}},
    "fixed-mixed-widths": {"encoder": RNN | {"width": 6}, "decoder": RNN | {"cell": "lstm", "context": "every_step"}},
}
FAMILIES = ["fixed-gru-every-step", "before-additive", "after-general", "conv", "transformer-pre", "after-everything"]
"""One model of each way a decoder meets the source."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def model_settings(name, **changes):
    """A row of `MODELS` with changes; those of a side go into both sides of a mixed model, where they have them."""
    settings = dict(MODELS[name])
    if "encoder" not in settings:
        return settings | changes
    for side, families in (("encoder", ENCODERS), ("decoder", DECODERS)):
        known = families[settings[side]["kind"]].model_fields
        settings[side] = settings[side] | {key: value for key, value in changes.items() if key in known}
    return settings | {key: value for key, value in changes.items() if key in MixedConfig.model_fields}


def model_config(name, **changes):
    """The [model] section of a row of `MODELS`, with changes."""
    return TypeAdapter(AnyModelConfig).validate_python(model_settings(name, **changes))


def make_model(name, seed=1, sizes=(SOURCE_SIZE, TARGET_SIZE), **changes):
    """A model of `MODELS` in float64 and eval mode, its weights larger than at birth, so that outputs differ."""
    torch.manual_seed(seed)
    source_size, target_size = (sizes[1], sizes[1]) if MODELS[name].get("tie") == "all" else sizes
    model = build_model(model_config(name, **changes), source_size, target_size).double().eval()
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


def said(model, batch, taps=None):
    """Features at all real target tokens, (B, T, D): in training as training asks for them."""
    if not model.training or model.copies:
        return model(batch, taps)
    real, places = model.real(batch, taps), batch.target_mask.nonzero(as_tuple=True)
    return real.new_zeros(*batch.target_in.shape, real.shape[1]).index_put(places, real)


def make_config(folder, name="transformer-pre", *, decode=(), model=(), **train):
    """A whole config over the files of `write_reversal` in a folder."""
    settings = {"steps": 12, "batch_tokens": 64, "learning_rate": 0.01, "warmup": 4, "validate_every": 4,
                "log_every": 1, "metric": "loss", "threads": 1, "device": "cpu"}
    corpora = {part: {side: f"{part}.{side}" for side in ("source", "target")} for part in ("train", "valid")}
    return parse_config({
        "data": {"train": [corpora["train"]], "valid": corpora["valid"], "bleu_tokenize": "none"},
        "tokenizer": {"kind": "space"},
        "model": model_settings(name, **{"dropout": 0.2} | dict(model)),
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
