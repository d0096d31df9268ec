"""The demo from end to end: data, three trainings, scores, pictures, and one page that shows it all.

    OUT/report.html
    OUT/data/             train.tsv, valid.tsv, test.tsv, and the prepared shards that the three models share
    OUT/rnn-fixed.toml    OUT/rnn-attention.toml    OUT/transformer.toml
    OUT/rnn-fixed/        OUT/rnn-attention/        OUT/transformer/        a run's folder each

Started again after an interruption, it goes on where it stood: finished models are not trained again.
"""

import tempfile
import time
from pathlib import Path

from regard.config import Config, read_config
from regard.demo import pronounce
from regard.demo.findings import TITLE, Findings, measure, unheard
from regard.demo.report import require_jinja, write_report
from regard.demo.screen import Screen
from regard.demo.stages import STAGES, Stage, write_stage
from regard.errors import ConfigError, Interrupted, RunError
from regard.training.loop import train

TASKS = ("pronounce",)

_OVERHEAD = 45  # seconds on two cores for everything but training: data, speed, scores, pictures
_LEAST_SHARE = 0.5  # of the time that goes to training, however little time there is
_MARGIN = 0.93  # of the measured speed, since validations and savings take time too


def run(out: Path, minutes: float = 6.0, task: str = "pronounce", screen: Screen | None = None) -> Path:
    """Train the three stages side by side, compare them, and write the report.

    Args:
        out: the folder that everything goes to; made if missing.
        minutes: for everything together, about; training gets what the rest leaves, but half at least.
        task: "pronounce", the only one there is.
        screen: where to show it; default: standard output.

    Returns:
        the path of report.html.

    Raises:
        MissingExtra: the extra "demo" is not installed.
        ConfigError: no such task, or minutes that are not above 0.
        RunError: the folder cannot be used, or holds a demo of other minutes.
        Interrupted: SIGINT or SIGTERM came during training, which has saved.
    """
    started = time.perf_counter()
    if task not in TASKS:
        raise ConfigError(f'demo: there is no task "{task}". Tasks: {", ".join(TASKS)}')
    if not minutes > 0:
        raise ConfigError(f"demo: minutes = {minutes}; expected a number above 0, such as 6")
    require_jinja()
    dictionary_file = pronounce.dictionary_file()
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file, and the demo needs a folder. Choose another --out")
    seconds = training_seconds(minutes)
    for stage in STAGES:
        check_minutes(out / f"{stage.name}.toml", out, seconds)
    screen = screen or Screen()
    with screen.busy("reading the dictionary"):
        dictionary = pronounce.read_dictionary(dictionary_file)
        pairs = pronounce.write_data(out / "data", dictionary)
    screen.opening(pairs, seconds)
    for stage in STAGES:
        screen.stage(stage)
        with screen.busy("measuring the speed of this machine"):
            config = configure(stage, out, seconds)
        train(config, out / stage.name)
    sources, references = pronounce.read_data(out / "data" / "test.tsv")
    words = unheard(dictionary)
    with screen.busy("pronouncing the test texts with all three"):
        results = [measure(stage, out / stage.name, sources, references, words) for stage in STAGES]
        title = pronounce.pronounce(TITLE, dictionary)
        found = Findings(results, words, title, pairs, minutes, time.perf_counter() - started)
        report = write_report(found, out / "report.html")
    screen.findings(found, report)
    return report


def training_seconds(minutes: float) -> float:
    """Seconds of training for each of the models, when everything together may take so many minutes."""
    total = 60 * minutes
    return max(total - _OVERHEAD, _LEAST_SHARE * total) / len(STAGES)


def check_minutes(config: Path, out: Path, seconds: float) -> None:
    """Refuse to go on with a demo that was begun with other minutes.

    Args:
        config: of one of its stages; it may be missing.
        out: the demo's folder.
        seconds: of training, as asked for now.

    Raises:
        RunError: the config says otherwise.
    """
    if not config.is_file():
        return
    begun = read_config(config).train.minutes
    if begun != _in_minutes(seconds):
        raise RunError(f"{out}: holds a demo of other --minutes: {config.name} trains for {begun} minutes, and now it "
                       f"would be {_in_minutes(seconds)}. Start it with the same --minutes to go on with it, or choose "
                       "another --out")


def configure(stage: Stage, out: Path, seconds: float) -> Config:
    """A stage's config: the one it was begun with, or a new one with as many updates as there is time for.

    Args:
        stage: which.
        out: the demo's folder, with its data.
        seconds: of training.
    """
    path = out / f"{stage.name}.toml"
    if not path.is_file():
        unmeasured = out / f".{stage.name}.toml"
        write_stage(stage, unmeasured, steps=10**6, minutes=_in_minutes(seconds))
        pace = seconds_per_update(read_config(unmeasured), min(5.0, max(1.5, 0.05 * seconds)))
        unmeasured.unlink()
        write_stage(stage, path, steps=max(1, round(_MARGIN * seconds / pace)), minutes=_in_minutes(seconds))
    return read_config(path)


def seconds_per_update(config: Config, seconds: float) -> float:
    """How long an update takes on this machine, by training for so many seconds into a folder that is then deleted.

    The learning rate's schedule must know how many updates there will be, so that it has fallen to 0 when time is up.
    """
    brief = config.train.model_copy(update={
        "minutes": seconds / 60, "log_every": 1, "validate_every": config.train.steps, "metric": "loss",
    })
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = train(config.model_copy(update={"train": brief}), folder, quiet=True).metrics()
        except Interrupted as stop:
            raise Interrupted(stop.signal, "Stopped while the speed of this machine was being measured. The same "
                              "command, started again, goes on with what is finished") from None
    times: list[float] = [row["seconds"] for row in rows if row["kind"] == "train"]
    warm = len(times) // 4  # the first updates wait for memory and threads
    before = times[warm - 1] if warm else 0.0
    return (times[-1] - before) / (len(times) - warm)


def _in_minutes(seconds: float) -> float:
    """As the config says it."""
    return round(seconds / 60, 3)
