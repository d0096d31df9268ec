"""One interface over two engines: the same outputs and scores, and what one of them cannot do."""

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
import torch
from pydantic import TypeAdapter
from typer.testing import CliRunner

import regard
from conftest import FAMILIES, MODELS, TRANSFORMER, make_config, make_model, model_config, write_reversal
from regard.cli import app
from regard.config_model import AnyModelConfig
from regard.decode.options import Options
from regard.engines import check, converted, ct2, ct2_model, opening
from regard.engines.check import Agreement, compare, sample_of
from regard.engines.ct2 import CT2
from regard.engines.engine import Job, Torch
from regard.errors import ConfigError, MissingExtra, RunError
from regard.model.seq2seq import build_model
from regard.text.tokenizer import BOS, EOS, PAD, SPECIALS, Tokenizer, Tokenizers, Vocabulary
from regard.training.loop import train
from regard.translator import WINDOWS, Translation

ctranslate2 = pytest.importorskip("ctranslate2", reason="the extra 'ctranslate2' is not installed")

LINES = ["a b c", "d", "", "b b a d c", "a " * 50, "z", "c a", "a b c d a b c d a b"]
ENGINES = ["torch", "ctranslate2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that half know how to reverse."""
    folder = tmp_path_factory.mktemp("engines")
    write_reversal(folder)
    names = ("transformer-pre", "transformer-rotary", "fixed-elman")
    return {name: train(make_config(folder, name, steps=60, validate_every=30), folder / name, quiet=True).folder
            for name in names}


@pytest.fixture(scope="module")
def translators(runs):
    return {engine: regard.load(runs["transformer-pre"], engine=engine) for engine in ENGINES}


def near(translations, within=1e-4):
    """Translations with the numbers that a comparison must hold to within some nats."""
    return [(one.text, one.tokens, one.problem, pytest.approx(one.score, abs=within),
             pytest.approx(one.log_probability, abs=within), pytest.approx(one.parts, abs=within),
             near(one.alternatives, within)) for one in translations]


def exact(translations):
    return [(one.text, one.tokens, one.problem, one.score, one.log_probability, one.parts, exact(one.alternatives))
            for one in translations]


# --- the same outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("limits", [{}, {"max_ratio": 0.5, "max_extra": 1}])  # outputs end by themselves, and at limits
def test_texts_alone_are_the_same_texts(translators, engine, beam, limits):
    translator = translators[engine]
    whole, texts = (translator.translate(LINES, beam=beam, nbest=beam, scores=scores, **limits)
                    for scores in (True, False))
    for one, other in zip(texts, whole, strict=True):
        assert (one.text, one.tokens, one.problem) == (other.text, other.tokens, other.problem)
        assert [each.text for each in one.alternatives] == [each.text for each in other.alternatives]
    told = [one for one in texts if one.tokens]
    assert told and all(math.isnan(one.score) and math.isnan(one.log_probability) and not one.parts for one in told)
    with pytest.raises(ConfigError, match="token_scores means nothing with scores = False"):
        translator.translate(LINES, beam=beam, scores=False, token_scores=True)


@pytest.mark.parametrize("name", ["transformer-pre", "transformer-rotary"])
@pytest.mark.parametrize("asked", [
    {}, {"beam": 1}, {"beam": 3, "nbest": 3}, {"beam": 4, "length_penalty": 0.0}, {"beam": 4, "length_penalty": 0.6},
    {"max_length": 3}, {"beam": 4, "nbest": 4, "max_ratio": 0.5, "max_extra": 1}, {"beam": 1, "max_length": 1},
    {"min_length": 1}, {"batch_sentences": 1}, {"batch_tokens": 8}, {"beam": 3, "batch_sentences": 2}])
def test_both_engines_translate_alike(runs, name, asked):
    found = regard.load(runs[name], engine="ctranslate2").translate(LINES, **asked)
    assert exact(found) == near(regard.load(runs[name]).translate(LINES, **asked))
    assert sum(one.problem is not None for one in found) == 1 and found[2] == Translation("")


def test_each_sentence_keeps_to_its_own_limit_in_a_batch_of_many(translators):
    options = {"beam": 4, "max_ratio": 0.3, "max_extra": 1, "batch_sentences": 100}
    found = translators["ctranslate2"].translate(LINES, **options)
    lengths = [len(one.tokens) for one in found]
    assert lengths[0] <= 2 and lengths[1] == 1 and lengths[-1] <= 4 and len(set(lengths)) > 2
    assert exact(found) == near(translators["torch"].translate(LINES, **options))


def test_a_score_is_log_probability_by_length_and_the_log_probability_is_that_of_the_tokens(translators):
    for alpha in (0.0, 0.5, 1.0):
        for one in translators["ctranslate2"].translate(["a b c", "d c"], beam=3, nbest=3, length_penalty=alpha):
            for each in (one, *one.alternatives):
                assert each.parts["length"] == pytest.approx((len(each.tokens) + 1) ** alpha)
                assert each.score == pytest.approx(each.parts["model"] / each.parts["length"])
    line = "a b c"
    for engine in ENGINES:
        found = translators["ctranslate2"].translate(line)
        assert translators[engine].score([line], [found.text]) == [pytest.approx(found.log_probability, abs=1e-4)]


def test_scores_of_given_targets(translators):
    sources, targets = ["a b", "c", "a b c d", ""], ["b a", "c", "", "a"]
    expected = translators["torch"].score(sources, targets)
    assert translators["ctranslate2"].score(sources, targets) == pytest.approx(expected, abs=1e-4)
    assert translators["ctranslate2"].score([], []) == []


@pytest.mark.parametrize("precision", ct2_model.precisions())
def test_batches_change_nothing(runs, precision):
    translator = regard.load(runs["transformer-pre"], engine="ctranslate2", precision=precision)
    lines = [line for line in LINES if line.strip()] * 9
    whole = translator.translate(lines, beam=3, nbest=3)
    for asked in ({"batch_sentences": 1}, {"batch_sentences": 7}, {"batch_sentences": 64}, {"batch_tokens": 30}):
        assert exact(translator.translate(lines, beam=3, nbest=3, **asked)) == near(whole, 1e-5)


def test_streams_in_order_and_reads_no_further_than_it_must(translators):
    lines = [" ".join("abcd"[place % 4] for place in range(number % 7)) for number in range(300)]
    found = list(translators["ctranslate2"].stream(iter(lines)))
    assert len(found) == len(lines)
    assert exact(found[:20]) == near([translators["torch"].translate(line) for line in lines[:20]])
    assert all((not one.tokens) == (not line) for one, line in zip(found, lines, strict=True))
    read = []
    stream = translators["ctranslate2"].stream(read.append(line) or line for line in lines)
    next(stream)
    assert len(read) == WINDOWS[0]


def test_pad_and_bos_are_never_written_and_do_not_change_a_score(runs):
    run = converted.Run.open(runs["transformer-pre"])
    tokenizers = Tokenizers.load(run.folder / "tokenizer")
    own = regard.load(run.folder).engines[0]
    with torch.no_grad():  # as likely as an end and as a letter
        own.model.output[PAD], own.model.output[BOS] = own.model.output[EOS] * 1.01, own.model.output[5]
    folder = run.folder / "likely-pad"
    folder.mkdir()
    ct2_model.save(own.model, tokenizers, run.config, "float32", folder)
    engine = CT2(folder, "float32", tokenizers, run.config)
    options = Options.of(run.config.decode, {"beam": 3}, [run.config.model])
    jobs = [Job(number, ids, [], []) for number, ids in enumerate([[4, 5, 6], [7], [5, 5, 4, 7]], start=1)]
    for asked in (options, options.model_copy(update={"beam": 1})):
        found = {place: each for one in engine.search(jobs, asked, {})
                 for place, each in zip(one.places, one.hypotheses, strict=True)}
        for place, hypotheses in found.items():
            assert hypotheses and hypotheses == sorted(hypotheses, key=lambda one: -one.score)
            for one in hypotheses:
                assert not {PAD, BOS} & set(one.tokens)
                values, = own.forced([jobs[place].source], [[id for id in one.tokens if id != EOS]], 100)
                assert one.log_probability == pytest.approx(sum(values[: len(one.tokens)]), abs=1e-4)
                assert one.score == pytest.approx(one.log_probability / len(one.tokens))


# --- what the format carries -----------------------------------------------------------------------------------------


CARRIED = {name: MODELS[name] for name in MODELS
           if MODELS[name].get("kind") == "transformer" and not MODELS[name].get("reverse_source")} | {
    "grouped": TRANSFORMER | {"heads": 4, "kv_heads": 2, "norm": "post"},
    "relative, all heads": TRANSFORMER | {"positions": "relative"},
    "mixed, alibi in the decoder": {"encoder": TRANSFORMER | {"positions": "rotary"}, "decoder": TRANSFORMER | {
        "positions": "alibi", "norm": "post", "activation": "gelu"}},
    "mixed widths": {"encoder": TRANSFORMER | {"positions": "relative"}, "decoder": TRANSFORMER | {
        "width": 12, "norm_kind": "rms"}, "tie": "none"},
}


def letters(size):
    """A tokenizer of so many entries, one of which looks like a special token."""
    others = ["</s>", *(f"w{number}" for number in range(size - len(SPECIALS) - 1))]
    tokenizer = Tokenizer("space", Vocabulary(SPECIALS + others, [], []))
    return Tokenizers(tokenizer, tokenizer)


@pytest.mark.parametrize("name", CARRIED)
def test_every_kind_of_transformer_is_carried(name, tmp_path):
    size, settings = 40, CARRIED[name]
    wider = {"width": 16, "heads": 4}
    settings = settings | wider if "encoder" not in settings else settings
    config = make_config(Path("/"), "transformer-pre").model_copy(
        update={"model": TypeAdapter(AnyModelConfig).validate_python(settings)})
    torch.manual_seed(1)
    model = build_model(config.model, size, size).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.3 * torch.randn_like(weights)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tokenizers, own = letters(size), Torch(model)
    for precision in ("float32", "int8"):
        (folder := tmp_path / precision).mkdir()
        ct2_model.save(model, tokenizers, config, precision, folder)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    engine = CT2(tmp_path / "float32", "float32", tokenizers, config)
    draw = torch.Generator().manual_seed(2)
    sources, targets = ([torch.randint(4, size, (n,), generator=draw).tolist() for n in lengths]
                        for lengths in ((3, 9, 1, 140), (4, 2, 7, 137)))
    for right, found in zip(own.forced(sources, targets, 999), engine.forced(sources, targets, 999), strict=True):
        assert found == pytest.approx(right, abs=1e-4)
    options = Options.of(config.decode, {"beam": 4, "nbest": 4, "max_source_tokens": 200}, [config.model])
    jobs = [Job(number, source, [], []) for number, source in enumerate(sources[:3], start=1)]
    for found in engine.search(jobs, options, {}):
        for place, hypotheses in zip(found.places, found.hypotheses, strict=True):
            bodies = [[id for id in one.tokens if id != EOS] for one in hypotheses]
            forced = own.forced([jobs[place].source] * len(bodies), bodies, 999)
            assert [one.log_probability for one in hypotheses] == pytest.approx(
                [sum(values[: len(one.tokens)]) for values, one in zip(forced, hypotheses, strict=True)], abs=1e-3)


def test_a_limit_at_the_end_of_the_table_of_positions(tmp_path):
    config = make_config(Path("/"), "transformer-learned", decode={"max_length": 21})
    config = config.model_copy(update={"model": config.model.model_copy(update={"max_positions": 21})})
    torch.manual_seed(3)
    model, tokenizers = build_model(config.model, 40, 40).eval(), letters(40)
    with torch.no_grad():
        model.output[: EOS + 1] = 0.0  # of 37 other logits one is greater: it never ends
    ct2_model.save(model, tokenizers, config, "float32", tmp_path)
    engine, own = CT2(tmp_path, "float32", tokenizers, config), Torch(model)
    jobs = [Job(1, [4] * 20, [], []), Job(2, [5, 6], [], [])]
    options = Options.of(config.decode, {"beam": 1, "max_ratio": 9}, [config.model])
    for one in (engine, own):
        found = {place: each[0] for found in one.search(jobs, options, {})
                 for place, each in zip(found.places, found.hypotheses, strict=True)}
        assert {place: len(each.tokens) for place, each in found.items()} == {0: 21, 1: 21}


@pytest.mark.parametrize("name, reasons", [
    ("after-everything", [
        'kind = "rnn": the format knows Transformers alone',
        "reverse_source = true: a source that begins with </s> and has one more token is empty to CTranslate2"]),
    ("conv", ['kind = "conv": the format knows Transformers alone']),
    ("transformer-alibi-reversed", [
        'positions = "alibi": the format has them in a decoder, not in an encoder',
        "reverse_source = true: a source that begins with </s> and has one more token is empty to CTranslate2"]),
    ("mixed-rnn-conv", ['encoder.kind = "rnn": the format knows Transformers alone',
                        'decoder.kind = "conv": the format knows Transformers alone']),
    ("mixed-transformer-conv", ['decoder.kind = "conv": the format knows Transformers alone']),
    ("transformer-relative", []),
])
def test_what_cannot_be_carried_is_told_with_all_reasons(name, reasons):
    assert list(ct2_model.refusals(model_config(name))) == reasons


def test_an_alibi_encoder_in_a_mixed_model_is_named():
    sides = {"encoder": TRANSFORMER | {"positions": "alibi"}, "decoder": MODELS["conv"]}
    assert list(ct2_model.refusals(TypeAdapter(AnyModelConfig).validate_python(sides))) == [
        'encoder.positions = "alibi": the format has them in a decoder, not in an encoder',
        'decoder.kind = "conv": the format knows Transformers alone']


# --- what is asked, and who does it ----------------------------------------------------------------------------------


ASKED = {
    "sample": {"sample": True}, "groups": {"beam": 4, "groups": 2}, "coverage_penalty": {"coverage_penalty": 0.2},
    "length_penalty_kind": {"length_penalty_kind": "gnmt"}, "prefix": {"prefix": "a"}, "force": {"force": ["a"]},
    "ban": {"ban": ["a"]}, "no_repeat_ngram": {"no_repeat_ngram": 2}, "min_length": {"min_length": 3},
    "min_ratio": {"min_ratio": 0.5}, "replace_unknown": {"replace_unknown": True},
    "token_scores": {"token_scores": True}, "tree": {"tree": True}}


def test_there_is_a_case_for_all_that_it_cannot_do():
    assert ASKED.keys() == ct2.UNABLE.keys()


@pytest.mark.parametrize("name", ASKED)
def test_what_ctranslate2_cannot_do_is_refused_by_name_and_done_by_torch_under_auto(runs, translators, name):
    with pytest.raises(ConfigError) as error:
        translators["ctranslate2"].translate("a b", **ASKED[name])
    assert str(error.value).startswith(f"ctranslate2 cannot do what was asked: {name}")
    auto = regard.load(runs["transformer-pre"], engine="auto")
    assert exact(auto.translate(LINES, **ASKED[name])) == exact(translators["torch"].translate(LINES, **ASKED[name]))
    assert auto.taken.startswith(f"torch, float32 (ctranslate2: {name}")
    auto.translate("a b")
    assert auto.taken == "ctranslate2, float32"


def test_all_reasons_at_once(translators):
    with pytest.raises(ConfigError) as error:
        translators["ctranslate2"].translate("a", beam=5, token_scores=True, ban=["b"], max_source_tokens=9000,
                                             prefix=["a"])
    assert [reason.split(": ")[1].split(" = ")[0] for reason in str(error.value).splitlines()] == [
        "prefix", "ban", "token_scores", "beam", "max_source_tokens"]
    assert "beam = 5: it needs a vocabulary of 10, and this one has 8" in str(error.value)
    assert "max_source_tokens = 9000: its table of positions ends at 4096" in str(error.value)


def test_a_beam_wider_than_the_vocabulary(runs, translators):
    found = regard.load(runs["transformer-pre"], engine="auto").translate(LINES, beam=50, nbest=50)
    assert exact(found) == exact(translators["torch"].translate(LINES, beam=50, nbest=50))


def test_auto_takes_torch_for_models_that_ctranslate2_cannot_carry(runs):
    auto = regard.load(runs["fixed-elman"], engine="auto")
    assert exact(auto.translate(LINES)) == exact(regard.load(runs["fixed-elman"]).translate(LINES))
    assert auto.taken == 'torch, float32 (ctranslate2 cannot carry kind = "rnn": the format knows Transformers alone)'
    assert not (runs["fixed-elman"] / "engines").exists()
    with pytest.raises(ConfigError, match='ctranslate2 cannot carry kind = "rnn"'):
        regard.load(runs["fixed-elman"], engine="ctranslate2")
    both = [runs["fixed-elman"], runs["transformer-pre"]]
    assert regard.load(both, engine="auto").translate("a b").problem is None
    with pytest.raises(ConfigError) as error:
        regard.load(both, engine="auto", precision="int8")
    assert str(error.value).splitlines() == [
        "ctranslate2 has no ensembles, and there are 2 runs",
        'ctranslate2 cannot carry kind = "rnn": the format knows Transformers alone',
        'torch has no precision = "int8": it has float32 and bfloat16']


@pytest.mark.parametrize("asked, message", [
    ({"engine": "onnx"}, 'engine = "onnx": expected auto, torch or ctranslate2'),
    ({"precision": "int4"}, 'precision = "int4": expected float32, bfloat16 or int8'),
    ({"engine": "torch", "precision": "int8"}, 'torch has no precision = "int8": it has float32 and bfloat16'),
    ({"engine": "ctranslate2", "device": "cuda"}, 'ctranslate2 runs on the processor here, and device = "cuda"'),
])
def test_engines_that_cannot_be(runs, asked, message):
    with pytest.raises(ConfigError) as error:
        regard.load(runs["transformer-pre"], **asked)
    assert str(error.value) == message


def test_a_precision_that_this_processor_lacks(runs, monkeypatch):
    monkeypatch.setattr(ctranslate2, "get_supported_compute_types", lambda device: {"float32", "int8"})
    with pytest.raises(ConfigError) as error:
        regard.load(runs["transformer-pre"], engine="ctranslate2", precision="bfloat16")
    assert str(error.value) == ('ctranslate2 has no precision = "bfloat16" for this processor: it has float32 and int8')
    assert regard.load(runs["transformer-pre"], engine="auto", precision="bfloat16").translate("a b").problem is None


def test_without_the_package(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(MissingExtra, match=r"pip install 'regard\[ctranslate2\]'"):
        regard.load(runs["transformer-pre"], engine="ctranslate2")
    auto = regard.load(runs["transformer-pre"], engine="auto")
    assert exact(auto.translate(LINES)) == exact(regard.load(runs["transformer-pre"]).translate(LINES))
    assert auto.taken.startswith("torch, float32 (") and "pip install 'regard[ctranslate2]'" in auto.taken


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_in_bfloat16(name, tmp_path):
    write_reversal(tmp_path)
    run = train(make_config(tmp_path, name, steps=20, validate_every=20), tmp_path / name, quiet=True).folder
    half, whole = (regard.load(run, precision=precision) for precision in ("bfloat16", "float32"))
    assert {weights.dtype for weights in half.model.parameters()} == {torch.bfloat16}
    for asked in ({"beam": 3}, {"beam": 1}, {"sample": True}):
        assert all(one.problem is None for one in half.translate(["a b c", "d"], **asked))
    targets = [one.text for one in whole.translate(["a b c", "d"])]
    assert half.score(["a b c", "d"], targets) == pytest.approx(whole.score(["a b c", "d"], targets), abs=0.3)


@pytest.mark.parametrize("name", ["before-copy", "mixed-conv-after"])
def test_a_model_that_copies_scores_in_bfloat16(name):
    half, whole = (Torch(make_model(name).float(), precision) for precision in ("bfloat16", "float32"))
    given = [[4, 5, 6], [6]], [[4, 5], [5]], 1000
    for ours, exact in zip(half.forced(*given), whole.forced(*given), strict=True):
        assert ours == pytest.approx(exact, abs=0.1)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(runs, tmp_path):
    """A run of its own, not converted yet."""
    shutil.copytree(runs["transformer-pre"], tmp_path / "run", ignore=shutil.ignore_patterns("engines", "likely-pad"))
    return tmp_path / "run"


def test_a_run_is_converted_once_for_each_checkpoint_and_precision(run):
    for checkpoint, precision in (("last", None), ("last", "int8"), ("step-00000030", None)):
        regard.load(run, checkpoint, engine="ctranslate2", precision=precision).translate("a b")
    folders = sorted(path.name for path in (run / "engines").iterdir())
    assert len(folders) == 3 and sum("-int8-" in name for name in folders) == 1
    times = {path: path.stat().st_mtime_ns for path in (run / "engines").rglob("*")}
    translator = regard.load(run, "last", engine="ctranslate2")
    assert translator.translate("a b").problem is None
    assert times == {path: path.stat().st_mtime_ns for path in (run / "engines").rglob("*")}
    assert "model" not in vars(translator._own)  # neither built nor read
    assert translator.look("a b").cross is not None


def test_auto_converts_nothing_for_what_it_leaves_to_torch(run):
    regard.load(run, engine="auto").translate("a b", sample=True)
    regard.load(run).translate("a b")
    assert not (run / "engines").exists()


def test_a_damaged_conversion_is_made_anew(run):
    expected = regard.load(run, engine="ctranslate2").translate("a b c")
    folder, = (run / "engines").iterdir()
    for damage in ((folder / "model.bin").unlink, lambda: (folder / "model.bin").write_bytes(b"no"),
                   lambda: (folder / "export.json").write_text("{"), (folder / "config.json").unlink):
        damage()
        assert regard.load(run, engine="ctranslate2").translate("a b c") == expected
    assert [path.name for path in (run / "engines").iterdir()] == [folder.name]


def test_a_conversion_by_other_code_is_not_used(run, tmp_path, monkeypatch):
    regard.load(run, engine="ctranslate2")
    (tmp_path / "other.py").write_text("# how we converted before")
    monkeypatch.setattr(ct2_model, "__file__", str(tmp_path / "other.py"))
    regard.load(run, engine="ctranslate2")
    assert len(list((run / "engines").iterdir())) == 2


def test_only_the_newest_conversions_are_kept(run, monkeypatch):
    for number in range(5):
        monkeypatch.setattr(converted, "FORMAT", number)
        regard.load(run, engine="ctranslate2").translate("a b")
    (left := run / "engines" / ".unfinished-ctranslate2-int8-x").mkdir()
    os.utime(left, (1, 1))
    monkeypatch.setattr(converted, "FORMAT", 5)
    regard.load(run, engine="ctranslate2").translate("a b")
    assert len(list((run / "engines").iterdir())) == converted.KEPT


def test_a_run_that_cannot_be_written_is_converted_in_the_user_s_cache(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(converted, "_writable", lambda place: run not in place.parents)
    regard.load(run, engine="ctranslate2").translate("a b")
    assert not (run / "engines").exists()
    folder, = (tmp_path / "cache" / "regard" / "engines").iterdir()
    before = folder.stat().st_mtime_ns
    regard.load(run, engine="ctranslate2").translate("a b")
    assert folder.stat().st_mtime_ns == before
    monkeypatch.setattr(converted, "_writable", lambda place: False)
    shutil.rmtree(tmp_path / "cache")
    (run / "engines").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        regard.load(run, engine="ctranslate2")
    auto = regard.load(run, engine="auto")
    assert auto.translate("a b").problem is None and "cannot be written" in auto.taken


def test_places_that_can_be_written(tmp_path):
    assert converted._writable(tmp_path / "a" / "b") and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    assert not converted._writable(tmp_path / "file") and not converted._writable(tmp_path / "file" / "b")


def test_torch_keeps_its_threads_beside_ctranslate2(runs):
    code = ("import sys, torch, regard\ntorch.set_num_threads(3)\n"
            "regard.load(sys.argv[1], engine='ctranslate2').translate(['a b'] * 40)\nprint(torch.get_num_threads())")
    out = subprocess.run([sys.executable, "-c", code, str(runs["transformer-pre"])], capture_output=True, text=True,
                         timeout=120)
    assert out.stdout == "3\n", out.stderr


@pytest.mark.slow
def test_two_processes_that_convert_at_once(run):
    code = ("import sys, torch, regard\ntorch.set_num_threads(1)\n"
            "print(regard.load(sys.argv[1], engine='ctranslate2').translate('a b c').score)")
    started = [subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True) for _ in range(3)]
    ended = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in ended}) == 1 and float(ended[0][0]) < 0, ended
    assert len(list((run / "engines").iterdir())) == 1


def test_a_folder_that_another_process_made_first_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(converted.Overtaken), converted.new_folder(out, {}, lambda folder: False) as folder:
        (folder / "file").write_text("late")
        out.mkdir()
        (out / "file").write_text("first")
    assert (out / "file").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["out"]


# --- the check -------------------------------------------------------------------------------------------------------


def test_a_wrong_conversion_is_found(run, monkeypatch):
    monkeypatch.setattr(ct2_model, "EPSILON", 0.05)
    with pytest.raises(converted.Unlike, match=r"float32.*difference of a token's log-probability .* over the 0.0001"):
        regard.load(run, engine="ctranslate2")
    assert not list((run / "engines").iterdir())
    auto = regard.load(run, engine="auto")
    assert exact(auto.translate(LINES)) == exact(regard.load(run).translate(LINES))
    assert "does not translate as ours" in auto.taken


def test_agreement_and_its_reasons():
    right = Agreement("float32", 10, 50, 1e-5, 1e-6, 9, 1, [])
    assert not list(right.reasons())
    assert str(right) == ("10 sentences: 9 outputs the same, 1 at a tie; a token's log-probability differs by 1.0e-05 "
                          "nats at most, 1.0e-06 in the mean of 50")
    for change, reason in (({"worst": 2e-4}, "worst difference of a token's log-probability 0.0002 nats, over the"),
                           ({"mean": float("nan")}, "mean difference"),
                           ({"unlike": [6]}, "1 of 10 outputs differ for no tie; the first is that of sentence 7")):
        found, = dataclasses.replace(right, **change).reasons()
        assert found.startswith(reason)
    coarse = Agreement("int8", 10, 50, 0.4, 0.01, 8, 0, [1, 2])
    assert not list(coarse.reasons()) and "2 unlike" in str(coarse)
    assert len(list(dataclasses.replace(coarse, mean=0.06, worst=3.0).reasons())) == 2


def test_engines_are_compared_with_themselves_and_with_others(translators):
    config, (own,), (fast,) = (translators["torch"].config, translators["torch"].engines,
                               translators["ctranslate2"].engines)
    sources = [[4, 5, 6], [7], [5, 5, 4, 7]]
    assert compare(own, own, sources, config) == Agreement("float32", 3, 10, 0.0, 0.0, 3, 0, []) or (
        compare(own, own, sources, config).worst == 0.0)
    found = compare(own, fast, sources, config)
    assert found.same == 3 and 0 < found.worst < 1e-4 and not list(found.reasons())
    other = Torch(build_model(config.model, 8, 8))
    assert len(list(compare(own, other, sources, config).reasons())) == 3


def test_a_tie_explains_another_output_and_nothing_else_does(translators):
    own, = translators["torch"].engines
    with torch.no_grad():
        before = own.model.output.clone()
        own.model.output[5] = own.model.output[4]  # two letters that nothing tells apart
    options = Options.model_validate(translators["torch"].config.decode.model_dump() | check.SEARCH | {"beam": 3})
    source = [4, 6, 7]
    best = check._outputs(own, [source], options)[0][0]
    swapped = [{4: 5, 5: 4}.get(id, id) for id in best.tokens]
    if swapped == best.tokens:
        best = best._replace(tokens=[4, EOS], score=sum(own.forced([source], [[4]], 99)[0]) / 2)
        swapped = [5, EOS]
    assert check._tie(own, source, options, best, swapped)
    with torch.no_grad():
        own.model.output.copy_(before)
    best = check._outputs(own, [source], options)[0][0]
    assert not check._tie(own, source, options, best, [6, 6, 6, EOS])


def test_ties_at_a_cut():
    def nodes(*kinds):
        return [check.Node(-1, token, total, 1, fate) for token, total, fate in kinds]

    clear = nodes((4, -1.0, "open"), (5, -2.0, "open"), (6, -3.0, "pruned"), (EOS, -4.0, "pruned"))
    assert not check._close(clear, 2, 1e-3)
    assert check._close(nodes((4, -1.0, "open"), (5, -2.0, "open"), (6, -2.0001, "pruned")), 2, 1e-3)
    ended = nodes((EOS, -1.0, "ended"), (4, -2.0, "open"), (5, -3.0, "open"), (6, -3.0001, "pruned"))
    assert check._close(ended, 2, 1e-3)
    assert check._close(nodes((4, -1.0, "open"), (EOS, -2.0, "ended"), (5, -2.0001, "open")), 2, 1e-3)


def test_samples(translators, tmp_path):
    config, tokenizers = translators["torch"].config, translators["torch"].tokenizers
    assert sample_of(config, tokenizers, 3) == sample_of(config, tokenizers, 6)[:3]
    assert len(sample_of(config, tokenizers, 100)) == 6  # the validation set
    given = sample_of(config, tokenizers, 2, ["", "a b", "a " * 50, "c"])
    assert given == tokenizers.source.encode(["a b", "c"])
    with pytest.raises(check.DataError, match="the sample holds no line that can be translated"):
        sample_of(config, tokenizers, 2, ["", "a " * 50])
    gone = config.model_copy(update={"data": config.data.model_copy(update={"root": tmp_path})})
    made_up = sample_of(gone, tokenizers, 30)
    assert made_up == sample_of(gone, tokenizers, 30) and len(made_up) == 30
    assert {id for ids in made_up for id in ids} == {4, 5, 6, 7}


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_each_nasty_line_has_its_outcome(translators, engine):
    lines = ["", " ", "a" * 10_000, "a " * 10_000, "\x00\x1b[2J\x07", "☃ zebra", "a\nb\r\tc", "\ud800 a", "\u2028",
             "</s> <pad> a", "a b"]
    for asked in ({}, {"beam": 4, "nbest": 4}, {"beam": 1}):
        found = translators[engine].translate(lines, **asked)
        problems = [one.problem for one in found]
        assert len(found) == len(lines) and exact(found) == near(translators["torch"].translate(lines, **asked))
        assert problems[3].startswith("10,000 tokens, over the 20 that [decode] max_source_tokens allows")
        assert "half of a surrogate pair" in problems[7] and problems.count(None) == len(lines) - 2
        assert all(found[place].text == "" for place in (0, 1, 3, 7))


def process(*arguments, **options):
    """Start a command as a process of its own."""
    command = [sys.executable, "-c", "from regard.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reader_that_has_enough_after_a_line(runs, engine, tmp_path):
    (tmp_path / "lines").write_text("a b c d\n" * 20_000)
    started = process("translate", runs["transformer-pre"], "--engine", engine, "--input", tmp_path / "lines",
                      stdout=subprocess.PIPE)
    with started.stdout as out, started.stderr as err:
        assert out.readline().endswith(b"\n")
        out.close()
        assert started.wait(300) == 141 and err.read() == b""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(runs, engine):
    command = "translate", runs["transformer-pre"], "--engine", engine
    result = CliRunner().invoke(app, [*map(str, command), "--output", "/dev/full"], input="a b\n")
    with Path("/dev/full").open("wb") as disk:
        ended = process(*command, stdin=subprocess.PIPE, stdout=disk)
        said = ended.communicate(b"a b\n")[1]
    for code, message in ((result.exit_code, result.stderr), (ended.returncode, said.decode())):
        assert code == 2 and message.count("\n") == 1
        assert message.startswith("OSError: No space left on device. Free some space")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slow_pipe_is_answered_line_by_line(runs, engine):
    started = process("translate", runs["transformer-pre"], "--engine", engine, stdin=subprocess.PIPE,
                      stdout=subprocess.PIPE)
    patience = Timer(120, started.kill)
    patience.start()
    with started, started.stdin as asks, started.stdout as answers:
        for line in (b"a b c\n", b"\n", b"d\ra\r\nb\nhalf of ", b"a line\n"):
            asks.write(line)
            asks.flush()
            assert all(answers.readline().endswith(b"\n") for _ in range(line.count(b"\n")))
        asks.write(b"a")
        asks.close()
        assert answers.read().count(b"\n") == 1 and started.wait() == 0
    patience.cancel()


def test_the_engines_of_a_command_line(runs):
    def told(*arguments):
        result = CliRunner().invoke(app, ["translate", *map(str, arguments)], input="a b\nc\n")
        return result.exit_code, result.stdout.count("\n"), result.stderr.splitlines()[-1]

    plain, fixed = runs["transformer-pre"], runs["fixed-elman"]
    for arguments, expected in (
            ((plain,), "; engine ctranslate2, float32"), ((plain, "--engine", "torch"), "; engine torch, float32"),
            ((plain, "--precision", "int8"), "; engine ctranslate2, int8"),
            ((plain, "--sample"), "; engine torch, float32 (ctranslate2: sample = True: its draws do not depend on "
                                  "seed and line alone)"),
            ((fixed,), '; engine torch, float32 (ctranslate2 cannot carry kind = "rnn": the format knows Transformers '
                       'alone)')):
        code, lines, said = told(*arguments)
        assert code == 0 and lines == 2 and said.endswith(expected), said
    for arguments, expected in (
            ((plain, "--engine", "ctranslate2", "--sample"), "ctranslate2 cannot do what was asked: sample"),
            ((fixed, "--engine", "ctranslate2"), 'ConfigError: ctranslate2 cannot carry kind = "rnn"'),
            ((plain, "--engine", "fast"), 'ConfigError: engine = "fast": expected auto, torch or ctranslate2'),
            ((plain, "--precision", "int4"), 'ConfigError: precision = "int4": expected')):
        code, lines, said = told(*arguments)
        assert code == 2 and lines == 0 and expected in said, said


def test_what_opens_engines_knows_each_of_them():
    assert {"auto", *opening.AGAINST} == {*opening.NAMES}
