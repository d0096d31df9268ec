"""The RNN encoder against torch's own with packed sequences, the decoders against plain loops from the papers."""

import pytest
import torch
from torch import nn

from conftest import make_batch, model_config
from regard.model.layers import Embedding
from regard.model.rnn import CELLS, Cell, RNNDecoder, RNNEncoder, parts_of, reverse

CELL_STEPS = {"elman": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
WIDTH = 8


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
@pytest.mark.parametrize("cell", CELLS)
def test_encoder_is_torchs_with_packed_sequences(cell, bidirectional):
    settings = config(cell=cell, layers=2, bidirectional=bidirectional)
    encoder, batch = RNNEncoder(settings, Embedding(11, WIDTH)).double(), make_batch()
    theirs = CELLS[cell](WIDTH, WIDTH // 2 if bidirectional else WIDTH, num_layers=2, batch_first=True,
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


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_goes_on_from_its_state(cell):
    ours, x = Cell(cell, 3, 4).double(), torch.randn(2, 5, 3, dtype=torch.float64)
    whole, last = ours(x)
    first, middle = ours(x[:, :2])
    second, end = ours(x[:, 2:], middle)
    assert tuple(last) == parts_of(cell)
    same(torch.cat([first, second], dim=1), whole)
    for name in last:
        same(end[name], last[name])


class Plain:
    """A decoder's cells, one step and one row at a time, with the weights of one of ours."""

    def __init__(self, decoder, cell, memory):
        self.decoder, self.memory, self.kind = decoder, memory, cell
        self.cells = []
        for layer in decoder.layers:
            step = CELL_STEPS[cell](layer.rnn.input_size, WIDTH).double()
            step.load_state_dict({name.removesuffix("_l0"): weights for name, weights in layer.rnn.named_parameters()})
            self.cells.append(step)
        start = torch.tanh(decoder.bridge(memory.summary)).split(WIDTH, dim=-1)
        parts = len(parts_of(cell))
        self.states = [start[index * parts : (index + 1) * parts] for index in range(len(self.cells))]

    @property
    def top(self):
        return self.states[-1][0]

    def step(self, x):
        for index, (cell, state) in enumerate(zip(self.cells, self.states, strict=True)):
            after = cell(x, state if self.kind == "lstm" else state[0])
            self.states[index] = after if isinstance(after, tuple) else (after,)
            x = self.states[index][0]
        return x

    def look(self, query):
        """Softmax over the real positions of each row, and the sum of their states."""
        score, contexts = self.decoder.attention.score, []
        for row, mask in enumerate(self.memory.mask):
            states = self.memory.states[row][mask]
            contexts.append(torch.softmax(score(query[row][None], states), dim=-1)[0] @ states)
        return torch.stack(contexts)

    def read(self, hidden, context):
        return torch.tanh(self.decoder.readout(torch.cat([context, hidden], dim=-1)))


def sutskever(plain, x):
    return plain.step(x)


def cho(plain, x):
    context = plain.memory.summary
    return plain.read(plain.step(torch.cat([x, context], dim=-1)), context)


def bahdanau(plain, x):
    context = plain.look(plain.top)
    return plain.read(plain.step(torch.cat([x, context], dim=-1)), context)


def luong(plain, x):
    hidden = plain.step(x)
    return plain.read(hidden, plain.look(hidden))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("step, settings", [
    (sutskever, {}), (cho, {"context": "every_step"}), (bahdanau, {"attention": "before", "score": "additive"}),
    (luong, {"attention": "after", "score": "general"}),
], ids=["Sutskever", "Cho", "Bahdanau", "Luong"])
def test_decoder_is_the_papers_loop(step, settings, cell):
    settings = config(cell=cell, layers=2, **settings)
    batch = make_batch()
    memory = RNNEncoder(settings, Embedding(11, WIDTH)).double()(batch.source, batch.source_mask)
    decoder = RNNDecoder(settings, Embedding(9, WIDTH)).double()
    features, _ = decoder(batch.target_in, decoder.start(memory))
    plain = Plain(decoder, cell, memory)
    for position, x in enumerate(decoder.embedding(batch.target_in).unbind(1)):
        same(features[:, position], step(plain, x))


@pytest.mark.parametrize("place", ["none", "before", "after"])
def test_dropout_is_on_in_training_alone(place):
    settings = config(dropout=0.5, attention=place)
    batch, encoder = make_batch(), RNNEncoder(settings, Embedding(11, WIDTH))
    decoder = RNNDecoder(settings, Embedding(9, WIDTH))

    def features(training):
        memory = encoder.train(training)(batch.source, batch.source_mask)
        return decoder.train(training)(batch.target_in, decoder.start(memory))[0]

    assert not torch.equal(features(True), features(True)) and torch.equal(features(False), features(False))
