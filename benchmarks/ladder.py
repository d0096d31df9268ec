"""The ladder on Multi30k English-German: every step from the fixed vector to the Transformer, on equal terms.

    python benchmarks/ladder.py --data FOLDER --out runs/ladder [--minutes 10] [--jobs 1] [--only NAME ...] [--json]

FOLDER holds the lower-cased tokenised files (docs/data.md says how to get them). Every step has the same data, the same
batches in the same order, about the same number of parameters (within 15%) and the same processor time on one thread.
How many updates fit into that time is measured first, each step taking turns with the first one, so that a machine that
slows down slows both and no step gains by it. The learning rate falls to 0 over them. Then test_2016 is translated
with a beam of 5 and scored with BLEU.

It can be stopped at any time and goes on when it is started again: trainings resume, what is done is not done again.
The five main steps have two seeds. 25 trainings of 10 minutes take 4.2 hours of processor time in all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regard.config import Config, parse_config, write_config
from regard.data.batches import Order
from regard.data.shards import prepare
from regard.model.seq2seq import Seq2Seq, build_model
from regard.training.objective import loss_of
from regard.training.optimizer import make_optimizer
from regard.training.precision import chosen, matrix_products

SHARED = {"dropout": 0.2, "tie": "all"}
RNN = SHARED | {"kind": "rnn", "cell": "lstm", "layers": 1, "width": 256}
FIXED = RNN | {"bidirectional": False, "width": 264}
CONV = SHARED | {"kind": "conv", "layers": 3, "width": 192, "max_positions": 257}
TRANSFORMER = SHARED | {"kind": "transformer", "layers": 3, "width": 160, "heads": 4, "feedforward": 480,
                        "dropout": 0.1}

STEPS: dict[str, dict[str, Any]] = {
    "fixed, initial": FIXED,
    "fixed, initial, reversed": FIXED | {"reverse_source": True},
    "fixed, every step": FIXED | {"context": "every_step", "width": 240},
    "fixed, every step, reversed": FIXED | {"context": "every_step", "width": 240, "reverse_source": True},
    "fixed, input only": FIXED | {"context": "input_only"},
    "fixed, input only, reversed": FIXED | {"context": "input_only", "reverse_source": True},
    "before, additive": RNN | {"attention": "before", "score": "additive", "width": 244},
    "after, dot": RNN | {"attention": "after", "score": "dot"},
    "after, scaled dot": RNN | {"attention": "after", "score": "scaled_dot"},
    "after, general": RNN | {"attention": "after", "score": "general"},
    "after, concat": RNN | {"attention": "after", "score": "concat"},
    "after, additive": RNN | {"attention": "after", "score": "additive"},
    "after, general, input feeding": RNN | {"attention": "after", "score": "general", "input_feeding": True},
    "conv": CONV,
    "transformer, none": TRANSFORMER | {"positions": "none"},
    "transformer, sinusoidal": TRANSFORMER | {"positions": "sinusoidal"},
    "transformer, learned": TRANSFORMER | {"positions": "learned", "max_positions": 257, "width": 156},
    "transformer, relative": TRANSFORMER | {"positions": "relative"},
    "transformer, rotary": TRANSFORMER | {"positions": "rotary"},
    "transformer, alibi": TRANSFORMER | {"positions": "alibi"},
}
"""The [model] of each step; the parts that differ are the story."""

MAIN = ("fixed, initial", "fixed, initial, reversed", "before, additive", "conv", "transformer, sinusoidal")
"""The steps in the order that the papers found; two seeds each."""
REFERENCE = MAIN[0]
"""The step that the others' cost is measured against."""

TRAIN: dict[str, Any] = {
    "batch_tokens": 1024, "learning_rate": 3e-3, "warmup": 300, "schedule": "cosine", "label_smoothing": 0.1,
    "metric": "loss", "threads": 1, "device": "cpu"}


class Rung(NamedTuple):
    """One training of the ladder."""

    name: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of its run's folder."""
        return f"{self.name.replace(', ', '-').replace(' ', '_')}-{self.seed}"


def rungs() -> list[Rung]:
    """All trainings, the main steps first."""
    seconds = [Rung(name, 2) for name in MAIN]
    return [Rung(name, 1) for name in MAIN] + [Rung(name, 1) for name in STEPS if name not in MAIN] + seconds


def config_of(rung: Rung, data: Path, out: Path, steps: int) -> Config:
    """A step's config, its training so many updates long, judged four times on the way."""
    pairs = {part: {"source": f"{file}.en", "target": f"{file}.de"}
             for part, file in (("train", "train"), ("valid", "val"), ("test", "test_2016"))}
    return parse_config({
        "data": {"root": str(data), **pairs, "train": [pairs["train"]], "bleu_tokenize": "none",
                 "prepared": str((out / "data").resolve())},
        "tokenizer": {"kind": "bpe", "size": 4000, "shared": True},
        "model": STEPS[rung.name],
        "train": TRAIN | {"steps": steps, "seed": rung.seed, "validate_every": max(1, -(-steps // 4)),
                          "warmup": min(TRAIN["warmup"], steps)},
        "decode": {"max_source_tokens": 256},
    }, f"the ladder's {rung.name}", Path.cwd())


class Plan:
    """How many updates each step has, kept in plan.json.

    Args:
        data: folder of the text.
        out: folder of the runs.
        minutes: processor time of each training.
    """

    def __init__(self, data: Path, out: Path, minutes: float):
        self.data, self.out, self.minutes, self.path = data, out, minutes, out / "plan.json"
        self.costs: dict[str, float] = {}
        if self.path.exists():
            self.costs = json.loads(self.path.read_text(encoding="utf-8"))

    def updates(self, name: str) -> int:
        """Updates of a step."""
        if name not in self.costs:
            ours, reference = self.seconds(name)
            self.costs[name] = reference if name == REFERENCE else ours / reference * self.costs[REFERENCE]
            self.path.write_text(json.dumps(self.costs, indent=1), encoding="utf-8")
            say(f"{name}: {1000 * self.costs[name]:.0f} ms an update")
        return max(1, round(60 * self.minutes / self.costs[name]))

    def seconds(self, name: str, rounds: int = 9, block: int = 4) -> tuple[float, float]:
        """Processor seconds of one update of a step and of the reference: medians of turns that they take."""
        torch.set_num_threads(1)
        works = [self.work(each) for each in (name, REFERENCE)]
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds + 1):
            for work, seconds in zip(works, times, strict=True):
                start = time.process_time()
                for position in range(turn * block, (turn + 1) * block):
                    work(position)
                seconds.append((time.process_time() - start) / block)
        ours, reference = (statistics.median(seconds[1:]) for seconds in times)  # the first turn warms up
        return ours, reference

    def work(self, name: str) -> Callable[[int], None]:
        """Updates of a new model, by their position in the first epoch."""
        config = config_of(Rung(name, 1), self.data, self.out, 1)
        prepared = prepare(config, self.out, lambda text: None)
        source, target = prepared.tokenizers
        model = build_model(config.model, source.size, target.size)
        optimizer = make_optimizer(model, config.train)
        order = Order(prepared.train, config.train.batch_tokens, 1)
        return lambda position: update(model, optimizer, order, position, config)


def update(model: Seq2Seq, optimizer: torch.optim.Optimizer, order: Order, position: int, config: Config) -> None:
    """One update, as training makes it."""
    batch, = order.update(0, position)
    device = torch.device("cpu")
    with matrix_products(chosen(config.train, device)[0], device):
        loss, _ = loss_of(model, batch, config.train.label_smoothing)
    (loss / batch.tokens).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def climb(rung: Rung, steps: int, data: Path, out: Path) -> dict[str, Any]:
    """Train and score one rung, or read what was found before."""
    folder = out / rung.folder
    if (folder / "result.json").exists():
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    plan, log = folder.with_suffix(".toml"), folder.with_suffix(".log")
    write_config(config_of(rung, data, out, steps), plan)
    say(f"{rung.name}, seed {rung.seed}: training")
    regard("train", plan, "--out", folder, log=log)
    result = result_of(rung, folder, json.loads(regard("evaluate", folder, "--json", log=log)))
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    say(f"{rung.name}, seed {rung.seed}: BLEU {result['BLEU']:.2f}")
    return result


def result_of(rung: Rung, folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """What is known of a finished rung."""
    from regard.training.checkpoint import load, read_json
    from regard.training.run import Run

    last = Run.open(folder).checkpoints()[-1]
    state = read_json(last / "state.json")
    weights = load(last).model
    return {
        "name": rung.name, "seed": rung.seed, "BLEU": scores["scores"]["BLEU"]["value"],
        "signature": scores["scores"]["BLEU"]["signature"],
        "by_length": {f"{part['shortest']}-{part['longest']}": part["scores"]["BLEU"] for part in scores["by_length"]},
        "parameters": sum(tensor.numel() for tensor in weights.values()), "updates": state["step"],
        "target_tokens": state["tokens"], "cpu_minutes": state["cpu_seconds"] / 60,
    }


def regard(*arguments: Any, log: Path) -> str:
    """Run a command of Regard's in a process of its own; what it tells goes to the log."""
    with log.open("a", encoding="utf-8") as talk:
        done = subprocess.run([Path(sys.executable).with_name("regard"), *map(str, arguments)], stdout=subprocess.PIPE,
                              stderr=talk, text=True)
    if done.returncode:
        raise SystemExit(f"regard {arguments[0]} ended with {done.returncode}; {log} says why. Started again, the "
                         "ladder goes on from there")
    return done.stdout


def say(text: str) -> None:
    """Tell a person how it goes."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The ladder as a Markdown table, in its own order."""
    yield "| step | parameters | updates | target tokens | CPU minutes | BLEU by seed | mean |"
    yield "|---|---|---|---|---|---|---|"
    for name in STEPS:
        found = [result for result in results if result["name"] == name]
        if found:
            first, scores = found[0], [result["BLEU"] for result in found]
            yield (f"| {name} | {first['parameters']:,} | {first['updates']:,} | {first['target_tokens'] / 1e6:.2f} M "
                   f"| {first['cpu_minutes']:.1f} | {', '.join(f'{score:.2f}' for score in scores)} "
                   f"| {statistics.mean(scores):.2f} |")


def main() -> None:
    """Climb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.en, train.de, val.*, test_2016.*")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and their results")
    parser.add_argument("--minutes", type=float, default=10.0, help="processor time of each training (10)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(STEPS), help="some steps alone")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen_rungs = [rung for rung in rungs() if options.only is None or rung.name in options.only]
    prepare(config_of(chosen_rungs[0], data, out, 1), out, say)
    plan = Plan(data, out, options.minutes)
    steps = {name: plan.updates(name) for name in dict.fromkeys([REFERENCE, *(rung.name for rung in chosen_rungs)])}
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda rung: climb(rung, steps[rung.name], data, out), chosen_rungs))
    print(json.dumps(results, indent=1) if options.json else "\n".join(table(results)))


if __name__ == "__main__":
    main()
