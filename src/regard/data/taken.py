"""Tokenizers that are taken from another run: `[tokenizer] take_from = RUN`.

They are read there once; the run's own copy serves from then on, so that the other run may change or go.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from regard.config import Config, TokenizerConfig, read_config
from regard.config_model import RNNDecoderConfig
from regard.errors import ConfigError, RunError
from regard.text.tokenizer import Tokenizer, Tokenizers


def taken(config: Config, run: Path) -> Tokenizers | None:
    """The tokenizers that a run takes from another; None: it makes its own.

    Args:
        config: its [tokenizer] says from where.
        run: the run's folder; once it has checkpoints, its own copy is all that counts.

    Raises:
        RunError: there is no such run, or its tokenizers, or the copy, are damaged.
        ConfigError: as for `take`.
    """
    other, own = config.tokenizer.take_from, run / "tokenizer"
    if other is None:
        return None
    if has_begun(run) or (not other.exists() and own.is_dir()):
        return _with_merges(Tokenizers.load(own), config.tokenizer)
    return take(config, other)


def has_begun(run: Path) -> bool:
    """Whether a run has learned from its data."""
    return any((run / "checkpoints").glob("step-*"))


def take(config: Config, other: Path) -> Tokenizers:
    """Read the tokenizers of another run.

    Raises:
        RunError: there is no such run, or its tokenizers are damaged.
        ConfigError: they are not what [tokenizer] says besides, or do not fit the model; or there is dropout, and they
            have no merges.
    """
    if not (other / "config.toml").is_file():
        raise RunError(f"{other}: [tokenizer] take_from names no run: "
                       f"{'it has no config.toml' if other.exists() else 'there is no such folder'}. Expected a folder "
                       "that `regard train CONFIG --out RUN` made")
    tokenizers, made = Tokenizers.load(other / "tokenizer"), read_config(other / "config.toml")
    found = ", ".join(f"{name} {each.kind} of {each.size:,}" for name, each in _sides(tokenizers))
    if unlike := list(_unlike(config.tokenizer, tokenizers, made.tokenizer)):
        raise ConfigError(f"[tokenizer]: {', '.join(unlike)} is not what take_from = {other} has ({found}). Leave it "
                          "out, or leave take_from out to make new tokenizers")
    decoder = config.model.decoder
    shared = [setting for setting, wanted in (('tie = "all"', config.model.tie == "all"),
                                              ("copy = true", isinstance(decoder, RNNDecoderConfig) and decoder.copy))
              if wanted]
    if shared and not tokenizers.shared:
        raise ConfigError(f"[model]: {' and '.join(shared)} needs one vocabulary for both sides, and take_from = "
                          f'{other} has two ({found}): use tie = "decoder" without copy, or other tokenizers')
    return _with_merges(tokenizers, config.tokenizer)


def _with_merges(tokenizers: Tokenizers, asked: TokenizerConfig) -> Tokenizers:
    """Tokenizers that have merges to leave out, where that is asked for; others are refused."""
    strange = [each.kind for each in tokenizers if each.kind != "bpe"]
    if asked.dropout and strange:
        raise ConfigError(f"[tokenizer]: dropout = {asked.dropout} leaves out merges, which {strange[0]}, taken from "
                          f"{asked.take_from}, does not have: leave dropout out, or take bpe tokenizers")
    return tokenizers


def digest_of(tokenizers: Tokenizers) -> str:
    """SHA-256 of all that tokenizers are."""
    return hashlib.sha256(json.dumps([[each.kind, each.vocabulary] for _, each in _sides(tokenizers)]).encode()
                          ).hexdigest()


def _sides(tokenizers: Tokenizers) -> list[tuple[str, Tokenizer]]:
    """Each tokenizer and what it is for."""
    return ([("shared", tokenizers.source)] if tokenizers.shared
            else [("source", tokenizers.source), ("target", tokenizers.target)])


def _unlike(asked: TokenizerConfig, tokenizers: Tokenizers, made: TokenizerConfig) -> Iterator[str]:
    """The settings that were given beside take_from, and are not those of the tokenizers.

    Text with few pieces yields fewer entries than were asked for: asking for as many again is no difference.
    """
    if ({"shared", "source"} & asked.model_fields_set) and asked.is_shared != tokenizers.shared:
        yield f"shared = {str(asked.is_shared).lower()}"
    for wanted, own, first in zip(asked.sides, tokenizers, made.sides, strict=True):
        sizes = {own.size} | ({first.size} if made.take_from is None else set())
        if "kind" in wanted.model_fields_set and wanted.kind != own.kind:
            yield f'kind = "{wanted.kind}"'
        elif "size" in wanted.model_fields_set and wanted.size not in sizes:
            yield f"size = {wanted.size}"
        if asked.source is None and tokenizers.shared:
            return
