"""What may change in a config between the stop of a training and its going on.

    refused     what the weights, the tokens or the optimizer's state were made for
    past        where weights and tokenizers came from: they are here now, so that it means nothing any more
    warned of   what the order of the batches follows from: the training goes on, but not where it stood in its epoch
    told        all else: it holds from the next update on
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regard.config import Config
from regard.errors import RunError
from regard.training.progress import Reporter

REFUSED = {
    "model": "holds checkpoints of another model",
    "tokenizer": "holds checkpoints that learned from other tokens",
    "data.max_tokens": "holds checkpoints that learned from other data",
    "data.train.*.weight": "holds checkpoints that saw the corpora in other shares",
    "train.optimizer": "holds the state of another optimizer",
    "train.freeze": "holds the optimizer's state of other weights",
    "train.start_from": "holds checkpoints that began otherwise",
}
"""By the beginnings of their names, * for a number in a list, and why."""
FREE = ("dropout", "stochastic_depth")
"""Settings of a model that its weights do not depend on, by parts of their names."""
ORDER = {"train.batch_tokens", "train.seed"}
PAST = {"train.start_from", "tokenizer.take_from"}
LOCAL = {"train.threads", "train.device", "train.precision", "train.start_from"}
"""What may differ between processes that train together: of `precision`, what it comes to may not."""


def common_settings(config: Config, precision: str) -> dict[str, Any]:
    """What processes that train together must have alike, by name.

    Args:
        config: of this process.
        precision: what `train.precision` comes to here.
    """
    sections = config.model_dump(mode="json", include={"model", "train"})
    return {name: value for name, value in _flat(sections) if name not in LOCAL} | {"precision": precision}


def check_changes(folder: Path, before: Mapping[str, Any], config: Config, reporter: Reporter | None) -> None:
    """Refuse, warn of or tell what has changed in a run's config.

    Args:
        folder: of the run.
        before: the settings that it was trained with, nested as in TOML.
        config: those that it is to go on with.
        reporter: tells a person; None: nobody is told.

    Raises:
        RunError: a setting has changed with which going on is impossible; all of them are named.
    """
    changes = dict(_changes(before, config.model_dump(mode="json")))
    old = dict(_flat(before))
    past = [changes.pop(name) for name in sorted(PAST & changes.keys()) if old.get(name) is not None]
    refusals = [_refusal(folder, begin, why, told) for begin, why in REFUSED.items() if (told := [
        text for name, text in changes.items() if fnmatchcase(f"{name}.", f"{begin}.*") and not _is_free(name)])]
    if refusals:
        raise RunError("\n".join(refusals))
    if reporter is None:
        return
    if past:
        reporter.warn(f"{', '.join(past)}: means nothing any more, for the checkpoints hold what came of it. To begin "
                      "with another run, use --fresh or another --out")
    if order := [text for name, text in changes.items() if name in ORDER]:
        reporter.warn(f"{', '.join(order)}: this is another order of the data, so the rest of the epoch may show some "
                      "pairs again and leave others out, and the result is not that of one training")
    if others := [text for name, text in changes.items() if name not in ORDER]:
        reporter.say(f"changed since it stopped, and in effect from the next update on: {', '.join(others)}")


def _refusal(folder: Path, begin: str, why: str, told: list[str]) -> str:
    """Why it cannot go on, naming three of the settings at most."""
    section = begin.split(".")[0]
    named = ", ".join(text.removeprefix(f"{section}.") for text in told[:3]) + (" …" if len(told) > 3 else "")
    return (f"{folder}: {why}: [{section}] now has {named}. Put it back to go on, or begin anew with --fresh or "
            "another --out")


def _is_free(name: str) -> bool:
    return name.startswith("model.") and any(part in name.split(".")[-1] for part in FREE)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that differ, by name, as "train.steps = 200 (was 100)"; one that came later was at its default."""
    try:
        before = Config.model_validate(before).model_dump(mode="json")
        names = {*dict(_flat(before)), *dict(_flat(after))}
    except ValidationError:  # an older version's settings, and what is not among them is not known
        names = {*dict(_flat(before))}
    old, new = dict(_flat(before)), dict(_flat(after))
    for name in sorted(names):
        if old.get(name) != new.get(name):
            yield name, f"{name} = {new.get(name)!r} (was {old.get(name)!r})"


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as pairs of a name with dots and a value; sections in a list are counted from 1."""
    for name, value in settings.items():
        if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            value = {str(number): each for number, each in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
