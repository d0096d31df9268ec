"""`regard plan`: what a training will take, before it begins."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.options import ConfigFile, Json, Settings
from regard.cli.output import figures, say
from regard.cli.train import default_run
from regard.errors import ConfigError

if TYPE_CHECKING:
    from regard.training.plan import GPU, Forecast


def plan(
    config: ConfigFile,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="The run's folder, as for `regard train`.")] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.1, help="How long to measure updates.")] = 10.0,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="Forecast it for N GPUs too.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="KIND", help="rtx4090, l4, a100, h100, h200 or b200.")] = None,
    teraflops: Annotated[float | None, typer.Option(metavar="T", min=0, help="Another GPU's peak in bfloat16.")] = None,
    gigabytes: Annotated[float | None, typer.Option(metavar="G", min=0, help="Another GPU's memory.")] = None,
    utilisation: Annotated[float, typer.Option(metavar="U", min=0.01, max=1, help="Share of that peak reached.")] = 0.3,
    as_json: Json = False,
) -> None:
    """Tell what a training will take: parameters, arithmetic, memory, time.

    Makes the tokenizer and the prepared data if they are missing, as `regard train` would, makes a few updates on this
    machine and throws them away. With --gpus, also what N GPUs that need not be here would take: from the model's
    arithmetic, the GPU's peak (a100 unless --gpu says otherwise) and the share of it that is assumed to be reached.

    \b
    Examples:
      regard plan en-de.toml
      regard plan en-de.toml --gpus 8 --gpu h100
    """
    from regard.config import read_config
    from regard.data.shards import prepare
    from regard.training.plan import GPU, forecast, gpu_named
    from regard.training.run import Run

    if gpus is None and (gpu is not None or teraflops is not None or gigabytes is not None):
        raise ConfigError("--gpu, --teraflops and --gigabytes describe GPUs: say with --gpus how many there are")
    if (teraflops is None) != (gigabytes is None):
        raise ConfigError("--teraflops and --gigabytes describe a GPU together: give both or neither")
    kind = GPU(teraflops, gigabytes) if teraflops and gigabytes else gpu_named(gpu or "a100")
    checked = read_config(config, settings or ())
    folder = out or default_run(config)
    if not (folder / "config.toml").is_file():
        Run.create(folder, checked)
    found = forecast(checked, prepare(checked, folder, say), seconds, say)
    if as_json:
        figures(found.figures() | ({"gpus": found.on(kind, gpus, utilisation)} if gpus else {}))
        return
    for line in (*_told(found), *(_clustered(found, kind, gpus, utilisation) if gpus else ())):
        typer.echo(line)


def _told(found: "Forecast") -> Iterator[str]:
    """What a person reads about this machine."""
    yield (f"parameters    {found.parameters:,}: encoder {found.encoder:,}, decoder {found.decoder:,}, "
           f"embeddings {found.embeddings:,}")
    yield (f"training      {found.updates:,} updates, {found.epochs:.1f} epochs, {found.target_tokens / 1e6:,.1f} "
           "million target tokens")
    yield (f"arithmetic    {found.operations / 1e9:,.1f} GFLOP an update, "
           f"{found.operations * found.updates / 1e15:,.2f} PFLOP in all")
    yield "on this machine"
    yield (f"  time        {_duration(found.seconds)}: {1000 * found.update_seconds:,.0f} ms an update, "
           f"{found.validation_seconds:.1f} s a validation")
    yield (f"  speed       {found.target_tokens / found.updates / found.update_seconds:,.0f} target tokens/s, "
           f"{found.operations / found.update_seconds / 1e9:,.0f} GFLOP/s in {found.precision}")
    yield f"  memory      {found.memory / 1e9:.2f} GB, of it {found.activations / 1e9:.2f} GB for the largest batch"


def _clustered(found: "Forecast", kind: "GPU", gpus: int, utilisation: float) -> Iterator[str]:
    """What a person reads about GPUs that need not be here."""
    there = found.on(kind, gpus, utilisation)
    yield f"on {gpus} GPU{'s' * (gpus > 1)} of {kind.teraflops:,.0f} TFLOP/s, {utilisation:.0%} of it reached (assumed)"
    yield f"  time        {_duration(there['seconds'])}, validations not counted"
    for name, title in (("memory", "weights on each"), ("memory_sharded", "weights shared")):
        share = there[name] / 1e9
        fits = "fits" if share < 0.9 * kind.gigabytes else "does not fit"
        yield f"  memory      {share:.2f} GB of {kind.gigabytes:,.0f} each, {title}: {fits}"


def _duration(seconds: float) -> str:
    """Such as 47 s, 12 min or 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
