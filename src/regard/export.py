"""A run for other engines, or only what is needed to translate.

    report = export("runs/en-de", "en-de.ct2", to="ctranslate2", precision="int8")
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regard.config import write_config
from regard.engines import converted, ct2_model
from regard.engines.check import Agreement, sample_of
from regard.engines.converted import about, new_folder
from regard.engines.engine import PRECISIONS, Torch
from regard.errors import ConfigError, RunError
from regard.text.tokenizer import Tokenizers
from regard.training import checkpoint as checkpoints
from regard.training.run import Run
from regard.training.start_from import differences
from regard.translator import load

SAMPLE = 100
"""Sentences that an export is checked on."""


def export(run: str | Path | Sequence[str | Path], out: str | Path, to: str, precision: str | None = None,
           checkpoint: str = "best", sample: Sequence[str] | None = None, force: bool = False) -> Agreement | None:
    """Write a folder that `regard.load` takes, whole and checked, or nothing.

    Args:
        run: the run's folder; or several, for a folder that holds the mean of their weights: of runs that were trained
            further from one, it often translates better than any of them (Wortsman et al. 2022, "Model soups").
        out: the new folder.
        to: "ctranslate2", for its engine and for CTranslate2 alone; or "folder", a run without its training.
        precision: for CTranslate2: "float32", "bfloat16" or "int8"; None: float32.
        checkpoint: as `regard.load` takes it.
        sample: sources for CTranslate2 to be checked on; None: the run's test or validation set, else made-up ids.
        force: replace a folder that an earlier export made.

    Returns:
        for CTranslate2, how far it is from the run; else None.

    Raises:
        ConfigError: what cannot be exported, with all reasons.
        RunError: there is no such run or checkpoint; `out` is there already, or cannot be written.
        Unlike: CTranslate2 does not translate the sample as the run does.
    """
    runs, out = [Run.open(each) for each in ([run] if isinstance(run, str | Path) else run)], Path(out)
    if reasons := list(_refusals(runs, to, precision, sample)):
        raise ConfigError("\n".join(reasons))
    for opened in runs:
        if (before := about(opened.folder)) and before["to"] == "ctranslate2":
            raise RunError(f"{opened.folder}: was exported for CTranslate2 and holds no checkpoint: export the run "
                           "that it was made from")
    chosen = [opened.find(checkpoint) for opened in runs]
    _refuse_taken(out, force)
    told: dict[str, Any] = {"to": to, "precision": precision or "float32",
                            "checkpoint": chosen[0].name if len(runs) == 1 else "average"}
    with new_folder(out, told, lambda taken: force) as folder:
        agreement = WAYS[to](runs[0], chosen, folder, told["precision"], sample)
        told["check"] = None if agreement is None else asdict(agreement)
    return agreement


def _refusals(runs: Sequence[Run], to: str, precision: str | None, sample: Sequence[str] | None) -> Iterator[str]:
    """Why runs cannot be exported so."""
    if not runs:
        yield "export: expected a run's folder, or several, and got none"
        return
    if to not in WAYS:
        yield f'to = "{to}": expected {" or ".join(WAYS)}'
    if precision not in (None, *PRECISIONS):
        yield f'precision = "{precision}": expected {", ".join(PRECISIONS[:-1])} or {PRECISIONS[-1]}'
    if to == "ctranslate2":
        for reason in ct2_model.refusals(runs[0].config.model):
            yield f"[model] {reason}; CTranslate2 cannot carry it. `--to folder` carries every model"
    for name, value in (("precision", precision), ("sample", sample)) if to == "folder" else ():
        if value is not None:
            yield f"{name} means nothing for a folder, which holds the weights as they are: leave it out"
    if len(runs) > 1 and to == "ctranslate2":
        yield "several runs become one in a folder: export them with --to folder, and that folder to ctranslate2"
    for other in runs[1:]:
        yield from _unlike(runs[0], other)


def _unlike(first: Run, other: Run) -> Iterator[str]:
    """Why the weights of two runs have no mean."""
    own, others = (Tokenizers.load(run.folder / "tokenizer") for run in (other, first))
    for reason in own.unlike(others):
        yield f"{other.folder} has no mean with {first.folder}: {reason}. Train both with one tokenizer"
    if changed := sorted(differences(other.config.model, first.config.model)):
        yield f"{other.folder} has no mean with {first.folder}: it was trained with {', '.join(changed)}"


def _refuse_taken(out: Path, force: bool) -> None:
    """Refuse to write over anything but an earlier export."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and about(out)):
        raise RunError(f"{out}: is there already, and no export made it; nothing was written. Choose another --out")
    if out.exists() and not force:
        raise RunError(f"{out}: is there already; nothing was written. Add --force to replace it, or choose another "
                       "--out")


def _to_ctranslate2(run: Run, chosen: Sequence[Path], folder: Path, precision: str,
                    sample: Sequence[str] | None) -> Agreement:
    """Convert, and check."""
    translator = load(run.folder, str(chosen[0]))
    sources = sample_of(run.config, translator.tokenizers, SAMPLE, sample)
    own, = translator.engines
    assert isinstance(own, Torch)
    return converted.convert(own, translator.tokenizers, run.config, precision, folder, sources)


def _to_folder(run: Run, chosen: Sequence[Path], folder: Path, precision: str, sample: Sequence[str] | None) -> None:
    """Config, tokenizer, and one checkpoint without its optimizer: the one chosen, or the mean of several."""
    if len(chosen) == 1:
        saved = checkpoints.load(chosen[0])
        name, weights, state = chosen[0].name, saved.model, saved.state
    else:
        name, weights, state = "average", checkpoints.mean_weights(chosen), {"step": 0, "of": list(map(str, chosen))}
    with checkpoints.disk_errors(folder):
        (folder / "tokenizer").mkdir()
        Tokenizers.load(run.folder / "tokenizer").save(folder / "tokenizer")
        write_config(run.config, folder / "config.toml")
    place = folder / "checkpoints" / name
    checkpoints.save(place, checkpoints.Checkpoint(weights, {}, state))
    readable = (folder / "config.toml").stat().st_mode
    for file in place.iterdir():  # safetensors writes files that nobody else may read
        file.chmod(readable)
    load(folder, name)


WAYS: dict[str, Callable[[Run, Sequence[Path], Path, str, Sequence[str] | None], Agreement | None]] = {
    "ctranslate2": _to_ctranslate2, "folder": _to_folder}
