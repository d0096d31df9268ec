"""Fine-tuning: a run whose first weights are those of another, `[train] start_from = RUN`.

Weights are taken by name. Where the vocabularies differ, the rows of the embeddings and of the output table are taken
by token; the rows of new tokens stay random, as a fresh model has them. All else must be the same, or nothing is begun.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from regard.config import Config
from regard.config_model import DECODERS, ENCODERS, AnyModelConfig, written
from regard.data.taken import has_begun, take, taken
from regard.errors import CheckpointError, ConfigError, RunError
from regard.model.seq2seq import build_model
from regard.text.tokenizer import SPECIALS, Tokenizer, Tokenizers
from regard.training import checkpoint as checkpoints
from regard.training.changes import FREE
from regard.training.checkpoint import weights_of
from regard.training.run import Run

SIDES = {"encoder.embedding.weight": "source", "decoder.embedding.weight": "target", "output": "target"}
"""The tables with a row for each token, and the side whose tokens they are; a table that both sides share is output."""
KEY = "start_from"
"""What state.json of each checkpoint calls what `begin` found."""
NAMED = 3
"""So many weights of a kind are named where a model does not fit."""


@dataclass(frozen=True)
class Start:
    """A run's checkpoint, and the weights in it.

    Attributes:
        run: that it is of.
        path: of the checkpoint.
        sha256: of its model.safetensors.
        weights: by name.
        tokenizers: of the run.
    """

    run: Run
    path: Path
    sha256: str
    weights: Mapping[str, Tensor]
    tokenizers: Tokenizers

    @classmethod
    def read(cls, path: Path) -> "Start":
        """Read a run's best checkpoint, or a certain one.

        Args:
            path: a run's folder, or a checkpoint's in it.

        Raises:
            RunError: there is neither, or the run has no checkpoint.
            CheckpointError: it is damaged.
        """
        if (path / checkpoints.MANIFEST).is_file() and (path.parent.parent / "config.toml").is_file():
            run, found = Run.open(path.parent.parent), path
        else:
            try:
                run = Run.open(path)
                found = run.best()
            except RunError as error:
                raise RunError(f"[train] start_from: {error}") from None
        hashes = checkpoints.verify(found)
        try:
            weights = load_file(found / "model.safetensors")
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{found}: cannot be read: {error}") from None
        return cls(run, found, hashes["model.safetensors"], weights, Tokenizers.load(run.folder / "tokenizer"))


def check(config: Config, out: Path, fresh: bool) -> None:
    """Find out whether a training can begin as its config says, before anything is written.

    Args:
        config: of the training.
        out: its folder; once that has checkpoints, it needs no other run.
        fresh: whether they will be deleted.

    Raises:
        RunError: [train] start_from or [tokenizer] take_from names what is no run, is damaged, or is `out` itself.
        ConfigError: the models differ in more than their vocabularies; each weight that does is told.
    """
    if has_begun(out) and not fresh:
        return
    if config.tokenizer.take_from is not None:
        _refuse_itself("[tokenizer] take_from", config.tokenizer.take_from, out)
        take(config, config.tokenizer.take_from) if has_begun(out) else taken(config, out)
    if config.train.start_from is not None:
        start = Start.read(config.train.start_from)
        _refuse_itself("[train] start_from", start.run.folder, out)
        with torch.device("meta"):
            model = build_model(config.model, len(SPECIALS), len(SPECIALS))
        refuse_unlike(start, config.model, model)


def refuse_unlike(start: Start, config: AnyModelConfig, model: nn.Module) -> None:
    """Refuse weights that are not those of a model, but for the numbers of rows of its tables of tokens.

    Raises:
        ConfigError: they differ; the first of each kind are named.
    """
    own, given = weights_of(model), start.weights
    unlike = [f"{name} {_shape(given[name])}, expected {_shape(own[name])}"
              for name in sorted(own.keys() & given.keys())
              if given[name].shape[name in SIDES :] != own[name].shape[name in SIDES :]]
    faults = [f"{title} {len(names):,} ({_first(names)})"
              for title, names in (("it lacks", sorted(own.keys() - given.keys())),
                                   ("it has beyond those", sorted(given.keys() - own.keys())),
                                   ("it has of another shape", unlike)) if names]
    settings = sorted(differences(start.run.config.model, config))
    if faults:
        faults = [f"of its {len(given):,} weights and this model's {len(own):,}, {'; '.join(faults)}"]
    if settings:
        faults.append(f"it was trained with {_first(settings, 2 * NAMED)}")
    if faults:
        raise ConfigError(f"[train] start_from: {start.path} does not fit [model]: {'; and '.join(faults)}. Only "
                          "vocabularies and dropout may differ: give [model] as there, or leave start_from out")


def begin(path: Path, config: Config, model: nn.Module,
          tokenizers: Tokenizers) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The first weights of a model that starts from another run.

    Args:
        path: of that run, or of a checkpoint in it.
        config: of the training.
        model: new, with random weights.
        tokenizers: that it will be used with.

    Returns:
        the weights by name; and for state.json the checkpoint, its SHA-256, and for each side (or "shared") how many
        tokens were "kept", are "new", and were "dropped".

    Raises:
        RunError, CheckpointError: as for `Start.read`.
        ConfigError: as for `refuse_unlike`.
    """
    start = Start.read(path)
    refuse_unlike(start, config.model, model)
    facts: dict[str, Any] = {"checkpoint": str(start.path), "sha256": start.sha256, "tokens": {}}
    places, weights = {}, {name: tensor.cpu().clone() for name, tensor in weights_of(model).items()}
    for side, old, new in zip(("source", "target"), start.tokenizers, tokenizers, strict=True):
        places[side] = _matched(old, new)
        if side == "target" and start.tokenizers.shared and tokenizers.shared:
            facts["tokens"] = {"shared": facts["tokens"]["source"]}
        else:
            kept, taken = len(places[side]), len(set(places[side].values()))
            facts["tokens"][side] = {"kept": kept, "new": new.size - kept, "dropped": old.size - taken}
    for name, tensor in start.weights.items():
        if name in SIDES:
            rows = torch.tensor([(to, row) for to, row in places[SIDES[name]].items()])
            weights[name][rows[:, 0]] = tensor[rows[:, 1]]
        else:
            weights[name] = tensor
    return weights, facts


def told(facts: Mapping[str, Any]) -> Iterator[str]:
    """What `begin` has found, for people: where the weights are from, and a line for each vocabulary."""
    yield f"weights of {facts['checkpoint']}, sha256 {facts['sha256'][:12]}"
    for side, count in facts["tokens"].items():
        yield (f"{side} vocabulary: kept {count['kept']:,} of {count['kept'] + count['new']:,} tokens; "
               f"{count['new']:,} new; {count['dropped']:,} of the old dropped")


def _matched(old: Tokenizer, new: Tokenizer) -> dict[int, int]:
    """For each id of the new vocabulary whose token the old one has, the id there; special tokens by their role."""
    known = {token: id for id, token in enumerate(_tokens(old, new.kind))}
    return {id: known[token] for id, token in enumerate(_tokens(new, old.kind)) if token in known}


def _tokens(tokenizer: Tokenizer, other: str) -> Sequence[tuple[bool, str]]:
    """What each id stands for, and whether it is special.

    Kinds write the same thing in unlike ways: a token of `space` is a word, which the pieces of `bpe` begin with ▁.
    """
    entries = tokenizer.vocabulary.entries
    if tokenizer.kind != other:
        shown = tokenizer.texts(range(tokenizer.size)) if tokenizer.kind in ("byte", "char") else entries
        entries = [f"▁{entry}" for entry in entries] if tokenizer.kind == "space" else shown
    return [(True, name) for name in SPECIALS] + [(False, entry) for entry in entries[len(SPECIALS):]]


def differences(then: AnyModelConfig, now: AnyModelConfig) -> Iterator[str]:
    """The settings of a model that weights of the same shapes depend on, where they differ."""
    before, after = _settings(then), _settings(now)
    for name in before.keys() & after.keys():
        if before[name] != after[name] and not any(part in name for part in FREE):
            yield f"{name} = {written(before[name])} (here {written(after[name])})"


def _settings(model: AnyModelConfig) -> dict[str, Any]:
    """The settings of a model by their names, those of each side with its name before them."""
    sides = ((name, getattr(model, name), each) for name, each in (("encoder", ENCODERS), ("decoder", DECODERS)))
    own = {f"{name}.{field}": getattr(side, field) for name, side, families in sides
           for field in families[side.kind].model_fields}
    return own | {"tie": model.tie, "reverse_source": model.reverse_source}


def _refuse_itself(setting: str, other: Path, out: Path) -> None:
    """Refuse a run that would begin with itself."""
    if other.resolve() == out.resolve():
        raise ConfigError(f"{setting}: {other} is the folder that this training writes to. Choose another --out")


def _first(names: Sequence[str], most: int = NAMED) -> str:
    """The first of some names."""
    return ", ".join(names[:most]) + ", …" * (len(names) > most)


def _shape(tensor: Tensor) -> str:
    """Such as 256 x 1024."""
    return " x ".join(map(str, tensor.shape))
