"""The convolutional family against plain loops written from Gehring et al. (2017), and against torch's own parts."""

import math

import pytest
import torch
from torch import nn

from conftest import SOURCE_SIZE, make_batch, make_model, model_config
from regard.data.batches import Batch
from regard.errors import DataError
from regard.model.conv import ConvEncoder, DecoderLayer, EncoderLayer, GatedConvolution, Normed
from regard.model.layers import INIT, Dropout, Embedding
from regard.model.state import Memory, State

HALF = math.sqrt(0.5)
KERNELS = pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
DECODERS = ["conv", "conv-kernel-2-reversed", "conv-kernel-5", "mixed-rnn-conv", "mixed-transformer-conv"]
ENCODERS = ["conv", "conv-kernel-2-reversed", "conv-kernel-5", "mixed-conv-transformer"]


def same(left, right, tolerance=1e-11):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def side(**changes):
    """The settings of one side, 4 wide unless told otherwise."""
    return model_config("conv", **{"width": 4, "layers": 1} | changes).encoder


def shaken(module, seed=1):
    """A module in float64 with weights that are not those of its birth, so that lengths and biases count."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weights in module.double().parameters():
            weights += 0.3 * torch.randn_like(weights)
    return module


# --- plain loops: vectors are lists of floats ----------------------------------------------------------------------


def plain_linear(module, x):
    """w_o · x + b_o with w_o = g_o v_o / |v_o|, for each output o."""
    if isinstance(module, nn.Identity):
        return x
    outputs = []
    for v, g, b in zip(module.direction.tolist(), module.length.tolist(), module.bias.tolist(), strict=True):
        norm = math.sqrt(sum(value * value for value in v))
        outputs.append(sum(g * value / norm * each for value, each in zip(v, x, strict=True)) + b)
    return outputs


def plain_glu_convolution(module, rows, left, right):
    """v(W [x_{i - left}; …; x_{i + right}] + b) for each i, with zeros where there is no x."""
    width, outputs = len(rows[0]), []
    for i in range(len(rows)):
        window = [rows[j] if 0 <= j < len(rows) else [0.0] * width for j in range(i - left, i + right + 1)]
        y = plain_linear(module.linear, [value for row in window for value in row])
        outputs.append([a / (1 + math.exp(-b)) for a, b in zip(y[:width], y[width:], strict=True)])
    return outputs


def plain_sum(left, right):
    return [(a + b) * HALF for a, b in zip(left, right, strict=True)]


def plain_vectors(side, tokens):
    """w_j + p_j: token vectors with those of their places."""
    return [(side.embedding.weight[token] * side.embedding.scale + side.positions.table[place]).tolist()
            for place, token in enumerate(tokens)]


def plain_encoder(encoder, tokens):
    """States z and values z + e of one source without padding."""
    vectors = plain_vectors(encoder, tokens)
    states = [plain_linear(encoder.enter, vector) for vector in vectors]
    for layer in encoder.layers:
        left = (layer.convolution.kernel - 1) // 2
        outputs = plain_glu_convolution(layer.convolution, states, left, layer.convolution.kernel - 1 - left)
        states = [plain_sum(output, state) for output, state in zip(outputs, states, strict=True)]
    states = [plain_linear(encoder.leave, state) for state in states]
    return states, [plain_sum(z, e) for z, e in zip(states, vectors, strict=True)]


def plain_layer(layer, hidden, targets, states, values):
    """One decoder layer over a whole target: its outputs, and the weights of its attention."""
    outputs, looked = plain_glu_convolution(layer.convolution, hidden, layer.convolution.kernel - 1, 0), []
    for i, output in enumerate(outputs):
        query = plain_linear(layer.to_memory, plain_sum(plain_linear(layer.query, output), targets[i]))  # d
        powers = [math.exp(sum(d * z for d, z in zip(query, state, strict=True))) for state in states]
        weights = [power / sum(powers) for power in powers]  # a
        m = len(states)
        context = [m * math.sqrt(1 / m) * sum(a * value[place] for a, value in zip(weights, values, strict=True))
                   for place in range(len(values[0]))]  # c
        outputs[i] = plain_sum(plain_sum(output, plain_linear(layer.from_memory, context)), hidden[i])
        looked.append(weights)
    return outputs, looked


def plain_decoder(decoder, tokens, states, values):
    """Features of a whole target, and the weights of each layer's attention."""
    targets = plain_vectors(decoder, tokens)
    hidden, looked = [plain_linear(decoder.enter, target) for target in targets], []
    for layer in decoder.layers:
        hidden, weights = plain_layer(layer, hidden, targets, states, values)
        looked.append(weights)
    return [plain_linear(decoder.leave, each) for each in hidden], looked


# --- the parts -----------------------------------------------------------------------------------------------------


def test_normed_weights_are_torchs():
    ours = shaken(Normed(5, 3))
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3).double())
    with torch.no_grad():
        theirs.bias.copy_(ours.bias)
        theirs.parametrizations.weight.original0.copy_(ours.length[:, None])
        theirs.parametrizations.weight.original1.copy_(ours.direction)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    same(ours(x), theirs(x))
    (ours(x) ** 2).sum().backward()
    (theirs(x) ** 2).sum().backward()
    same(ours.length.grad[:, None], theirs.parametrizations.weight.original0.grad)
    same(ours.direction.grad, theirs.parametrizations.weight.original1.grad)
    same(ours.bias.grad, theirs.bias.grad)
    same(ours(x)[0, 0], torch.tensor(plain_linear(ours, x[0, 0].tolist()), dtype=torch.float64))


def test_weights_begin_small_or_keep_the_variance_and_lengths_are_theirs():
    torch.manual_seed(1)
    layer, kept = DecoderLayer(side(width=200), 100), Normed(400, 300)
    for module, std in ((kept, 1 / 20), (layer.convolution.linear, INIT), (layer.query, INIT),
                        (layer.to_memory, 1 / math.sqrt(200)), (layer.from_memory, 1 / 10)):
        assert float(module.direction.detach().std()) == pytest.approx(std, rel=0.02)
        assert torch.equal(module.length, module.direction.norm(dim=1)) and not module.bias.any()
    x = torch.randn(500, 400)
    assert float(kept(x).detach().var()) == pytest.approx(float(x.var()), rel=0.05)


@KERNELS
def test_a_gated_convolution_is_the_loop_and_torchs(kernel):
    module = shaken(GatedConvolution(side(kernel=kernel)))
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    left = nn.functional.pad(x, (0, 0, kernel - 1, 0))
    for row, y in zip(x, module(left), strict=True):
        same(y, torch.tensor(plain_glu_convolution(module, row.tolist(), kernel - 1, 0), dtype=torch.float64))
    v = module.linear.direction
    weight = (v * (module.linear.length / v.norm(dim=1))[:, None]).view(8, kernel, 4).transpose(1, 2)  # (2 D, D, k)
    theirs = nn.functional.conv1d(left.transpose(1, 2), weight, module.linear.bias)
    same(module(left), nn.functional.glu(theirs, dim=1).transpose(1, 2))


@KERNELS
def test_an_encoder_layer_sees_both_sides_and_keeps_the_length(kernel):
    layer = shaken(EncoderLayer(side(kernel=kernel)))
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    sides = (kernel - 1) // 2, kernel // 2
    expected = plain_glu_convolution(layer.convolution, x[0].tolist(), *sides)
    same(layer(x)[0], (torch.tensor(expected, dtype=torch.float64) + x[0]) * HALF)
    for place in range(7):
        other = x.clone()
        other[:, place] += 1
        moved = (layer(other) != layer(x)).any(-1)[0].nonzero().flatten().tolist()
        assert moved == [i for i in range(7) if place - sides[1] <= i <= place + sides[0]]


@pytest.mark.parametrize("width", [4, 6], ids=["memory as wide", "memory wider"])
@KERNELS
def test_a_decoder_layer_is_the_loop_and_keeps_its_last_inputs(kernel, width):
    layer = shaken(DecoderLayer(side(kernel=kernel), width))
    states, values = torch.randn(2, 1, 3, width, dtype=torch.float64)
    x, target = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    past = torch.zeros(1, kernel - 1, 4, dtype=torch.float64)
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    memory = Memory(states, everywhere, states.mean(1), everywhere.long(), values)
    state = State(memory, 0, {}, {"root": torch.full((1, 1, 1), math.sqrt(3), dtype=torch.float64)})
    output, after, weights = layer(x, target, past, state)
    rows = [tensor[0].tolist() for tensor in (x, target, states, values)]
    expected, looked = plain_layer(layer, *rows)
    same(output[0], torch.tensor(expected, dtype=torch.float64))
    same(weights[0], torch.tensor(looked, dtype=torch.float64))
    same(after, torch.cat([past, x], dim=1)[:, 5:], 0)


@pytest.mark.parametrize("width", [4, 5])
def test_gradients_of_a_layer_are_those_of_differences(width):
    encoder, decoder = shaken(EncoderLayer(side(kernel=2))), shaken(DecoderLayer(side(kernel=2), width))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    root = mask.sum(1).double().sqrt()[:, None, None]

    def decode(x, target, past, states, values, *weights):
        state = State(Memory(states, mask, states.mean(1), mask.long(), values), 0, {}, {"root": root})
        return torch.func.functional_call(decoder, dict(zip(dict(decoder.named_parameters()), weights, strict=True)),
                                          (x, target, past, state))

    def inputs(module, *shapes):
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes] + [
            weights.detach().requires_grad_() for weights in module.parameters()]

    def encode(x, *weights):
        return torch.func.functional_call(encoder, dict(zip(dict(encoder.named_parameters()), weights, strict=True)), x)

    assert torch.autograd.gradcheck(encode, inputs(encoder, (2, 3, 4)))
    assert torch.autograd.gradcheck(decode, inputs(decoder, (2, 2, 4), (2, 2, 4), (2, 1, 4), (2, 3, width),
                                                   (2, 3, width)))


# --- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoder_is_the_loop(name):
    encoder, batch = make_model(name).encoder, make_batch()
    memory = encoder(batch.source, batch.source_mask)
    for row, (tokens, mask) in enumerate(zip(batch.source, batch.source_mask, strict=True)):
        states, values = (torch.tensor(each, dtype=torch.float64) for each in plain_encoder(
            encoder, tokens[mask].tolist()))
        same(memory.states[row][mask], states)
        same(memory.values[row][mask], values)
        same(memory.summary[row], states.mean(0))


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_is_the_loop(name):
    model, batch, taps = make_model(name), make_batch(), {}
    memory = model.encode(batch.source, batch.source_mask)
    features, _ = model.decoder(batch.target_in, model.decoder.start(memory), taps)
    for row, mask in enumerate(batch.source_mask):
        states, values = memory.states[row][mask].tolist(), memory.values[row][mask].tolist()
        expected, looked = plain_decoder(model.decoder, batch.target_in[row].tolist(), states, values)
        same(features[row], torch.tensor(expected, dtype=torch.float64))
        for layer, weights in enumerate(looked):
            same(taps[f"cross.{layer}"][row][:, mask], torch.tensor(weights, dtype=torch.float64))
    assert len(taps) == len(model.decoder.layers)


def test_a_memory_of_another_width_is_met_by_maps_and_one_of_the_same_is_not():
    mixed, pure = make_model("mixed-rnn-conv").decoder.layers[0], make_model("conv").decoder.layers[0]
    assert mixed.to_memory.direction.shape == (6, 8) and mixed.from_memory.direction.shape == (8, 6)
    assert isinstance(pure.to_memory, nn.Identity) and isinstance(pure.from_memory, nn.Identity)


def test_what_stands_at_padding_does_not_enter_a_convolution():
    torch.manual_seed(1)
    encoder = shaken(ConvEncoder(side(kernel=5, layers=3), Embedding(SOURCE_SIZE, 4)))
    seen = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    source = torch.tensor([[4, 5, 6, 7], [4, 7, 7, 7]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    encoder.eval()(source, mask)
    assert len(seen) == 3 and all(not x[~mask].any() and x[mask].all() for x in seen)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_cache_is_the_last_inputs_of_each_layer(kernel):
    decoder, batch = make_model("conv", kernel=kernel).decoder, make_batch()
    memory = make_model("conv", kernel=kernel).encode(batch.source, batch.source_mask)
    inputs = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda module, inner: inputs.append(inner[0]))
    start = decoder.start(memory)
    same(start.shared["root"].flatten() ** 2, batch.source_mask.sum(1).double())
    _, state = decoder(batch.target_in[:, :1], start)
    for index, x in enumerate(inputs):
        assert start.cache[f"{index}.past"].shape == (4, kernel - 1, 8) and not start.cache[f"{index}.past"].any()
        assert torch.equal(state.cache[f"{index}.past"],
                           torch.cat([start.cache[f"{index}.past"], x], dim=1)[:, 1:])
    _, state = decoder(batch.target_in, start)
    for index, x in enumerate(inputs[2:]):
        assert torch.equal(state.cache[f"{index}.past"], x[:, x.shape[1] - kernel + 1 :])


def test_dropout_falls_on_vectors_layers_and_features_in_training_alone():
    model, batch, seen = make_model("conv", dropout=0.5), make_batch(), []
    for module in model.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    same(model(batch), model(batch), 0)
    assert all(x is dropped for x, dropped in seen)
    seen.clear()
    features = model.train()(batch)
    assert len(seen) == (1 + 2) + (1 + 2 + 1) and all((dropped == 0).any() for x, dropped in seen)
    assert torch.equal(seen[-1][1], features)
    first, second = seen[0], seen[3]
    same(first[0], model.encoder.positions(model.encoder.embedding(batch.source)), 0)
    same(second[0], model.decoder.positions(model.decoder.embedding(batch.target_in)), 0)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_sequence_beyond_the_learned_positions_is_refused(side):
    model = make_model("conv", max_positions=4)
    fits, longer = Batch.of([[4, 5, 6]], [[4, 5, 6]]), Batch.of([[4, 5, 6, 7]], [[4, 5, 6, 7]])
    model(fits)
    with pytest.raises(DataError, match=r"has 5 tokens.*max_positions = 4.*max_positions = 5 or more"):
        model(Batch(**{**vars(fits), **{key: value for key, value in vars(longer).items() if key.startswith(side)}}))
