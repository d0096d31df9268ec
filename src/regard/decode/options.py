"""What one call may ask of a search, and what of it cannot be."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Self, TypedDict

from pydantic import Field, ValidationError

from regard.config import DecodeConfig
from regard.config_model import AnyModelConfig, RNNDecoderConfig
from regard.errors import ConfigError


class Asked(TypedDict, total=False):
    """What a call of `translate` or `stream` may ask. What it leaves out, or gives as None, the run's [decode] says.

    All settings of [decode] (`regard.config.DecodeConfig` tells what each means), and besides:

        nbest             outputs wanted of each text; those after the first are `alternatives`. No two of a beam have
                          the same text, so there may be fewer; samples are given as they are drawn
        prefix            what outputs begin with: one text for all, or an iterable with one for each
        force             phrases that each output holds (Post and Vilar 2018): a list for all texts, or an iterable
                          with a list for each
        ban               phrases that no output holds, but for its prefix
        scores            false: texts alone, with NaN as their scores; ctranslate2 is faster so with a beam of 1
        token_scores      give log-probability and entropy of each token
        tree              give the beam's tree
        batch_sentences   most texts of one batch

    Phrases count as the tokenizer writes them: where words are parted, a banned word takes along longer words that
    begin with the same tokens, and is not seen in other tokens.
    """

    beam: int | None
    nbest: int | None
    length_penalty: float | None
    length_penalty_kind: str | None
    coverage_penalty: float | None
    max_length: int | None
    max_ratio: float | None
    max_extra: int | None
    min_length: int | None
    min_ratio: float | None
    groups: int | None
    diversity: float | None
    sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    prefix: str | Iterable[str] | None
    force: Iterable[str] | Iterable[Iterable[str]] | None
    ban: Iterable[str] | None
    no_repeat_ngram: int | None
    replace_unknown: bool | None
    scores: bool | None
    token_scores: bool | None
    tree: bool | None
    max_source_tokens: int | None
    batch_tokens: int | None
    batch_sentences: int | None


class Options(DecodeConfig):
    """How to search for one call: [decode] with what the call changes, and what belongs to a call alone."""

    nbest: int = Field(1, ge=1)
    ban: tuple[str, ...] = ()
    scores: bool = True
    token_scores: bool = False
    tree: bool = False
    batch_sentences: int | None = Field(None, ge=1)

    @classmethod
    def of(cls, settings: DecodeConfig, given: Mapping[str, Any], models: Sequence[AnyModelConfig]) -> Self:
        """Check what a call asks, on top of [decode].

        Args:
            settings: the run's [decode].
            given: as `Asked`, prefix and force left to the caller but for whether they are there.
            models: that will be searched.

        Raises:
            ConfigError: what cannot be, all of it at once.
        """
        base = settings.model_dump()
        values = {name: value for name, value in given.items() if name not in ("prefix", "force")}
        options: Any
        try:
            options, found = cls.model_validate(base | values), []
        except ValidationError as error:
            found = [fault for fault in error.errors() if fault["loc"]]
            bad = {fault["loc"][0] for fault in found}
            options = cls.model_construct(None, **base | {key: each for key, each in values.items() if key not in bad})
        if faults := [*map(_fault, found), *options.reasons(), *_conflicts(options, given.keys(), models)]:
            raise ConfigError("\n".join(faults))
        checked: Self = options
        return checked

    @property
    def outputs(self) -> int:
        """How many a search must find of each text: of a beam, all where equal texts may be left out."""
        return self.nbest if self.sample or self.nbest == 1 else self.beam


def _fault(fault: Any) -> str:
    """One fault that pydantic found in an option."""
    name, bounds = fault["loc"][0], fault.get("ctx", {})
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(name), Asked.__annotations__, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else f"There are: {', '.join(Asked.__annotations__)}"
        return f'there is no option "{name}". {hint}'
    wanted = [words.format(bounds[key]) for key, words in _BOUNDS.items() if key in bounds]
    return f"{name} = {fault['input']}: {wanted[0] if wanted else fault['msg'].lower()}"


_BOUNDS = {"ge": "expected {:g} or more", "gt": "expected more than {:g}", "le": "expected at most {:g}",
           "expected": "expected {}"}


def _conflicts(options: Options, given: Set[str], models: Sequence[AnyModelConfig]) -> Iterator[str]:
    """Options that cannot work together, or not with these models."""
    if options.token_scores and not options.scores:
        yield "token_scores means nothing with scores = False, which gives texts alone: leave one of them out"
    if options.sample:
        for name in sorted(given & {"beam", "groups", "diversity", "force", "tree"}):
            if name not in ("beam", "groups") or getattr(options, name) > 1:
                yield f"{name} means nothing with sample, which draws one token after the other: leave one of them out"
    else:
        for name in sorted(given & {"temperature", "top_k", "top_p", "seed"}):
            yield f"{name} = {getattr(options, name, None)} means nothing without sample: set sample, or leave it out"
        if options.nbest > options.beam:
            yield (f"nbest = {options.nbest} with beam = {options.beam}: a search that keeps {options.beam} "
                   "hypotheses cannot give more outputs. Raise beam, or ask for fewer")
        if options.groups == 1 and "diversity" in given:
            yield f"diversity = {options.diversity} means nothing without groups: set groups = {options.beam}, or fewer"
        if options.groups > 1 and "force" in given:
            yield f"force with groups = {options.groups}: forced phrases share the beam out another way; use groups = 1"
    if not any(attends(model) for model in models):
        for name in ("coverage_penalty", "replace_unknown"):
            if getattr(options, name):
                yield f"{name} needs attention to the source, and this model has only a fixed vector: leave it out"
    for side, needed, name in (("encoder", options.max_source_tokens + 1, "max_source_tokens"),
                               ("decoder", options.max_length, "max_length")):
        for longest in {getattr(model, side).longest for model in models} - {None}:
            if longest < needed:
                yield (f"{name} = {getattr(options, name)} is over what the {side}'s max_positions = {longest} allow: "
                       "lower it")


def attends(model: AnyModelConfig) -> bool:
    """Whether the decoder looks at the source's states; else it knows the fixed vector alone."""
    return not isinstance(model.decoder, RNNDecoderConfig) or model.decoder.attention != "none"
