"""Decoding speed and BLEU of each engine and precision, beside CTranslate2 by hand and Hugging Face, on one test.

    python benchmarks/decode.py RUN --source test.en --target test.de [--json]

RUN is a trained Transformer with sinusoidal positions and one table for both embeddings and the output, so that Hugging
Face has a model of the same weights: MarianMTModel where norms come after the parts, PegasusForConditionalGeneration
where they come before. All translate the same lines, from text to text, with the same tokenizer; they take turns, so
that a machine that slows down slows all. By hand CTranslate2 gets its best settings: one thread in each of as many
workers as there are threads, all lines in one call, batches of the sizes that were fastest (--hand-batches).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ctranslate2
import sacrebleu
import torch
from torch import Tensor, nn

import regard
from regard.data.batches import Batch
from regard.decode.search import limits_of
from regard.engines import ct2
from regard.text.corpus import read_lines
from regard.text.tokenizer import BOS, EOS, PAD
from regard.translator import Translator

Translate = Callable[[Sequence[str], int], list[str]]
"""Lines and a beam to texts."""
HF_BATCHES = {1: 64}
"""Sentences of one batch of `generate` by beam; 32 for other beams (measured: docs/log.md)."""


# --- who takes part ------------------------------------------------------------------------------------------------


def ours(folder: Path, engine: str, precision: str | None) -> Translate:
    """An engine of Regard's, opened once."""
    translator = regard.load(folder, engine=engine, precision=precision)
    return lambda lines, beam: [one.text for one in translator.translate(lines, beam=beam, scores=False)]


def longest_of(translator: Translator, rows: Sequence[Sequence[int]]) -> int:
    """The longest output that our limits allow for the longest of some sources: one limit for those who have one."""
    return limits_of(translator.config.decode).between(max(map(len, rows)) + 1)[1]


def by_hand(translator: Translator, precision: str, threads: int, batch: dict[int, int]) -> Translate:
    """CTranslate2's own translator on the converted model."""
    engine = next(each for each in translator.engines if isinstance(each, ct2.CT2))
    engine.open()
    folder = engine.given if isinstance(engine.given, Path) else engine.given()
    raw = ctranslate2.Translator(str(folder), compute_type=precision, inter_threads=threads, intra_threads=1)
    source, target = translator.tokenizers
    names, ids, penalty = engine.names[0], engine.ids, translator.config.decode.length_penalty

    def translate(lines: Sequence[str], beam: int) -> list[str]:
        rows = source.encode(lines)
        found = raw.translate_batch(
            [[names[id] for id in row] for row in rows], beam_size=beam, length_penalty=penalty,
            max_decoding_length=longest_of(translator, rows), max_batch_size=batch[1 if beam == 1 else 5])
        return target.decode([[ids[token] for token in one.hypotheses[0]] for one in found])

    return translate


def hugging_face(translator: Translator) -> Translate:
    """`generate` of the model that has the same weights."""
    model, (source, target) = hf_model(translator), translator.tokenizers
    penalty = translator.config.decode.length_penalty

    @torch.inference_mode()
    def translate(lines: Sequence[str], beam: int) -> list[str]:
        rows = source.encode(lines)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        texts, size, longest = [""] * len(rows), HF_BATCHES.get(beam, 32), longest_of(translator, rows)
        for places in (order[first : first + size] for first in range(0, len(order), size)):
            batch = Batch.of([rows[place] for place in places])
            found = model.generate(
                input_ids=batch.source, attention_mask=batch.source_mask.long(), num_beams=beam, do_sample=False,
                max_new_tokens=longest, **({"length_penalty": penalty, "early_stopping": True} if beam > 1 else {}))
            for place, text in zip(places, target.decode(found.tolist()), strict=True):
                texts[place] = text
        return texts

    return translate


def hf_model(translator: Translator) -> Any:
    """Hugging Face's model of the same architecture and weights; checked on one batch."""
    import transformers

    config, size = translator.config.model, translator.tokenizers.target.size
    fits = (config.kind == "transformer" and config.positions == "sinusoidal" and config.tie == "all"
            and config.activation != "swiglu" and config.norm_kind == "layer"
            and config.kv_heads in (None, config.heads))
    if not fits:
        sys.exit("this run has no counterpart in Hugging Face: it needs positions = sinusoidal, tie = all, layer "
                 "norms, relu or gelu, and no grouped queries. --only torch auto hand leaves Hugging Face out")
    before = config.norm == "pre"
    settings = {
        "vocab_size": size, "d_model": config.width, "scale_embedding": True, "activation_function": config.activation,
        "max_position_embeddings": 1024, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
        "decoder_start_token_id": BOS, "forced_eos_token_id": None}
    for side, own in (("encoder", config.encoder), ("decoder", config.decoder)):
        settings |= {f"{side}_layers": own.layers, f"{side}_attention_heads": own.heads,
                     f"{side}_ffn_dim": own.feedforward}
    theirs = (transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**settings)) if before
              else transformers.MarianMTModel(transformers.MarianConfig(**settings))).eval()
    copy_weights(translator.model, theirs, before)
    theirs.generation_config.update(max_length=None, bad_words_ids=None)
    batch = Batch.of([[5, 9, 7, 11, 4], [6, 8]], [[7, 5, 12], [4, 6, 8, 10]])
    with torch.inference_mode():
        expected = translator.model.project(translator.model(batch))[batch.target_mask]  # type: ignore[operator,union-attr]
        found = theirs(batch.source, batch.source_mask.long(), batch.target_in).logits[batch.target_mask]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return theirs


@torch.no_grad()
def copy_weights(own: Any, theirs: Any, before: bool) -> None:
    """Our weights into theirs. They write sines into the first half of the width and cosines into the second, ours
    alternate: place i of our width is place halves[i] of theirs."""
    width = own.output.shape[1]
    halves = torch.arange(width).view(2, -1).T.flatten()

    def put(theirs: nn.Module, weight: Tensor, bias: Tensor, inputs: bool = False, outputs: bool = False) -> None:
        rows = theirs.weight[halves] if outputs else theirs.weight
        assert rows.shape == weight.shape
        place = torch.empty_like(weight)
        place[:, halves if inputs else slice(None)] = weight
        whole = place.clone()
        whole[halves if outputs else slice(None)] = place
        theirs.weight.copy_(whole)
        theirs.bias[halves if outputs else slice(None)] = bias

    def attention(own: Any, theirs: Any) -> None:
        put(theirs.q_proj, own.query.weight, own.query.bias, inputs=True)
        for half, part in enumerate((theirs.k_proj, theirs.v_proj)):
            put(part, own.key_value.weight.chunk(2)[half], own.key_value.bias.chunk(2)[half], inputs=True)
        put(theirs.out_proj, own.output.weight, own.output.bias, outputs=True)

    def norm(own: Any, theirs: Any) -> None:
        theirs.weight[halves], theirs.bias[halves] = own.weight, own.bias

    theirs.model.shared.weight[:, halves] = own.output
    for side in ("encoder", "decoder"):
        ours, other = getattr(own, side), getattr(theirs.model, side)
        if before:
            norm(ours.norm, other.layer_norm)
        for layer, their in zip(ours.layers, other.layers, strict=True):
            attention(layer.attention, their.self_attn)
            norm(layer.attention_residual.norm, their.self_attn_layer_norm)
            if side == "decoder":
                attention(layer.cross, their.encoder_attn)
                norm(layer.cross_residual.norm, their.encoder_attn_layer_norm)
            put(their.fc1, layer.feedforward.inner.weight, layer.feedforward.inner.bias, inputs=True)
            put(their.fc2, layer.feedforward.outer.weight, layer.feedforward.outer.bias, outputs=True)
            norm(layer.feedforward_residual.norm, their.final_layer_norm)


# --- the measurement -----------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one contestant did with one beam: seconds of each round, and its texts."""

    seconds: list[float]
    texts: list[str]


def take_turns(contestants: dict[str, Translate], lines: Sequence[str], beams: Sequence[int],
               rounds: int) -> dict[tuple[str, int], Result]:
    """Each contestant translates all lines with each beam, once in a round, after a few lines to warm up."""
    results = {(name, beam): Result([], []) for name in contestants for beam in beams}
    for name, beam in results:
        contestants[name](lines[:64], beam)
    for number in range(1, rounds + 1):
        for (name, beam), result in results.items():
            start = time.perf_counter()
            result.texts = contestants[name](lines, beam)
            result.seconds.append(time.perf_counter() - start)
            print(f"round {number}/{rounds}  {name:<18} beam {beam}  {len(lines) / result.seconds[-1]:>7,.0f} "
                  "sentences/s", file=sys.stderr)
    return results


def rows(results: dict[tuple[str, int], Result], references: Sequence[str],
         tokenize: str) -> Iterator[dict[str, Any]]:
    """The figures of each contestant and beam; ratios are medians over the rounds."""
    for (name, beam), result in results.items():
        row = {"name": name, "beam": beam, "sentences_per_second": len(references) / statistics.median(result.seconds)}
        for base in ("hugging face", "by hand float32", "by hand int8"):
            if (other := results.get((base, beam))) is not None:
                pairs = zip(other.seconds, result.seconds, strict=True)
                row[f"times {base}"] = statistics.median(theirs / own for theirs, own in pairs)
        same = sum(one == other for one, other in zip(result.texts, results["torch float32", beam].texts, strict=True))
        bleu = sacrebleu.corpus_bleu(result.texts, [list(references)], tokenize=tokenize, force=True)
        yield row | {"bleu": bleu.score, "unlike_torch": len(result.texts) - same}


def contestants_of(folder: Path, threads: int, without_hf: bool, batches: dict[str, dict[int, int]]) -> dict[
        str, Translate]:
    """All that take part, by name."""
    found = {"torch float32": ours(folder, "torch", None), "torch bfloat16": ours(folder, "torch", "bfloat16"),
             "auto": ours(folder, "auto", None), "auto int8": ours(folder, "auto", "int8")}
    for precision, batch in batches.items():
        opened = regard.load(folder, engine="ctranslate2", precision=precision)
        found[f"by hand {precision}"] = by_hand(opened, precision, threads, batch)
    if not without_hf:
        found["hugging face"] = hugging_face(regard.load(folder))
    return found


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a trained run's folder; RUN/engines is written")
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="sources, one a line")
    parser.add_argument("--target", type=Path, required=True, metavar="FILE", help="their references")
    parser.add_argument("--beams", type=int, nargs="+", default=[5, 1], metavar="N", help="beams (default 5 1)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--sentences", type=int, metavar="N", help="take the first N lines alone")
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help="who takes part, beside torch float32: parts of names")
    parser.add_argument("--hand-batches", type=int, nargs=4, default=[64, 128, 16, 32], metavar="N",
                        help="sentences of a batch by hand: float32 with a beam, greedy; int8 the same")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines, references = (read_lines(path)[: arguments.sentences] for path in (arguments.source, arguments.target))
    a, b, c, d = arguments.hand_batches
    only = arguments.only or [""]
    everyone = contestants_of(arguments.run, arguments.threads, bool(only[0]) and "hugging" not in only,
                              {"float32": {5: a, 1: b}, "int8": {5: c, 1: d}})
    chosen = {name: each for name, each in everyone.items()
              if name == "torch float32" or any(part in name for part in only)}
    results = take_turns(chosen, lines, arguments.beams, arguments.rounds)
    table = list(rows(results, references, regard.load(arguments.run).config.data.bleu_tokenize))
    if arguments.json:
        print(json.dumps({"lines": len(lines), "threads": arguments.threads, "torch": torch.__version__,
                          "ctranslate2": ctranslate2.__version__, "rows": table}))
        return
    for row in table:
        ratios = "  ".join(f"{value:5.2f} x {name.removeprefix('times ')}" for name, value in row.items()
                           if name.startswith("times"))
        print(f"{row['name']:<18} beam {row['beam']}  {row['sentences_per_second']:>7,.0f} sentences/s  BLEU "
              f"{row['bleu']:.2f}  {row['unlike_torch']:>4} unlike torch  {ratios}")


if __name__ == "__main__":
    main()
