"""Laws that every family and variant obeys, each checked on all models of the table in conftest.py, in float64.

B batch, S source length, T target length, D width, H heads, V vocabulary. `broken_laws.py` shows that each law fails
when what it protects is broken on purpose.
"""

import hashlib
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from typing import Literal, get_args, get_origin

import pytest
import torch

from conftest import FAMILIES, MODELS, TARGET_SIZE, make_batch, make_config, make_model, model_config, said
from regard.config import write_config
from regard.config_model import DECODERS, ENCODERS
from regard.config_model import MODELS as KINDS
from regard.data.batches import Batch
from regard.decode.search import Limits, beam_search, forced, greedy, ranked
from regard.errors import Interrupted
from regard.model.seq2seq import build_model
from regard.text.tokenizer import BOS, EOS, PAD, UNK
from regard.training.checkpoint import Checkpoint, load, put_weights, save, weights_of
from regard.training.objective import Guide, loss_of
from regard.training.progress import Reporter
from regard.training.run import Run


def rows(wanted):
    """The models of the table whose settings have a property."""
    return pytest.mark.parametrize("name", [name for name in MODELS if wanted(model_config(name))])


def attends(config):
    """Whether the decoder looks at the source's states; else it knows the fixed vector alone."""
    return config.decoder.kind != "rnn" or config.decoder.attention != "none"


EVERY = pytest.mark.parametrize("name", MODELS)
ATTENDING = rows(attends)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def same(left, right, tolerance=1e-12):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def changed(batch, **tensors):
    """The batch with other tensors."""
    return Batch(**{**vars(batch), **tensors})


def read(model, tokens, state, *sizes):
    """The decoder over tokens in chunks of the given sizes."""
    features = []
    for chunk in torch.split(tokens, sizes or [1] * tokens.shape[1], dim=1):
        part, state = model.decoder(chunk, state)
        features.append(part)
    return torch.cat(features, dim=1), state


@pytest.mark.parametrize("section", dict.fromkeys([*ENCODERS.values(), *DECODERS.values(), *KINDS.values()]),
                         ids=lambda section: section.__name__)
def test_the_table_holds_each_choice_of_each_setting(section):
    wholes = [model_config(name) for name in MODELS]
    models = [part for whole in wholes for part in (whole, whole.encoder, whole.decoder) if isinstance(part, section)]
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
@MODES
def test_padding_and_neighbours_change_nothing(name, training):
    model, batch = make_model(name).train(training), make_batch()
    features = said(model, batch)
    log_p = model.log_probabilities(features, batch.source)
    rubbish = torch.where(batch.source_mask, batch.source, torch.full_like(batch.source, 5))
    other = said(model, changed(batch, source=rubbish))
    same(other[batch.target_mask], features[batch.target_mask])
    same(model.log_probabilities(other, rubbish)[batch.target_mask], log_p[batch.target_mask])
    for row in range(len(batch)):
        S, T = int(batch.source_mask[row].sum()), int(batch.target_mask[row].sum())
        alone = Batch.of([batch.source[row, : S - 1].tolist()], [batch.target_out[row, : T - 1].tolist()])
        expected = said(model, alone)
        # One that copies has a column of features for each source token; all others have as many for all sources.
        own, columns = expected.shape[-1], features.shape[-1]
        assert columns - own == (batch.source.shape[1] - S if model.copies else 0)
        same(torch.nn.functional.pad(expected[0], (0, columns - own)), features[row, :T])
        same(model.log_probabilities(expected, alone.source)[0], log_p[row, :T])


@EVERY
@MODES
def test_the_future_changes_nothing(name, training):
    model, batch = make_model(name, dropout=0.1).train(training), make_batch()
    # With the fixed vector as its only input a decoder is told no token at all (context = "input_only").
    told = getattr(model_config(name).decoder, "context", None) != "input_only"

    def features(target_in):
        torch.manual_seed(2)  # drops the same values each time
        return said(model, changed(batch, target_in=target_in))

    before = features(batch.target_in)
    for position in range(batch.target_in.shape[1]):
        target_in = batch.target_in.clone()
        target_in[:, position:] = (target_in[:, position:] + 1) % TARGET_SIZE
        after = features(target_in)
        same(after[:, :position], before[:, :position], 0)
        changed_there = (after[:, position] != before[:, position]).any(-1)
        assert (changed_there[batch.target_mask[:, position]] == told).all()


@EVERY
def test_training_says_what_the_trained_model_says(name):
    """In training the Transformer packs the tokens of a batch, and its sublayers are written out."""
    found = []
    for training in (False, True):
        model, batch = make_model(name).train(training), make_batch()
        features = model.real(batch)
        features.square().sum().backward()
        found.append([features, *(torch.zeros(1) if each.grad is None else each.grad for each in model.parameters())])
    for rest, at_work in zip(*found, strict=True):
        same(at_work, rest, 1e-10)


@EVERY
def test_selected_rows_are_as_if_computed_anew(name):
    model, batch = make_model(name), make_batch()
    chosen = torch.tensor([2, 0, 0, 3])
    _, state = read(model, batch.target_in[:, :3], model.start(batch))
    after, _ = read(model, batch.target_in[chosen][:, 3:], state.select(chosen))
    names = ("source", "source_mask", "target_in", "target_out", "target_mask")
    anew = model(changed(batch, **{each: getattr(batch, each)[chosen] for each in names}))
    same(after, anew[:, 3:])


@EVERY
def test_dropout_ends_with_training(name):
    config, quiet, batch = model_config(name), make_model(name), make_batch()
    expected = quiet(batch)
    for side in ("encoder", "decoder"):
        for kind, field in type(getattr(config, side)).model_fields.items():
            if not (kind.endswith("dropout") or kind == "stochastic_depth") or field.annotation is not float:
                continue
            dropping = make_model(name, **{kind: 0.5})
            dropping.load_state_dict(quiet.state_dict())  # a convolution's first weights depend on its dropout
            same(dropping(batch), expected, 0)
            getattr(dropping, side).train()
            first, second = dropping(batch), dropping(batch)
            assert (first != expected).any() and (first != second).any(), f"{side}: {kind}"


# --- what a model says ---------------------------------------------------------------------------------------------


@EVERY
def test_log_probabilities_sum_to_1_and_the_loss_is_made_of_them(name):
    model, batch = make_model(name), make_batch()
    log_p = model.log_probabilities(model(batch), batch.source)
    assert log_p.shape == (*batch.target_out.shape, TARGET_SIZE) and log_p.dtype == torch.float64
    same(log_p.exp().sum(-1), torch.ones_like(log_p[..., 0]))
    right = log_p.gather(-1, batch.target_out[:, :, None]).squeeze(-1)[batch.target_mask]
    same(forced(model, batch)[batch.target_mask], right.float(), 1e-6)
    loss, surprise = loss_of(model, batch, 0.1)
    same(surprise, -right.sum())
    same(loss, -0.9 * right.sum() - 0.1 * log_p.mean(-1)[batch.target_mask].sum())


def sources_of(batch):
    """The ids of each source, without </s>."""
    return [row[mask][:-1].tolist() for row, mask in zip(batch.source, batch.source_mask, strict=True)]


def plainly_greedy(model, sources, most):
    """The likeliest token at each step, each from a forward pass over all tokens before it: no state, no search."""
    outputs = [[] for _ in sources]
    for length in range(most):
        batch = Batch.of(sources, outputs)
        log_p = model.log_probabilities(model(batch), batch.source)
        log_p[:, :, [PAD, BOS]] = -torch.inf
        for output, row in zip(outputs, log_p.argmax(-1).tolist(), strict=True):
            if EOS not in output:
                output.append(row[length])
    return outputs


@EVERY
@torch.no_grad()
def test_beam_of_one_is_greedy(name):
    model, batch = make_model(name), make_batch()
    found = greedy(model, batch, Limits(8))
    assert [one.tokens for one in found] == plainly_greedy(model, sources_of(batch), 8)
    assert beam_search(model, batch, 1, limits=Limits(8)) == [[one] for one in found]


@EVERY
def test_beam_score_is_forced_score_and_output_does_not_depend_on_neighbours(name):
    model, batch = make_model(name), make_batch()
    limits = Limits(8)
    for source, together in zip(sources_of(batch), beam_search(model, batch, 4, 0.7, limits), strict=True):
        alone, = beam_search(model, Batch.of([source]), 4, 0.7, limits)
        assert [one.tokens for one in together] == [one.tokens for one in alone]
        assert len({tuple(one.tokens) for one in together}) == 4
        assert [one.score for one in together] == sorted((one.score for one in together), reverse=True)
        targets = [one.tokens[:-1] if one.tokens[-1] == EOS else one.tokens for one in together]
        for one, other, values in zip(together, alone, forced(model, Batch.of([source] * 4, targets)), strict=True):
            expected = float(values[: len(one.tokens)].sum())
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
    model = make_model(name, sizes=(6, 6))
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


# --- where it looks ------------------------------------------------------------------------------------------------


def shapes_of_taps(config, B, S, T):
    """The name and the shape of all attention weights that a model has."""
    encoder, decoder = config.encoder, config.decoder
    shapes = {}
    if encoder.kind == "transformer":
        shapes |= {f"encoder.{layer}": (B, encoder.heads, S, S) for layer in range(encoder.layers)}
    if decoder.kind == "transformer":
        shapes |= {f"decoder.{layer}": (B, decoder.heads, T, T) for layer in range(decoder.layers)}
        shapes |= {f"cross.{layer}": (B, decoder.heads, T, S) for layer in range(decoder.layers)}
    elif attends(config):
        shapes |= {f"cross.{layer}": (B, T, S) for layer in range(decoder.layers if decoder.kind == "conv" else 1)}
    return shapes


def may_look(config, kind, source_mask, queries):
    """Where weights of a kind must be above 0, bool, (1 or B, queries, keys); everywhere else they must be 0."""
    if kind == "decoder":
        return torch.ones(1, queries, queries, dtype=torch.bool).tril()
    allowed = source_mask[:, None, :].expand(-1, queries, -1)
    if kind == "cross" and getattr(config.decoder, "window", None) == "local_m":
        centre = torch.minimum(torch.arange(queries), source_mask.sum(1, keepdim=True) - 1)  # at the end it stays
        away = (torch.arange(source_mask.shape[1]) - centre[:, :, None]).abs()
        allowed = allowed & (away <= config.decoder.window_radius)
    return allowed


@EVERY
def test_attention_is_a_distribution_over_what_may_be_looked_at_and_asking_changes_nothing(name):
    config, model, batch, taps = model_config(name), make_model(name), make_batch(), {}
    (B, S), T = batch.source.shape, batch.target_in.shape[1]
    same(model(batch, taps), model(batch))
    assert {name: tuple(weights.shape) for name, weights in taps.items()} == shapes_of_taps(config, B, S, T)
    for kind, weights in taps.items():
        weights = weights.view(B, -1, *weights.shape[-2:])
        allowed = may_look(config, kind.split(".")[0], batch.source_mask, weights.shape[2])[:, None].expand_as(weights)
        assert weights[~allowed].abs().sum() == 0
        if getattr(config.decoder, "window", None) == "local_p" and kind.startswith("cross"):
            check_predicted_window(weights, config.decoder.window_radius)
            continue
        assert weights[allowed].min() > 0
        same(weights.sum(-1), torch.ones_like(weights[..., 0]))


def check_predicted_window(weights, radius):
    """Local attention at a place that the model predicts: in one run of places, at most 2 radius + 1, it is a softmax
    times a Gaussian, which is 1 at that very place alone and exp(-2) at the window's ends (Luong et al. 2015, eq. 10).
    """
    sums, inside = weights.sum(-1), weights > 0
    assert weights.min() >= 0 and sums.min() >= math.exp(-2) - 1e-12 and sums.max() < 1
    assert inside.sum(-1).max() <= 2 * radius + 1
    starts = inside & ~torch.nn.functional.pad(inside, (1, 0))[..., :-1]
    assert (starts.sum(-1) == 1).all()


@ATTENDING
def test_forced_attention_is_that_of_the_search_step_by_step(name):
    model, batch, together = make_model(name), make_batch(), {}
    forced(model, batch, together)
    state = model.start(batch)
    for place, tokens in enumerate(torch.split(batch.target_in, 1, dim=1)):
        step = {}
        _, state = model.decoder(tokens, state, step)
        assert step.keys() == {kind for kind in together if not kind.startswith("encoder")}
        for kind, weights in step.items():  # self-attention has no more than the tokens so far to look at
            same(weights.squeeze(-2), together[kind][..., place, : weights.shape[-1]])


@EVERY
def test_reading_backwards_is_reading_a_reversed_source_and_attention_keeps_the_sources_order(name):
    forwards, backwards = make_model(name, reverse_source=False), make_model(name, reverse_source=True)
    source = torch.tensor([[4, 5, 6, EOS], [7, EOS, 0, 0]])
    swapped = torch.tensor([[EOS, 6, 5, 4], [EOS, 7, 0, 0]])
    mask = source > 0
    taps, swapped_taps = {}, {}
    memory, other = backwards.encode(source, mask, taps), forwards.encode(swapped, mask, swapped_taps)
    same(memory.summary, other.summary, 0)
    same(memory.source, source, 0)
    for row, length in enumerate(mask.sum(1).tolist()):
        same(memory.states[row, :length], other.states[row, :length].flip(0), 0)
        same(memory.values[row, :length], other.values[row, :length].flip(0), 0)
        for kind, weights in taps.items():
            expected = swapped_taps[kind][row, :, :length, :length].flip(1, 2)
            same(weights[row, :, :length, :length], expected, 0)


# --- saved weights, gradients --------------------------------------------------------------------------------------


@EVERY
def test_saved_and_loaded_is_the_same_to_the_bit(name, tmp_path):
    model, other, batch = make_model(name).float(), make_model(name, seed=2).float(), make_batch()
    save(tmp_path / "one", Checkpoint(weights_of(model), {}, {}))
    put_weights(other, load(tmp_path / "one").model, tmp_path)
    assert torch.equal(*(each.log_probabilities(each(batch), batch.source) for each in (model, other)))


@EVERY
def test_gradients_are_those_of_differences(name):
    model, batch, config = make_model(name), make_batch([(3, 2), (1, 3)]), model_config(name)
    coverage, guide = float(getattr(config.decoder, "coverage", False)), Guide(0.5) if attends(config) else None
    batch = changed(batch, alignment=torch.tensor([[0, 0, 1], [0, 0, 2], [1, 2, 0]]))
    weights = tuple(model.parameters())  # gradcheck changes them in place
    assert torch.autograd.gradcheck(lambda *_: loss_of(model, batch, 0.1, coverage, guide)[0], weights, fast_mode=True)


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
    # 17 updates are no whole number of epochs, so that a kill comes in the midst of one
    config = make_config(corpus, steps=120, **SETTINGS | {"validate_every": 17})
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

LEARNERS = {"fixed-gru-every-step": 300, "before-additive": 200, "after-dot": 200, "after-feeding": 250, "conv": 150,
            "transformer-pre": 300, "mixed-transformer-after": 200}
"""Updates that each needs."""
SLOW_LEARNERS = {"fixed-lstm-max": 400, "before-concat": 300, "before-coverage": 300, "after-local-p": 400,
                 "transformer-post": 200, "mixed-conv-transformer": 300}


def sequences(count, tokens, random):
    """Some sequences of 2 to 4 of the tokens."""
    return [random.choices(tokens, k=random.randint(2, 4)) for _ in range(count)]


def taught(name, updates, tokens, vocabulary, **changes):
    """A small model of the table that was shown, in each update, 32 sequences of the tokens and their reverse."""
    config = model_config(name)
    size = {"layers": 2 if config.decoder.kind == "conv" else 1, "width": 32 if attends(config) else 64}
    if "transformer" in (config.encoder.kind, config.decoder.kind):
        size |= {"feedforward": 64}
    torch.manual_seed(1)
    model, draw = build_model(model_config(name, **size, **changes), vocabulary, vocabulary), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / updates)
        sources = sequences(32, tokens, draw)
        batch = Batch.of(sources, [source[::-1] for source in sources])
        loss, _ = loss_of(model, batch)
        (loss / batch.tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def share_reversed(model, tokens):
    """How many of 100 new sequences of the tokens a model turns round, in percent."""
    sources = sequences(100, tokens, random.Random(2))
    found = greedy(model, Batch.of(sources))
    return sum(one.tokens == [*source[::-1], EOS] for one, source in zip(found, sources, strict=True))


@pytest.mark.parametrize("name", [*LEARNERS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LEARNERS)])
def test_it_learns_to_reverse_a_sequence(name):
    tokens = range(4, TARGET_SIZE)
    assert share_reversed(taught(name, (LEARNERS | SLOW_LEARNERS)[name], tokens, TARGET_SIZE), tokens) >= 95


@pytest.mark.parametrize("name, changes", [("before-copy", {}), pytest.param(
    "after-copy", {"input_feeding": True}, marks=pytest.mark.slow)], ids=["before-copy", "after-copy"])
def test_it_learns_to_copy_tokens_that_no_example_had(name, changes):
    model = taught(name, 200, range(4, 200), 400, **changes)
    assert share_reversed(model, range(200, 400)) >= 95
