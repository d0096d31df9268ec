"""Every setting of Regard, declared exactly once: its name, type, unit, default and meaning. Those of `[model]` are in
`config_model.py`, those of `[train]` in `config_train.py`.

A config is one TOML file. `read_config` reads and checks it, `write_config` writes it back with every default filled
in. Unknown keys are errors, and so are combinations that cannot work. Paths are relative to the config's own folder.
"""

import copy
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from regard.config_model import DECODERS, ENCODERS, MODELS, AnyModelConfig, RNNDecoderConfig, Section
from regard.config_train import CheckedSection, TrainConfig
from regard.errors import ConfigError

TokenizerKind = Literal["bpe", "unigram", "char", "byte", "space"]
PATHS = {"data": "root", "tokenizer": "take_from", "train": "start_from"}
"""Settings that are a path relative to the config's own folder, by their sections."""
DROPPING = ("dropout", "attention_dropout", "feedforward_dropout", "stochastic_depth")
"""The settings of a side of a model by which two passes over the same batch differ in training."""


class CorpusConfig(Section):
    """One parallel corpus: two files of which line n translates line n, or one file of tab-separated pairs."""

    source: Path | None = Field(None, description="text file, one sentence a line")
    target: Path | None = Field(None, description="text file, line n translates line n of source")
    pairs: Path | None = Field(None, description="instead of both: one file, source TAB target on each line")
    weight: float = Field(1.0, gt=0, le=1000, description="how often each of its pairs is seen in an epoch, on average")
    alignment: Path | None = Field(None, description="text file, line n holds the word links of pair n, such as "
                                   "0-0 1-2: source word, target word, counted from 0")

    @model_validator(mode="after")
    def _either_form(self) -> Self:
        two_files = self.source is not None and self.target is not None and self.pairs is None
        one_file = self.pairs is not None and self.source is None and self.target is None
        if not two_files and not one_file:
            raise ValueError("a corpus is { source = FILE, target = FILE } or { pairs = FILE }")
        return self


class DataConfig(Section):
    """Where the text is, and what is left out of it."""

    root: Path = Field(Path(), description="what the paths below are relative to; itself relative to this file")
    train: list[CorpusConfig] = Field(min_length=1, description="the corpora to learn from")
    valid: CorpusConfig = Field(description="the corpus that chooses the best checkpoint")
    test: CorpusConfig | None = Field(None, description="the corpus that `regard evaluate` scores by default")
    max_tokens: int = Field(256, ge=1, description="pairs with a longer side, in tokens, are left out and counted")
    bleu_tokenize: Literal["13a", "none", "char", "zh", "intl"] = Field("13a", description="how BLEU parts words: 13a "
                                                                        "for plain text, none for tokenised text")
    prepared: Path | None = Field(None, description="where the prepared shards go; default: data/ in the run's folder")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        parts = {"valid": self.valid, "test": self.test}
        unused = [f"{name}.{setting}" for name, corpus in parts.items() if corpus is not None
                  for setting in corpus.changed("weight", "alignment")]
        if unused:
            raise ValueError(f"{' and '.join(unused)}: only the corpora of train have these; leave them out")
        return self


class SideTokenizerConfig(Section):
    """The tokenizer of one side."""

    kind: TokenizerKind = Field("bpe", description="bpe | unigram | char | byte | space (already parted by spaces)")
    size: int = Field(8000, ge=8, description="entries of the vocabulary, special tokens included (bpe, unigram: exact "
                      "where the text yields so many; char, space: the most frequent; byte: always 260)")


class TokenizerConfig(SideTokenizerConfig, CheckedSection):
    """How text becomes tokens: one tokenizer for both sides, or one for each."""

    shared: bool = Field(True, description="one vocabulary for both sides; false: one for each, of the same kind")
    source: SideTokenizerConfig | None = Field(None, description="the source's own tokenizer; needs `target` too")
    target: SideTokenizerConfig | None = Field(None, description="the target's own tokenizer; needs `source` too")
    take_from: Path | None = Field(None, description="take the tokenizers of this run instead of making new ones; "
                                   "relative to this file. The settings above may be left out then")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of merges that are left out by chance in the training "
                           "text (BPE-dropout, Provilkov et al. 2020); 0 = none")
    samples: int = Field(16, ge=1, description="segmentations of each pair that are prepared, one for each epoch, in "
                         "turn; only with dropout")

    def reasons(self) -> Iterator[str]:
        if (self.source is None) != (self.target is None):
            yield "[tokenizer.source] and [tokenizer.target] come together: give both or neither"
        strange = [side.kind for side in self.sides if side.kind != "bpe"]
        if self.dropout and strange:
            yield (f'dropout = {self.dropout} leaves out merges, which kind = "{strange[0]}" does not have: use kind = '
                   '"bpe" for both sides, or leave dropout out')
        if not self.dropout:
            yield from (f"{samples} means nothing with dropout = 0: set dropout = 0.1, or leave samples out"
                        for samples in self.changed("samples"))

    @property
    def is_shared(self) -> bool:
        """Whether source and target have one vocabulary."""
        return self.shared and self.source is None

    @property
    def sides(self) -> tuple[SideTokenizerConfig, SideTokenizerConfig]:
        """The settings for the source and for the target."""
        return self.source or self, self.target or self


class DecodeConfig(CheckedSection):
    """How `regard translate` searches when its command line does not say."""

    beam: int = Field(5, ge=1, description="hypotheses kept; 1 = greedy")
    length_penalty: float = Field(1.0, ge=0, description="α: the higher, the better long outputs rank; 0 = none")
    max_length: int = Field(256, ge=1, description="longest output in tokens, </s> counted as in all lengths here")
    max_ratio: float = Field(2.0, ge=0, description="besides, no output is over max_ratio x source + max_extra tokens")
    max_extra: int = Field(10, ge=0, description="tokens that an output may be longer than max_ratio x source")
    min_length: int = Field(0, ge=0, description="shortest output in tokens")
    min_ratio: float = Field(0.0, ge=0, description="besides, no output is under min_ratio x source tokens")
    length_penalty_kind: Literal["power", "gnmt"] = Field("power", description="log-probability is divided by length^α "
                                                          "(power), or by (5 + length)^α / 6^α (gnmt, Wu et al. 2016)")
    coverage_penalty: float = Field(0.0, ge=0, description="β: how much less an output ranks that leaves parts of the "
                                    "source unseen (Wu et al. 2016, eq. 14); 0 = no less")
    groups: int = Field(1, ge=1, description="parts of the beam that avoid each other's tokens (Vijayakumar et al. "
                                             "2018); 1 = a plain beam")
    diversity: float = Field(0.5, ge=0, description="how much they avoid them, in nats; only with groups")
    sample: bool = Field(False, description="draw outputs from the model instead of searching the likeliest")
    temperature: float = Field(1.0, gt=0, description="of drawing: under 1 nearer to the likeliest, over 1 wilder")
    top_k: int | None = Field(None, ge=1, description="draw from so many likeliest tokens; default: from all")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest tokens that hold so much "
                                "probability (Holtzman et al. 2020); default: from all")
    seed: int = Field(1, ge=0, description="of drawing; the same seed and line give the same output")
    no_repeat_ngram: int = Field(0, ge=0, description="no output holds the same so many tokens twice; 0 = it may")
    replace_unknown: bool = Field(False, description="write the source's word where the model says <unk>")
    max_source_tokens: int = Field(1024, ge=1, description="longer input is not translated, and reported")
    batch_tokens: int = Field(8192, ge=1, description="padded source tokens x beam of one batch")

    def reasons(self) -> Iterator[str]:
        if self.beam % self.groups:
            wider = self.groups * (self.beam // self.groups + 1)
            yield f"groups = {self.groups} do not divide beam = {self.beam}: use beam = {wider}"
        if self.min_length > self.max_length:
            yield (f"min_length = {self.min_length} is over max_length = {self.max_length}: lower it, or raise "
                   "max_length")
        if self.max_ratio + self.max_extra < 1:
            yield (f"max_ratio = {self.max_ratio} and max_extra = {self.max_extra} leave no room for an output: raise "
                   "one of them")
        if self.min_ratio > self.max_ratio and self.max_extra == 0:
            yield f"min_ratio = {self.min_ratio} is over max_ratio = {self.max_ratio}: lower it, or raise max_ratio"


class Config(Section):
    """A whole experiment: data, tokenizer, model, training, search."""

    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: AnyModelConfig
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        reasons = "\n".join(f"[model]: {reason}" for reason in [*self.model.reasons(), *self._reasons()])
        if reasons:
            raise ValueError(reasons)
        return self

    def _reasons(self) -> Iterator[str]:
        """Why the model does not fit the other sections; nothing if it does."""
        encoder, decoder = self.model.encoder, self.model.decoder
        if self.model.tie == "all" and not self.tokenizer.is_shared:
            yield 'tie = "all" needs one vocabulary for both sides: set [tokenizer] shared = true, or tie = "decoder"'
        if isinstance(decoder, RNNDecoderConfig) and decoder.copy and not self.tokenizer.is_shared:
            yield ("copy = true needs a target vocabulary that holds the source's tokens: set [tokenizer] "
                   "shared = true, or leave copy out")
        if self.train.coverage_loss and not (isinstance(decoder, RNNDecoderConfig) and decoder.coverage):
            yield (f"[train] coverage_loss = {self.train.coverage_loss} means nothing without coverage = true: set it, "
                   "or leave coverage_loss out")
        if self.train.r_drop and not any(getattr(side, name, 0) for side in (encoder, decoder) for name in DROPPING):
            yield (f"[train] r_drop = {self.train.r_drop} compares two passes that differ by dropout alone, and there "
                   "is none: set dropout = 0.1, or leave r_drop out")
        yield from self._guidance()
        tokens, sources, outputs = self.data.max_tokens, self.decode.max_source_tokens, self.decode.max_length
        for side, needed, setting in ((encoder, tokens + 1, f"[data] max_tokens = {tokens} and </s>"),
                                      (encoder, sources + 1, f"[decode] max_source_tokens = {sources} and </s>"),
                                      (decoder, tokens + 1, f"[data] max_tokens = {tokens} and </s>"),
                                      (decoder, outputs, f"[decode] max_length = {outputs}")):
            if side.longest is not None and side.longest < needed:
                yield (f"max_positions = {side.longest} is too few for {setting}: use max_positions = {needed}, or "
                       f"lower {setting.split(' = ')[0]}")

    def _guidance(self) -> Iterator[str]:
        """Why attention cannot be guided by word alignments as these settings say; nothing if it can."""
        weight, layer, decoder = self.train.guided_alignment, self.train.guided_layer, self.model.decoder
        aligned = any(corpus.alignment is not None for corpus in self.data.train)
        if aligned and not weight:
            yield ("[data] train has an alignment, which means nothing with [train] guided_alignment = 0: set "
                   "guided_alignment = 0.05, or leave alignment out")
        if weight and not aligned:
            yield (f"[train] guided_alignment = {weight} needs word links: give a corpus of [data] train its "
                   "alignment = FILE, or leave guided_alignment out")
        if aligned and self.tokenizer.dropout:
            yield (f"[tokenizer] dropout = {self.tokenizer.dropout} gives each epoch other tokens, and the links of an "
                   "alignment are made between those of one segmentation: leave dropout or alignment out")
        if weight and isinstance(decoder, RNNDecoderConfig) and decoder.attention == "none":
            yield (f'[train] guided_alignment = {weight} needs an attention to guide, and attention = "none": set '
                   'attention = "before" or "after", or leave guided_alignment out')
        elif layer is not None and isinstance(decoder, RNNDecoderConfig):
            yield (f"[train] guided_layer = {layer} means nothing with an RNN's decoder, which has one attention: "
                   "leave guided_layer out")
        elif layer is not None and layer > decoder.layers:
            yield (f"[train] guided_layer = {layer} is over the decoder's {decoder.layers} layers: use guided_layer = "
                   f"{decoder.layers}, or leave it out")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config file.

    Args:
        path: the TOML file.
        overrides: "section.key=value" each, as given to `--set`. The value is TOML where it parses as TOML, else a
            string. A `data.root`, `train.start_from` or `tokenizer.take_from` given here is relative to the current
            folder.

    Raises:
        ConfigError: the file is missing or not TOML, or a setting is unknown, out of range or does not fit another;
            the message lists every fault at once.
    """
    path = Path(path)
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}. `regard init --list` shows what to "
                          "start from") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a config is a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(settings, override)
    return parse_config(settings, where=str(path), base=path.parent)


def parse_config(settings: dict[str, Any], where: str, base: Path) -> Config:
    """Check settings that were read from TOML (or made by a program), and make the paths of `PATHS` absolute.

    Args:
        settings: nested dicts, as TOML gives them.
        where: what error messages call the place the settings come from.
        base: the folder that those are relative to.
    """
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_fault(where, fault) for fault in _faults(settings, error))) from None
    changes = {}
    for section, name in PATHS.items():
        given = getattr(config, section)
        if (path := getattr(given, name)) is not None:
            changes[section] = given.model_copy(update={name: (base / path.expanduser()).resolve()})
    return config.model_copy(update=changes)


def write_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, so that `read_config` gives the same config back.

    Of tokenizers that are taken from another run, only what was given: the rest is that run's.
    """
    settings = config.model_dump(mode="json", exclude_none=True)
    if config.tokenizer.take_from is not None:
        settings["tokenizer"] = config.tokenizer.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")


def _override(settings: dict[str, Any], override: str) -> None:
    """Put one "section.key=value" into the settings; a path of `PATHS` is relative to the current folder."""
    key, separator, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not separator or not sections or not name:
        raise ConfigError(f"--set {override}: expected section.key=value, such as --set train.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    place = settings
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f'--set {override}: "{section}" is a value, not a section')
    if isinstance(value, str) and sections in [[section] for section, path in PATHS.items() if path == name]:
        value = str(Path.cwd() / Path(value).expanduser())
    place[name] = value


def _faults(settings: dict[str, Any], error: ValidationError) -> Iterator[Any]:
    """All faults that pydantic found, and those that it looks for only where no key is unknown."""
    faults = error.errors()
    yield from faults
    if {fault["type"] for fault in faults} == {"extra_forbidden"}:
        known = copy.deepcopy(settings)
        for fault in faults:
            *sections, name = _keys(fault["loc"])
            place: Any = known
            for section in sections:
                place = place[section]
            del place[name]
        try:
            Config.model_validate(known)
        except ValidationError as others:
            yield from (fault for fault in others.errors() if not fault["loc"])


def _keys(location: Sequence[str | int]) -> list[str | int]:
    """A place in the settings; pydantic names the class of a model or a side, too, where it has a choice of several."""
    return [part for before, part in zip([None, *location], location, strict=False)
            if not (before in ("model", "encoder", "decoder") and part in MODELS)]


def _fault(where: str, fault: Any) -> str:
    """What is to be said of one fault that pydantic found: where, what is, what was expected."""
    names = [str(part + 1) if isinstance(part, int) else part for part in _keys(fault["loc"])]
    kind = fault["type"]
    if kind == "extra_forbidden":
        return f'{_place(where, names[:-1])}: unknown key "{names[-1]}". {_hint(fault["loc"])}'
    if kind == "missing":
        return f'{_place(where, names[:-1])}: "{names[-1]}" is missing.'
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        sections = "" if len(names) > 1 else ", or give [model.encoder] and [model.decoder], each with its own"
        return f'{_place(where, names)}: kind must be "rnn", "conv" or "transformer"{sections}.'
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return "\n".join(f"{_place(where, names)}: {line}." if names else f"{where}, {line}."
                         for line in message.splitlines())
    message = message[:1].lower() + message[1:]
    return f"{_place(where, names[:-1])}: {names[-1]} = {fault['input']!r}: {message}."


def _place(where: str, names: Sequence[str]) -> str:
    """Such as "my.toml, [data.train.1]", counted from 1; the top of the file has no brackets."""
    return f"{where}, [{'.'.join(names)}]" if names else where


def _hint(location: Sequence[str | int]) -> str:
    """What may have been meant by an unknown key."""
    *sections, name = location
    known = _section(sections).model_fields
    owners = [f'kind = "{kind}"' for kind in ENCODERS if name in MODELS[kind].model_fields]
    if sections == ["model", "mixed"] and owners:
        return "Beside [model.encoder] and [model.decoder] it belongs into those: give it there."
    if sections[:1] == ["model"] and name in DECODERS["rnn"].model_fields and sections[2:] == ["encoder", "rnn"]:
        return "It is a decoder's: give it in [model.decoder]."
    if sections[:1] == ["model"] and owners:
        owner, this = " and ".join(owners), sections[-1]
        return f'It belongs to {owner}, and this is kind = "{this}": use that, or leave it out.'
    near = difflib.get_close_matches(str(name), known, n=1)
    return f'Did you mean "{near[0]}"?' if near else f"Known keys: {', '.join(known)}."


def _section(location: Sequence[str | int]) -> type[Section]:
    """The class of the section at a location."""
    section: Any = Config
    table: Mapping[str, type[Section]] = {}
    for part in location:
        if part in table:
            section, table = table[str(part)], {}
        elif part in ("train", "valid", "test") and section is DataConfig:
            section = CorpusConfig
        elif part in ("source", "target") and section is TokenizerConfig:
            section = SideTokenizerConfig
        elif part in ("model", "encoder", "decoder"):
            table = {"model": MODELS, "encoder": ENCODERS, "decoder": DECODERS}[str(part)]
        elif isinstance(part, str):
            section = section.model_fields[part].annotation
    found: type[Section] = section
    return found
