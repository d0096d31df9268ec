"""`regard verify`: proof that a run goes on exactly, and that its checkpoints are whole."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard.cli.options import Json, RunFolder
from regard.cli.output import figures, progress, say

if TYPE_CHECKING:
    from regard.training.verify import Verification


def verify(
    run: RunFolder,
    steps: Annotated[int, typer.Option(metavar="N", min=2, help="Updates to train in one go, and with a stop.")] = 8,
    as_json: Json = False,
) -> None:
    """Prove that a run goes on exactly after a stop, and that its checkpoints are whole.

    Holds every checkpoint against its SHA-256. Then trains N updates with the run's own config and data, and again N/2,
    a stop, and the rest in a new process; the losses of all updates and the last weights, optimizer and random state
    must be the same, bit by bit. Exit code 1 if anything is not. Nothing is written into RUN, but into a temporary
    folder; the environment's TMPDIR says where.

    \b
    Examples:
      regard verify runs/en-de
      regard verify runs/en-de --steps 500 --json
    """
    from regard.training.run import Run
    from regard.training.verify import verify_checkpoints, verify_resume

    opened = Run.open(run)
    say("reading the checkpoints")
    checkpoints = verify_checkpoints(opened)
    if not as_json:
        for name, fault in checkpoints.items():
            typer.echo(f"{name}: {fault or 'whole'}")
    with progress(f"training {steps:,} updates twice", 2 * steps, unit="updates") as advance:
        found = verify_resume(opened, steps, advance)
    if as_json:
        figures({"run": str(run), "checkpoints": checkpoints, **_facts(found)})
    else:
        typer.echo(_told(found))
    if found.difference or any(checkpoints.values()):
        raise typer.Exit(1)


def _facts(found: "Verification") -> dict[str, Any]:
    """What was found, as JSON takes it."""
    return {
        "steps": found.steps,
        "stopped_at": found.stopped_at,
        "losses": [loss for _, (loss, _) in sorted(found.outcome.losses.items())],
        "sha256": found.outcome.digests(),
        "equal": found.difference is None,
        "difference": found.difference,
    }


def _told(found: "Verification") -> str:
    """What was found, for a person."""
    trained = f"{found.steps:,} updates, and {found.stopped_at:,}, a stop and {found.steps - found.stopped_at:,} more"
    if found.difference:
        return f"{trained}: they differ. {found.difference}"
    digests = "".join(f"\n  {part:<13} SHA-256 {digest}" for part, digest in found.outcome.digests().items())
    return f"{trained}: the same, bit by bit, in {len(found.outcome.losses):,} losses and in{digests}"
