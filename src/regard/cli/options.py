"""Arguments and options that several commands share, so that they mean and say the same everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from regard.errors import ConfigError

if TYPE_CHECKING:
    from regard.translator import Translator

SEARCH, LENGTH, DRAW, WORDS, OUTPUT, SPEED = (
    "Search", "Length of an output, in tokens, </s> included", "Drawing instead of searching", "What an output holds",
    "What is printed", "Model and speed")


def _in(panel: str, metavar: str | None, help: str, *names: str) -> Any:
    """An option that help shows in a panel."""
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A config, such as `regard init` prints.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/en-de.")]
RunFolders = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="A run's folder, such as runs/en-de; several answer as one.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, such as train.steps=500. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Checkpoint = Annotated[str, _in(SPEED, "NAME", "best, last, average, a name such as step-00001000, or a path.")]
Device = Annotated[str, _in(SPEED, "NAME", "cpu, cuda, or auto: a GPU where there is one.")]
Engine = Annotated[str, _in(SPEED, "NAME", "torch: everything. ctranslate2: Transformers, greedy and beam search, "
                                      "fastest on a CPU. auto: for what is asked, the fastest that can do it.")]
Precision = Annotated[str | None, _in(SPEED, "NAME", "float32, bfloat16 or int8, as the engine has it. Default: "
                                      "float32, or that of an exported model.")]
BatchTokens = Annotated[int | None, _in(SPEED, "N", "Padded source tokens x beam of one batch.")]
BatchSentences = Annotated[int | None, _in(SPEED, "N", "At most so many lines in one batch.")]

Input = Annotated[Path | None, _in(OUTPUT, "FILE", "Read this instead of standard input.")]
Output = Annotated[Path | None, _in(OUTPUT, "FILE", "Write this instead of standard output.")]
NBest = Annotated[int | None, _in(OUTPUT, "N", "So many translations of each line, no two of the same text; with "
                                  "--sample, so many draws. Default: 1.")]
AsJson = Annotated[bool, _in(OUTPUT, None, "Print a JSON object for each line.", "--json")]
TokenScores = Annotated[bool, _in(OUTPUT, None, "With --json: log-probability and entropy of each token, in nats.",
                                  "--token-scores")]
Tree = Annotated[bool, _in(OUTPUT, None, "With --json: all that the beam looked at, and where it fell out.", "--tree")]

Beam = Annotated[int | None, _in(SEARCH, "N", "Hypotheses kept; 1 is greedy. Default: the run's [decode] beam.")]
LengthPenalty = Annotated[float | None, _in(SEARCH, "A", "The higher, the better long outputs rank; 0 ranks by "
                                            "probability alone.")]
PenaltyKind = Annotated[str | None, _in(SEARCH, "NAME", "power: log-probability / length ** A. gnmt: log-probability / "
                                        "((5 + length) / 6) ** A.")]
CoveragePenalty = Annotated[float | None, _in(SEARCH, "B", "Rank lower, by B, what leaves parts of the source unseen.")]
Groups = Annotated[int | None, _in(SEARCH, "N", "Diverse beam search: N parts of the beam, each avoiding what those "
                                   "before it say.")]
Diversity = Annotated[float | None, _in(SEARCH, "X", "With --groups: how much they avoid it, in nats.")]

Sample = Annotated[bool | None, _in(DRAW, None, "Draw from the model's distribution.", "--sample/--no-sample")]
Temperature = Annotated[float | None, _in(DRAW, "T", "Under 1 nearer to the likeliest, over 1 wilder.")]
TopK = Annotated[int | None, _in(DRAW, "K", "Draw from the K likeliest tokens.")]
TopP = Annotated[float | None, _in(DRAW, "P", "Draw from the likeliest tokens that together have probability P.")]
Seed = Annotated[int | None, _in(DRAW, "N", "The same seed and line number give the same draw.")]

MinLength = Annotated[int | None, _in(LENGTH, "N", "No fewer.")]
MaxLength = Annotated[int | None, _in(LENGTH, "N", "No more.")]
MinRatio = Annotated[float | None, _in(LENGTH, "X", "No fewer than X x source.")]
MaxRatio = Annotated[float | None, _in(LENGTH, "X", "No more than X x source, and --max-extra.")]
MaxExtra = Annotated[int | None, _in(LENGTH, "N", "Tokens on top of --max-ratio.")]

Prefix = Annotated[str | None, _in(WORDS, "TEXT", "Each output begins with TEXT.")]
PrefixFile = Annotated[Path | None, _in(WORDS, "FILE", "Output n begins with line n of FILE.")]
Force = Annotated[list[str] | None, _in(WORDS, "PHRASE", "Each output holds PHRASE. Repeatable.")]
ForceFile = Annotated[Path | None, _in(WORDS, "FILE", "Output n holds the phrases of line n of FILE, tabs between.")]
Ban = Annotated[list[str] | None, _in(WORDS, "PHRASE", "No output holds PHRASE. Repeatable.")]
NoRepeat = Annotated[int | None, _in(WORDS, "N", "No output holds the same N tokens twice.")]
ReplaceUnknown = Annotated[
    bool | None, _in(WORDS, None, "Write the source token that an unknown token looks at most in its place.",
                     "--replace-unknown/--no-replace-unknown")
]


class Panels(TyperCommand):
    """A command whose help shows its options in the panels that they name, in the order of their first options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def open_translator(run: Path | Sequence[Path], checkpoint: str, device: str, engine: str | None = None,
                    precision: str | None = None) -> "Translator":
    """Open a run, or several as an ensemble, for translation, on the device that --device names.

    Raises:
        ConfigError: there is no such device, the runs do not fit together, or the engine cannot serve them.
        RunError: there is no such run or checkpoint, or it is damaged.
    """
    import torch

    from regard.translator import load

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here. Use --device cpu, or install a torch with CUDA")
    return load(run, checkpoint, device, engine, precision)
