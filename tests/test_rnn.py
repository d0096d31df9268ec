"""The RNN encoder against torch's own with packed sequences, the decoders against plain loops from the papers.

B batch, S source length, T target length, E the memory's width.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import make_batch, model_config
from regard.model import cells
from regard.model.cells import KINDS, Cell
from regard.model.layers import Embedding
from regard.model.pointer import mixed_log_probabilities
from regard.model.rnn import RNNDecoder, RNNEncoder, SequenceDropout, reverse
from regard.model.state import Memory
from test_attention import looked, normal

CELL_STEPS = {"elman": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
WIDTH, MEMORY_WIDTH = 8, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def config(**changes):
    return model_config("fixed-elman", **changes)


def test_reverse_turns_the_real_part_around():
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = x > 0
    assert reverse(x, mask).tolist() == [[4, 3, 2, 1], [6, 5, 0, 0]]
    vectors = torch.stack([x, -x], dim=-1)
    assert torch.equal(reverse(vectors, mask)[..., 1], -reverse(x, mask))
    assert torch.equal(reverse(reverse(vectors, mask), mask), vectors)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("cell", KINDS)
def test_encoder_is_torchs_with_packed_sequences(cell, bidirectional):
    settings = config(cell=cell, layers=2, bidirectional=bidirectional)
    encoder, batch = RNNEncoder(settings, Embedding(11, WIDTH)).double(), make_batch()
    theirs = KINDS[cell].module(WIDTH, WIDTH // 2 if bidirectional else WIDTH, num_layers=2, batch_first=True,
                         bidirectional=bidirectional).double()
    with torch.no_grad():
        for index, layer in enumerate(encoder.layers):
            for direction, ours in (("", layer.forwards), ("_reverse", layer.backwards)):
                for name, weights in ours.rnn.named_parameters() if ours else ():
                    getattr(theirs, name.replace("_l0", f"_l{index}") + direction).copy_(weights)
    packed = nn.utils.rnn.pack_padded_sequence(encoder.embedding(batch.source), batch.source_mask.sum(1),
                                               batch_first=True, enforce_sorted=False)
    expected, last = theirs(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    last = last[0] if isinstance(last, tuple) else last
    memory = encoder(batch.source, batch.source_mask)
    same(memory.states[batch.source_mask], expected[batch.source_mask])
    same(memory.summary, torch.cat(list(last[-2:] if bidirectional else last[-1:]), dim=-1))


@pytest.mark.parametrize("summary", ["mean", "max"])
def test_summary_of_the_real_states(summary):
    encoder, batch = RNNEncoder(config(summary=summary), Embedding(11, WIDTH)).double(), make_batch()
    memory = encoder(batch.source, batch.source_mask)
    for row, mask in enumerate(batch.source_mask):
        states = memory.states[row][mask]
        same(memory.summary[row], states.mean(0) if summary == "mean" else states.amax(0))


@pytest.mark.parametrize("cell", KINDS)
def test_a_cell_goes_on_from_its_state(cell):
    ours, x = Cell(cell, 3, 4).double(), torch.randn(2, 5, 3, dtype=torch.float64)
    whole, last = ours(x)
    first, middle = ours(x[:, :2])
    second, end = ours(x[:, 2:], middle)
    assert tuple(last) == KINDS[cell].parts
    same(torch.cat([first, second], dim=1), whole)
    for name in last:
        same(end[name], last[name])


@pytest.mark.parametrize("many", [1, cells.MANY], ids=["tanh by σ", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("cell", KINDS)
def test_a_cell_is_torchs_and_so_are_its_gradients(cell, dtype, many, monkeypatch):
    """A whole sequence, and the single steps that search and the loops of a decoder make."""
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    monkeypatch.setattr(cells, "MANY", many)
    ours, x = Cell(cell, 5, 4).to(dtype), torch.randn(2, 6, 5, dtype=dtype, requires_grad=True)
    start = {name: torch.randn(2, 4, dtype=dtype, requires_grad=True) for name in KINDS[cell].parts}
    parts = [part[None] for part in start.values()]
    expected = flat(*ours.rnn(x, tuple(parts) if cell == "lstm" else parts[0]))
    learned, upstream = [x, *start.values(), *ours.parameters()], torch.randn_like(expected)
    rights = torch.autograd.grad(expected, learned, upstream)
    state, hidden, step = start, [], ours.steps()
    for gates in (ours.gates(x[..., :3]) + x[..., 3:] @ ours.part("weight_ih")[:, 3:].T).unbind(1):
        state = step(gates, state)
        hidden.append(state["hidden"])
    for states, last in (ours(x, start), (torch.stack(hidden, dim=1), state)):
        found = flat(states, tuple(last.values()))
        torch.testing.assert_close(found, expected, **tolerance)
        for gradient, right in zip(torch.autograd.grad(found, learned, upstream), rights, strict=True):
            torch.testing.assert_close(gradient, right, **tolerance)
    with torch.no_grad():
        for run in (ours(x, start), ours(x[:, :1], start)):
            torch.testing.assert_close(run[0], expected[:48].view(2, 6, 4)[:, : run[0].shape[1]], **tolerance)
            assert torch.equal(run[1]["hidden"], run[0][:, -1])


def flat(states, last):
    """All numbers in a row: the states after each input, and the last."""
    ends = last if isinstance(last, tuple) else (last,)
    return torch.cat([each.flatten() for each in (states, *ends)])


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("cell", KINDS)
def test_second_derivatives_of_a_cell_are_refused(cell, length):
    ours = Cell(cell, 5, 4)
    loss = ours(torch.randn(2, length, 5))[0].square().sum()
    gradient, = torch.autograd.grad(loss, ours.part("weight_hh"), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_in_bfloat16_a_loop_sums_gradients_of_its_matrices_in_float32():
    torch.manual_seed(1)
    decoder = RNNDecoder(config(cell="lstm", attention="after", score="general", input_feeding=True, coverage=True),
                         Embedding(9, WIDTH), MEMORY_WIDTH)  # with coverage its steps are joined by autograd
    memory, tokens = a_memory(), torch.randint(9, (3, 60))
    memory = replace(memory, **{name: getattr(memory, name).float() for name in ("states", "summary", "values")})
    found = []
    for narrow in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            features, _ = decoder(tokens, decoder.start(memory))
        features.float().sum().backward()
        found.append([decoder.layers[0].part(name).grad.clone() for name in ("weight_hh", "weight_ih")])
    for gradient, (exact, rounded) in zip(("U", "W"), zip(*found, strict=True), strict=True):
        assert float((rounded - exact).norm() / exact.norm()) < 0.02, gradient
        assert not torch.equal(rounded, rounded.bfloat16().float()), gradient  # what is summed in bfloat16 ends in it


def test_a_cell_leaves_no_program_behind_for_each_shape(monkeypatch):
    """torch's own does, in oneDNN, and its memory grows with them."""
    monkeypatch.setattr(nn.LSTM, "forward", None)
    states, _ = Cell("lstm", 5, 4)(torch.randn(2, 6, 5))
    states.sum().backward()


def test_in_bfloat16_the_cell_of_an_lstm_is_float32():
    cell, x = Cell("lstm", 5, 4), torch.randn(2, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        states, last = cell(x)
        after = cell.steps()(cell.gates(x[:, 0]), last)
    for state in (last, after):
        assert (state["hidden"].dtype, state["cell"].dtype) == (torch.bfloat16, torch.float32)
    assert states.dtype == torch.bfloat16


def a_memory():
    """Random states, and values of their own, as a convolutional encoder's; sources of 7, 3 and 1 tokens."""
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    states = normal(3, 7, MEMORY_WIDTH)
    source = torch.randint(3, 9, (3, 7)).masked_fill(~mask, 0)
    return Memory(states, mask, normal(3, MEMORY_WIDTH), source, normal(3, 7, MEMORY_WIDTH))


def a_decoder(settings):
    """A decoder whose weights are larger than at birth, so that a step that is left out shows."""
    decoder = RNNDecoder(settings, Embedding(9, WIDTH), MEMORY_WIDTH).double()
    with torch.no_grad():
        for weights in decoder.parameters():
            weights += 0.3 * torch.randn_like(weights)
    return decoder


class Plain:
    """A decoder's equations, one step at a time, with the weights of one of ours and the masks that it has drawn."""

    def __init__(self, decoder, settings, memory, masks=None):
        self.decoder, self.settings, self.memory, self.masks, self.t = decoder, settings, memory, masks, 0
        self.cells = []
        for layer in decoder.layers:
            step = CELL_STEPS[settings.cell](layer.rnn.input_size, WIDTH).double()
            step.load_state_dict({name.removesuffix("_l0"): weights for name, weights in layer.rnn.named_parameters()})
            self.cells.append(step)
        start = torch.tanh(decoder.bridge(memory.summary)).split(WIDTH, dim=-1)
        parts = len(KINDS[settings.cell].parts)
        self.states = [start[index * parts : (index + 1) * parts] for index in range(len(self.cells))]
        self.coverage = torch.zeros(memory.mask.shape, dtype=torch.float64)
        self.fed = torch.zeros(len(memory.mask), WIDTH, dtype=torch.float64)

    @property
    def top(self):
        return self.states[-1][0]

    def dropped(self, x, place):
        """x times its mask: that of a layer's input, or the last, that of the output."""
        return x if self.masks is None else x * self.masks[place][:, self.t % self.masks[place].shape[1]]

    def step(self, x):
        for index, (cell, state) in enumerate(zip(self.cells, self.states, strict=True)):
            after = cell(self.dropped(x, index), state if self.settings.cell == "lstm" else state[0])
            self.states[index] = after if isinstance(after, tuple) else (after,)
            x = self.states[index][0] + (x if self.settings.residual and index else 0)
        return x

    def look(self, query):
        """The context of each row, whose sum of weights is kept as its coverage."""
        form = {"score": self.settings.score, "window": self.settings.window, "radius": self.settings.window_radius,
                "coverage": self.settings.coverage}
        self.weights = torch.zeros(self.memory.mask.shape, dtype=torch.float64)
        for row, S in enumerate(self.memory.mask.sum(1).tolist()):
            self.weights[row, :S] = looked(self.decoder.attention, form, query[row], self.memory.states[row, :S],
                                           self.t, self.coverage[row])
        self.coverage = self.coverage + self.weights
        self.context = torch.stack([weights @ values for weights, values in zip(self.weights, self.memory.values,
                                                                                strict=True)])
        return self.context

    def read(self, hidden, context):
        self.hidden = hidden
        return torch.tanh(self.decoder.readout(torch.cat([context, hidden], dim=-1)))

    def features(self, equations, x):
        """What our decoder gives for one token: the output, and what See et al. need besides, eq. 8."""
        features = self.dropped(equations(self, x), -1)
        if self.settings.copy:
            gate = self.decoder.gate
            logit = torch.cat([self.context, self.hidden, x], dim=-1) @ gate.weight[0] + gate.bias
            shares = self.weights / self.weights.sum(-1, keepdim=True)
            features = torch.cat([features, logit[:, None], shares], dim=-1)
        self.t += 1
        return features


def sutskever(plain, x):
    return plain.step(x)


def cho(plain, x):
    context = plain.memory.summary
    return plain.read(plain.step(torch.cat([x, context], dim=-1)), context)


def context_alone(plain, x):
    return plain.step(plain.memory.summary)


def bahdanau(plain, x):
    context = plain.look(plain.top)
    return plain.read(plain.step(torch.cat([x, context], dim=-1)), context)


def luong(plain, x):
    hidden = plain.step(x)
    return plain.read(hidden, plain.look(hidden))


def luong_feeding(plain, x):
    hidden = plain.step(torch.cat([x, plain.fed], dim=-1))
    plain.fed = plain.read(hidden, plain.look(hidden))
    return plain.fed


BEFORE, AFTER = {"attention": "before", "score": "additive"}, {"attention": "after", "score": "general"}
FEEDING = AFTER | {"input_feeding": True}
LOCAL_M = {"window": "local_m", "window_radius": 1}
LOCAL_P = {"window": "local_p", "window_radius": 2}
PAPERS = {
    "Sutskever": (sutskever, {}),
    "Sutskever residual": (sutskever, {"layers": 3, "residual": True}),
    "Cho": (cho, {"context": "every_step"}),
    "input only": (context_alone, {"context": "input_only"}),
    "Bahdanau": (bahdanau, BEFORE),
    "Bahdanau local-m": (bahdanau, BEFORE | LOCAL_M),
    "Bahdanau local-p residual": (bahdanau, BEFORE | LOCAL_P | {"residual": True}),
    "Bahdanau coverage": (bahdanau, BEFORE | {"coverage": True}),
    "Bahdanau copy": (bahdanau, BEFORE | {"copy": True}),
    "Luong": (luong, AFTER),
    "Luong local-m": (luong, AFTER | LOCAL_M),
    "Luong local-p copy": (luong, AFTER | LOCAL_P | {"copy": True}),
    "Luong coverage copy": (luong, AFTER | {"coverage": True, "copy": True, "score": "concat"}),
    "Luong feeding": (luong_feeding, FEEDING),
    "Luong feeding local-m coverage": (luong_feeding, FEEDING | LOCAL_M | {"coverage": True}),
    "Luong with everything": (luong_feeding, FEEDING | LOCAL_P | {"coverage": True, "copy": True, "residual": True}),
}


@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize("name", PAPERS)
def test_decoder_is_the_papers_loop(name, cell):
    equations, changes = PAPERS[name]
    settings = config(cell=cell, **{"layers": 2} | changes)
    decoder, memory, tokens = a_decoder(settings), a_memory(), torch.randint(9, (3, 5))
    features, _ = decoder(tokens, decoder.start(memory))
    plain = Plain(decoder, settings, memory)
    for position, x in enumerate(decoder.embedding(tokens).unbind(1)):
        same(features[:, position], plain.features(equations, x))


def drawn(module, monkeypatch):
    """A list of the masks that a module draws from now on, float (B, T or 1, inputs)."""
    masks, mask = [], module.dropout.mask

    def draw(shape, like):
        masks.append(mask(shape, like))
        return masks[-1]

    monkeypatch.setattr(module.dropout, "mask", draw)
    return masks


VARIATIONAL = pytest.mark.parametrize("variational", [True, False], ids=["variational", "ordinary"])


@VARIATIONAL
@pytest.mark.parametrize("name", ["Sutskever residual", "Cho", "Bahdanau coverage", "Luong copy", "Luong feeding"])
def test_dropout_of_a_decoder_falls_on_what_enters_each_layer_and_leaves_the_last(name, variational, monkeypatch):
    equations, changes = PAPERS.get(name, (luong, AFTER | {"copy": True}))
    settings = config(**{"layers": 2, "dropout": 0.4, "variational_dropout": variational} | changes)
    decoder, memory, tokens = a_decoder(settings), a_memory(), torch.randint(9, (3, 5))
    masks = drawn(decoder, monkeypatch)
    features, _ = decoder.train()(tokens, decoder.start(memory))
    assert [mask.shape[1] for mask in masks] == [1 if variational else 5] * (settings.layers + 1)
    assert all(0 < (mask == 0).double().mean() < 1 for mask in masks)
    plain = Plain(decoder, settings, memory, masks)
    for position, x in enumerate(decoder.embedding(tokens).unbind(1)):
        same(features[:, position], plain.features(equations, x))


@VARIATIONAL
def test_dropout_of_an_encoder_falls_on_what_enters_each_layer(variational, monkeypatch):
    settings = config(layers=3, bidirectional=True, dropout=0.4, variational_dropout=variational)
    encoder, batch = RNNEncoder(settings, Embedding(11, WIDTH)).double(), make_batch()
    masks = drawn(encoder, monkeypatch)
    memory = encoder.train()(batch.source, batch.source_mask)
    assert [mask.shape[1] for mask in masks] == [1 if variational else batch.source.shape[1]] * 3
    x = encoder.embedding(batch.source)
    for layer, mask in zip(encoder.layers, masks, strict=True):
        x = layer(x * mask, batch.source_mask)
    same(memory.states, x)


def test_variational_dropout_is_one_mask_for_all_positions_in_training_alone():
    ones = torch.ones(40, 6, 50, dtype=torch.float64)
    ordinary, variational = SequenceDropout(0.5, False), SequenceDropout(0.5, True)
    for dropout in (ordinary, variational):
        dropped = dropout(ones)
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert 0.45 < dropped.mean() / 2 < 0.55
        assert torch.equal(dropout.eval()(ones), ones) and torch.equal(dropout.factors(ones, 3), torch.ones(40, 6, 3))
        assert ((dropped == dropped[:, :1]).all() == (dropout is variational)).all()
        assert (dropped[0] != dropped[1]).any()


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
def test_a_projected_summary_is_that_of_the_last_state(bidirectional):
    settings, batch = config(summary="project", bidirectional=bidirectional), make_batch()
    encoder = RNNEncoder(settings, Embedding(11, WIDTH))
    summary = encoder(batch.source, batch.source_mask).summary
    V, encoder.projection = encoder.projection.weight, None
    last = encoder(batch.source, batch.source_mask).summary
    torch.testing.assert_close(summary, torch.stack([torch.tanh(V @ row) for row in last]))


def test_residual_layers_of_an_encoder_add_what_they_read():
    encoder, batch = RNNEncoder(config(layers=3, residual=True), Embedding(11, WIDTH)).double(), make_batch()
    first, second, third = encoder.layers
    x = first(encoder.embedding(batch.source), batch.source_mask)
    x = x + second(x, batch.source_mask)
    x = x + third(x, batch.source_mask)
    memory = encoder(batch.source, batch.source_mask)
    same(memory.states, x)
    same(memory.summary, x[torch.arange(len(batch)), batch.source_mask.sum(1) - 1])


def test_what_is_copied_is_sees_equation_9():
    settings = config(**BEFORE, **LOCAL_P, copy=True)
    decoder, memory, tokens = a_decoder(settings), a_memory(), torch.randint(9, (3, 5))
    taps = {}
    features, _ = decoder(tokens, decoder.start(memory), taps)
    table = normal(9, WIDTH)
    log_p = mixed_log_probabilities(features, table, memory.source)
    assert log_p.dtype == torch.float64 and (taps["cross.0"].sum(-1) < 0.999).any()
    same(log_p.exp().sum(-1), torch.ones(3, 5, dtype=torch.float64))
    for row in range(3):
        for t in range(5):
            hidden, p_gen = features[row, t, :WIDTH], torch.sigmoid(features[row, t, WIDTH])
            expected = p_gen * torch.softmax(table @ hidden, dim=0)
            shares = taps["cross.0"][row, t] / taps["cross.0"][row, t].sum()
            for token, share in zip(memory.source[row].tolist(), shares, strict=True):
                expected[token] += (1 - p_gen) * share
            same(log_p[row, t].exp(), expected)


def test_what_is_copied_has_gradients_where_nothing_can_be_copied_or_all_is():
    features = torch.cat([torch.randn(1, 3, WIDTH), torch.tensor([-200.0, 0.0, 200.0])[None, :, None],
                          torch.tensor([1.0, 0.0]).expand(1, 3, 2)], dim=-1).requires_grad_()
    log_p = mixed_log_probabilities(features, torch.randn(9, WIDTH), torch.tensor([[4, 0]]))
    log_p.sum().backward()
    assert log_p.isfinite().all() and features.grad.isfinite().all()
    assert log_p[0, 0].argmax() == 4 and log_p[0, 0, 4].abs() < 1e-6
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 3))
