"""Laws that every family and variant obeys, each checked on all models of the table in conftest.py, in float64."""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from typing import Literal, get_args, get_origin

import pytest
import torch
from torch.func import functional_call

from conftest import FAMILIES, MODELS, TARGET_SIZE, make_batch, make_config, make_model, model_config
from regard.config import RNNConfig, TransformerConfig, write_config
from regard.data.batches import Batch, pad
from regard.decode.search import Limits, beam_search, forced, greedy, ranked
from regard.errors import Interrupted
from regard.model.seq2seq import build_model
from regard.text.tokenizer import BOS, EOS, UNK
from regard.training.checkpoint import Checkpoint, load, put_weights, save, weights_of
from regard.training.objective import loss_of
from regard.training.progress import Reporter
from regard.training.run import Run

EVERY = pytest.mark.parametrize("name", MODELS)
ATTENDING = pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("fixed")])


def same(left, right, tolerance=1e-12):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def read(model, tokens, state, *sizes):
    """The decoder over tokens in chunks of the given sizes."""
    features = []
    for chunk in torch.split(tokens, sizes or [1] * tokens.shape[1], dim=1):
        part, state = model.decoder(chunk, state)
        features.append(part)
    return torch.cat(features, dim=1), state


@pytest.mark.parametrize("section", [RNNConfig, TransformerConfig])
def test_the_table_holds_each_choice_of_each_setting(section):
    models = [config for config in map(model_config, MODELS) if isinstance(config, section)]
    for name, field in section.model_fields.items():
        choices = {True, False} if field.annotation is bool else (
            set(get_args(field.annotation)) if get_origin(field.annotation) is Literal else set())
        assert choices <= {getattr(config, name) for config in models}, name


@EVERY
@pytest.mark.parametrize("sizes", [(), (1, 4, 2), (6, 1)], ids=["one by one", "1 4 2", "6 1"])
def test_stepwise_is_parallel(name, sizes):
    model, batch = make_model(name), make_batch()
    together, after = model.decoder(batch.target_in, model.start(batch))
    stepwise, state = read(model, batch.target_in, model.start(batch), *sizes)
    same(stepwise, together)
    assert state.length == after.length == batch.target_in.shape[1] and state.cache.keys() == after.cache.keys()
    for key, tensor in state.cache.items():
        same(tensor, after.cache[key])


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_padding_and_neighbours_change_nothing(name, training):
    model, batch = make_model(name).train(training), make_batch()
    features = model(batch)
    rubbish = torch.full_like(batch.source, 5)
    source = torch.where(batch.source_mask, batch.source, rubbish)
    same(model(Batch(**{**vars(batch), "source": source}))[batch.target_mask], features[batch.target_mask])
    for row in range(len(batch)):
        S, T = int(batch.source_mask[row].sum()), int(batch.target_mask[row].sum())
        alone = Batch.of([batch.source[row, : S - 1].tolist()], [batch.target_out[row, : T - 1].tolist()])
        same(model(alone)[0], features[row, :T])


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_future_changes_nothing(name, training):
    model, batch = make_model(name).train(training), make_batch()
    features = model(batch)
    for position in range(1, batch.target_in.shape[1]):
        target_in = batch.target_in.clone()
        target_in[:, position:] = (target_in[:, position:] + 1) % TARGET_SIZE
        changed = model(Batch(**{**vars(batch), "target_in": target_in}))
        same(changed[:, :position], features[:, :position], 0)
        assert (changed[:, position] != features[:, position]).any(-1).all()


@EVERY
def test_selected_rows_are_as_if_computed_anew(name):
    model, batch = make_model(name), make_batch()
    rows = torch.tensor([2, 0, 0, 3])
    _, state = read(model, batch.target_in[:, :3], model.start(batch))
    after, _ = read(model, batch.target_in[rows][:, 3:], state.select(rows))
    names = ("source", "source_mask", "target_in", "target_out", "target_mask")
    anew = model(Batch(**{each: getattr(batch, each)[rows] for each in names}, tokens=0))
    same(after, anew[:, 3:])


@EVERY
def test_beam_of_one_is_greedy(name):
    model, batch = make_model(name), make_batch()
    for one, found in zip(greedy(model, batch), beam_search(model, batch, beam=1), strict=True):
        assert [hypothesis.tokens for hypothesis in found] == [one.tokens]
        assert found[0][1:] == pytest.approx(one[1:], abs=1e-4)


@EVERY
def test_beam_score_is_forced_score_and_output_does_not_depend_on_neighbours(name):
    model, batch = make_model(name), make_batch()
    sources = [row[mask][:-1].tolist() for row, mask in zip(batch.source, batch.source_mask, strict=True)]
    limits = Limits(8)
    for source, together in zip(sources, beam_search(model, batch, 4, 0.7, limits), strict=True):
        alone, = beam_search(model, Batch.of([source]), 4, 0.7, limits)
        assert [one.tokens for one in together] == [one.tokens for one in alone]
        assert len({tuple(one.tokens) for one in together}) == 4
        assert [one.score for one in together] == sorted((one.score for one in together), reverse=True)
        for one, other in zip(together, alone, strict=True):
            ended = one.tokens[-1] == EOS
            target = one.tokens[:-1] if ended else one.tokens
            expected = float(forced(model, Batch.of([source], [target]))[0, : len(one.tokens)].sum())
            assert one.log_probability == pytest.approx(expected, abs=1e-5)
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)
            assert one.score == pytest.approx(ranked(expected, len(one.tokens), 0.7), abs=1e-5)


def every_output(letters, longest):
    """All outputs that a search may give: those ended by </s>, and those of the greatest length as they are."""
    for length in range(longest + 1):
        for output in itertools.product(letters, repeat=length):
            if length < longest:
                yield [*output, EOS]
            else:
                yield list(output)


@EVERY
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_is_brute_force(name, length_penalty):
    torch.manual_seed(4)
    model = build_model(model_config(name), 6, 6).double().eval()
    outputs = list(every_output([UNK, 4, 5], 3))
    sources = [[4, 5, 5], [5], []]
    found = beam_search(model, Batch.of(sources), len(outputs), length_penalty, Limits(3))
    for source, hypotheses in zip(sources, found, strict=True):
        batch = Batch.of([source] * len(outputs), [[id for id in output if id != EOS] for output in outputs])
        totals = [sum(row[: len(output)]) for row, output in zip(forced(model, batch).tolist(), outputs, strict=True)]
        scores = [ranked(total, len(output), length_penalty) for total, output in zip(totals, outputs, strict=True)]
        expected = {tuple(output): score for output, score in zip(outputs, scores, strict=True)}
        assert {tuple(one.tokens): one.score for one in hypotheses} == pytest.approx(expected, abs=1e-5)
        assert hypotheses[0].tokens == max(zip(scores, outputs, strict=True))[1]


@ATTENDING
def test_attention_is_a_distribution_over_the_real_source_and_asking_changes_nothing(name):
    model, batch, taps = make_model(name), make_batch(), {}
    same(model(batch, taps), model(batch), 0)
    layers = range(model_config(name).layers)
    kinds = ("encoder", "decoder", "cross") if name.startswith("transformer") else ("cross",)
    expected = {f"{kind}.{layer}" for kind in kinds for layer in layers}
    assert taps.keys() == (expected if name.startswith("transformer") else {"cross.0"})
    for kind, weights in taps.items():
        weights = weights.flatten(0, -3) if weights.dim() == 3 else weights.transpose(0, 1)
        same(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        if kind.startswith("decoder"):
            assert weights.triu(1).abs().max() == 0
        else:
            assert weights.masked_select(~batch.source_mask[:, None, :]).abs().max() == 0
            assert weights.masked_select(batch.source_mask[:, None, :]).min() > 0


@ATTENDING
def test_forced_attention_is_that_of_the_search_step_by_step(name):
    model, batch = make_model(name), make_batch([(4, 0)])
    best = beam_search(model, batch, 3, 1.0, Limits(6))[0][0].tokens
    state, steps = model.start(batch), []
    for token in [BOS, *best[:-1]]:
        taps = {}
        _, state = model.decoder(torch.tensor([[token]]), state, taps)
        steps.append(taps["cross.0"])
    taps = {}
    target_in, mask = pad([best[:-1]], begin=BOS)
    model(Batch(batch.source, batch.source_mask, target_in, target_in, mask, len(best)), taps)
    same(torch.cat(steps, dim=-2), taps["cross.0"])


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("reversed") or "concat" in name])
def test_reading_backwards_is_reading_a_reversed_source_and_attention_keeps_the_sources_order(name):
    forwards, backwards = make_model(name, reverse_source=False), make_model(name, reverse_source=True)
    source = torch.tensor([[4, 5, 6, EOS], [7, EOS, 0, 0]])
    swapped = torch.tensor([[EOS, 6, 5, 4], [EOS, 7, 0, 0]])
    mask = source > 0
    taps, swapped_taps = {}, {}
    memory, other = backwards.encode(source, mask, taps), forwards.encode(swapped, mask, swapped_taps)
    same(memory.summary, other.summary, 0)
    for row, length in enumerate(mask.sum(1).tolist()):
        same(memory.states[row, :length], other.states[row, :length].flip(0), 0)
        for kind, weights in taps.items():
            expected = swapped_taps[kind][row, :, :length, :length].flip(1, 2)
            same(weights[row, :, :length, :length], expected, 0)


@EVERY
def test_saved_and_loaded_is_the_same_to_the_bit(name, tmp_path):
    model, other, batch = make_model(name).float(), make_model(name, seed=2).float(), make_batch()
    save(tmp_path / "one", Checkpoint(weights_of(model), {}, {}))
    put_weights(other, load(tmp_path / "one").model, tmp_path)
    assert torch.equal(model.project(model(batch)), other.project(other(batch)))


@EVERY
def test_gradients_are_those_of_differences(name):
    model, batch = make_model(name, width=4), make_batch([(3, 2), (1, 3)])
    names, weights = zip(*model.named_parameters(), strict=True)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return loss_of(self.model, batch, 0.1)[0]

    def loss(*weights):
        return functional_call(Loss(), {f"model.{name}": each for name, each in zip(names, weights, strict=True)})

    assert torch.autograd.gradcheck(loss, tuple(each.detach().requires_grad_() for each in weights), fast_mode=True)


# --- resumed = uninterrupted ---------------------------------------------------------------------------------------


def outcome(run):
    """What must be the same however a training was interrupted: losses, and the last and the best weights."""
    rows = [(row["kind"], row["step"], row["loss"], row.get("gradient_norm")) for row in run.metrics()]
    return rows, [digest(path) for path in (run.checkpoints()[-1], run.best(), run.find("average"))]


def digest(checkpoint):
    files = sorted(checkpoint.glob("*.safetensors"))
    return checkpoint.name, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


SETTINGS = {"average": 3, "accumulate": 2, "validate_every": 3}


@pytest.mark.parametrize("name", FAMILIES)
def test_resumed_is_uninterrupted(name, corpus, monkeypatch, tmp_path):
    from regard.training.loop import train

    config = make_config(corpus, name, **SETTINGS)
    expected = outcome(train(config, tmp_path / "whole", quiet=True))
    assert len(expected[0]) == 12 + 4

    # Signals at a step of its own, at one with a validation, and in the next epoch.
    arrived = []

    def step(self, number):
        if number in (2, 6, 7, 10) and number not in arrived:
            arrived.append(number)
            os.kill(os.getpid(), signal.SIGINT if number % 2 else signal.SIGTERM)

    monkeypatch.setattr(Reporter, "step", step)
    for number in (2, 6, 7, 10):
        with pytest.raises(Interrupted, match=f"Stopped at step {number} of 12 and saved") as stopped:
            train(config, tmp_path / "parts", quiet=True)
        assert stopped.value.signal == (signal.SIGINT if number % 2 else signal.SIGTERM)
    assert outcome(train(config, tmp_path / "parts", quiet=True)) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_more_steps_later_are_as_if_asked_for_at_once(name, corpus, tmp_path):
    from regard.training.loop import train

    expected = outcome(train(make_config(corpus, name, **SETTINGS), tmp_path / "whole", quiet=True))
    for steps in (3, 6, 12):
        run = train(make_config(corpus, name, **SETTINGS, steps=steps), tmp_path / "parts", quiet=True)
    assert outcome(run) == expected


TRAIN = "import sys; import regard; regard.train(regard.read_config(sys.argv[1]), sys.argv[2])"


@pytest.mark.slow
def test_killed_and_started_again_is_uninterrupted(corpus, tmp_path):
    config = make_config(corpus, steps=300, **SETTINGS | {"validate_every": 20})
    write_config(config, tmp_path / "config.toml")
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "config.toml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True)
    run = Run(tmp_path / "parts", config)
    for checkpoints in (1, 2):
        process = subprocess.Popen([*command, str(run.folder)], env=environment)
        before = run.checkpoints()[-1:]
        while len([path for path in run.checkpoints() if path not in before]) < checkpoints:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(run.folder)], env=environment, check=True)
    assert outcome(run) == outcome(Run(tmp_path / "whole", config))


# --- it learns -----------------------------------------------------------------------------------------------------

LEARNERS = {"fixed-gru-every-step": 300, "before-additive": 200, "after-dot": 200, "transformer-pre": 300,
            "transformer-post": 200, "fixed-lstm-max": 400, "before-concat": 300}
"""Updates that each needs; those after the fourth have other gates, scores and norms, and are slow."""


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (place >= 4)) for place, name in enumerate(LEARNERS)])
def test_it_learns_to_reverse_a_sequence(name):
    torch.manual_seed(1)
    wider = {"width": 64 if name.startswith("fixed") else 32}
    if name.startswith("transformer"):
        wider |= {"feedforward": 64, "layers": 1}
    model = build_model(model_config(name, **wider), TARGET_SIZE, TARGET_SIZE)
    optimizer = torch.optim.AdamW(model.parameters())
    draw = random.Random(1)

    def sources(count):
        return [[draw.randrange(4, TARGET_SIZE) for _ in range(draw.randint(2, 4))] for _ in range(count)]

    for step in range(LEARNERS[name]):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / LEARNERS[name])
        rows = sources(32)
        batch = Batch.of(rows, [row[::-1] for row in rows])
        loss, _ = loss_of(model, batch)
        (loss / batch.tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    rows = sources(100)
    found = greedy(model.eval(), Batch.of(rows))
    assert sum(one.tokens == [*row[::-1], EOS] for one, row in zip(found, rows, strict=True)) >= 95
