"""Folders to engines: what of a run, or of an exported model, can serve, and why the rest cannot."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from regard.config import Config
from regard.decode.ensemble import Ensemble
from regard.engines import converted, ct2_model
from regard.engines.ct2 import CT2
from regard.engines.engine import NAMES, PRECISIONS, Engine, Torch
from regard.errors import ConfigError, MissingExtra
from regard.model.seq2seq import Seq2Seq, build_model
from regard.text.tokenizer import Tokenizers
from regard.training import checkpoint as checkpoints
from regard.training.run import Run

Reason = str | MissingExtra
"""Why something cannot be: words, or the error that says it."""


class Opened(NamedTuple):
    """What a translator is made from.

    Attributes:
        own: torch, with the model; None where a folder was exported without it.
        tokenizers: of source and target.
        configs: of all runs, the first one's first.
        checkpoints: the names of theirs.
        engines: that may serve, the fastest first.
        against: why no faster one is among them.
    """

    own: Torch | None
    tokenizers: Tokenizers
    configs: list[Config]
    checkpoints: list[str]
    engines: list[Engine]
    against: list[str]


def open_engines(folders: Sequence[Path], checkpoint: str, device: str, engine: str | None,
                 precision: str | None) -> Opened:
    """What `regard.translator.load` opens; see there."""
    if not folders:
        raise ConfigError("load: expected a run's folder, or several, and got none")
    for name, value, known in (("engine", engine, NAMES), ("precision", precision, PRECISIONS)):
        if value is not None and value not in known:
            raise ConfigError(f'{name} = "{value}": expected {", ".join(known[:-1])} or {known[-1]}')
    for folder in folders:
        if (told := converted.about(folder)) and told["to"] == "ctranslate2":
            return _exported(folder, told, len(folders), checkpoint, "cpu" if device == "auto" else device, engine,
                             precision)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and engine != "ctranslate2" else "cpu"
    runs = [Run.open(folder) for folder in folders]
    tokenizers = [Tokenizers.load(run.folder / "tokenizer") for run in runs]
    if misfits := [misfit for run, own in zip(runs, tokenizers, strict=True)
                   for misfit in _misfits(run, own, runs[0], tokenizers[0])]:
        raise ConfigError("\n".join(misfits))
    chosen = [run.find(checkpoint) for run in runs]
    configs, bits = [run.config for run in runs], precision or "float32"
    model = partial(_models, runs, tokenizers, chosen, device)
    own = Torch(model, "bfloat16" if bits == "bfloat16" else "float32")
    exact = own if own.precision == "float32" else Torch(model)
    convert = partial(converted.cached, runs[0], chosen[0], bits, exact, tokenizers[0])
    made: dict[str, Engine] = {"ctranslate2": CT2(convert, bits, tokenizers[0], configs[0]), "torch": own}
    wanted = list(made) if engine == "auto" else [engine or "torch"]
    against = {name: list(AGAINST[name](configs, device, bits)) for name in wanted}
    engines = [made[name] for name in wanted if not against[name]]
    if not engines:
        _raise([reason for name in wanted for reason in against[name]])
    if engine != "auto":
        engines[0].open()
    faster = [str(reason) for name in takewhile(against.__getitem__, wanted) for reason in against[name]]
    return Opened(own, tokenizers[0], configs, [path.name for path in chosen], engines, faster)


def _exported(folder: Path, told: Mapping[str, Any], number: int, checkpoint: str, device: str, engine: str | None,
              precision: str | None) -> Opened:
    """Open what `regard export --to ctranslate2` made."""
    run, own = Run.open(folder), told["precision"]
    reasons = list(_against_ct2([run.config] * number, device, own))
    if engine == "torch":
        reasons.append(f"{folder} holds no checkpoint for torch: load the run that it was made from")
    if precision not in (None, own):
        reasons.append(f'{folder} holds precision = "{own}", and "{precision}" was asked for: export the run again')
    if checkpoint not in ("best", told["checkpoint"]):
        reasons.append(f'{folder} holds {told["checkpoint"]} alone, and checkpoint = "{checkpoint}" was asked for: '
                       "export that one")
    if reasons:
        _raise(reasons)
    converted.verify(folder)
    tokenizers = Tokenizers.load(folder / "tokenizer")
    return Opened(None, tokenizers, [run.config], [told["checkpoint"]], [CT2(folder, own, tokenizers, run.config)], [])


def _against_ct2(configs: Sequence[Config], device: str, precision: str) -> Iterator[Reason]:
    """Why CTranslate2 cannot serve these runs, whatever is asked."""
    if len(configs) > 1:
        yield f"ctranslate2 has no ensembles, and there are {len(configs)} runs"
    if device != "cpu":
        yield f'ctranslate2 runs on the processor here, and device = "{device}"'
    yield from (f"ctranslate2 cannot carry {reason}" for reason in ct2_model.refusals(configs[0].model))
    try:
        if precision not in (known := ct2_model.precisions()):
            yield f'ctranslate2 has no precision = "{precision}" for this processor: it has {" and ".join(known)}'
    except MissingExtra as error:
        yield error


def _against_torch(configs: Sequence[Config], device: str, precision: str) -> Iterator[Reason]:
    """Why torch cannot serve these runs, whatever is asked."""
    if precision == "int8":
        yield 'torch has no precision = "int8": it has float32 and bfloat16'


AGAINST: dict[str, Callable[[Sequence[Config], str, str], Iterator[Reason]]] = {
    "ctranslate2": _against_ct2, "torch": _against_torch}


def _raise(reasons: Sequence[Reason]) -> NoReturn:
    """Raise all reasons as one error."""
    if len(reasons) == 1 and isinstance(reasons[0], MissingExtra):
        raise reasons[0]
    raise ConfigError("\n".join(map(str, reasons)))


def _models(runs: Sequence[Run], tokenizers: Sequence[Tokenizers], chosen: Sequence[Path],
            device: str) -> Seq2Seq | Ensemble:
    """The models of runs, with the weights of a checkpoint of each, as one."""
    models = []
    for run, own, path in zip(runs, tokenizers, chosen, strict=True):
        model = build_model(run.config.model, own.source.size, own.target.size)
        checkpoints.put_weights(model, checkpoints.load(path).model, path)
        models.append(model.to(device))
    return models[0] if len(models) == 1 else Ensemble(models)


def _misfits(run: Run, own: Tokenizers, first: Run, others: Tokenizers) -> Iterator[str]:
    """Why a model cannot answer together with the first one."""
    for reason in own.unlike(others):
        yield f"{run.folder} cannot answer as one with {first.folder}: {reason}. Train both with one tokenizer"
    settings = first.config.decode
    for side, longest, needed in (("encoder", run.config.model.encoder.longest, settings.max_source_tokens + 1),
                                  ("decoder", run.config.model.decoder.longest, settings.max_length)):
        if longest is not None and longest < needed:
            yield (f"{run.folder} cannot answer as one with {first.folder}: its {side} has max_positions = {longest}, "
                   f"and the [decode] of the first needs {needed}. Name the run with fewer positions first")
