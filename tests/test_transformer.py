"""The Transformer against torch's own layers with the same weights, and against plain loops where torch has none."""

import math
import warnings

import pytest
import torch
from torch import nn

from conftest import make_batch, make_model, model_config
from regard.errors import DataError
from regard.model.positions import POSITIONS
from regard.model.transformer import NORMS, FeedForward
from test_positions import bucket, sinusoid, slope, turned

BOTH_NORMS = pytest.mark.parametrize("name", ["transformer-pre", "transformer-post"])


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def copy_attention(theirs, ours):
    theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())


def copy_layer(theirs, ours):
    """Our layer's weights into torch's encoder or decoder layer."""
    with torch.no_grad():
        copy_attention(theirs.self_attn, ours.attention)
        norms = [ours.attention_residual, ours.feedforward_residual]
        if isinstance(theirs, nn.TransformerDecoderLayer):
            copy_attention(theirs.multihead_attn, ours.cross)
            norms.insert(1, ours.cross_residual)
        for number, residual in enumerate(norms, start=1):
            getattr(theirs, f"norm{number}").load_state_dict(residual.norm.state_dict())
        theirs.linear1.load_state_dict(ours.feedforward.inner.state_dict())
        theirs.linear2.load_state_dict(ours.feedforward.outer.state_dict())


def torchs_layer(kind, name):
    post = name == "transformer-post"
    return kind(8, 2, 12, 0.0, "gelu" if post else "relu", batch_first=True, norm_first=not post).double()


@BOTH_NORMS
def test_encoder_is_torchs(name):
    model, batch = make_model(name), make_batch()
    x = model.encoder.positions(model.encoder.embedding(batch.source))
    for ours in model.encoder.layers:
        theirs = torchs_layer(nn.TransformerEncoderLayer, name)
        copy_layer(theirs, ours)
        x = theirs(x, src_key_padding_mask=~batch.source_mask)
    memory, real = model.encode(batch.source, batch.source_mask), batch.source_mask
    same(memory.states[real], model.encoder.norm(x)[real])
    for row, mask in enumerate(real):
        same(memory.summary[row], memory.states[row][mask].mean(0))


@BOTH_NORMS
def test_decoder_is_torchs(name):
    model, batch = make_model(name), make_batch()
    memory = model.encode(batch.source, batch.source_mask)
    x = model.decoder.positions(model.decoder.embedding(batch.target_in))
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for ours in model.decoder.layers:
        theirs = torchs_layer(nn.TransformerDecoderLayer, name)
        copy_layer(theirs, ours)
        x = theirs(x, memory.states, tgt_mask=future, memory_key_padding_mask=~batch.source_mask)
    same(model(batch), model.decoder.norm(x))


@pytest.mark.parametrize("dropout", ["dropout", "attention_dropout", "feedforward_dropout"])
def test_each_dropout_is_on_in_training_alone(dropout):
    model, batch = make_model("transformer-pre", **{dropout: 0.5}), make_batch()
    plain = make_model("transformer-pre")(batch)
    assert torch.equal(model(batch), plain)
    assert not torch.allclose(model.train()(batch), plain)


@pytest.mark.parametrize("norm_kind", ["layer", "rms"])
def test_in_bfloat16_layers_compute_in_it_throughout_and_nothing_warns(norm_kind):
    model, batch = make_model("transformer-post", norm_kind=norm_kind).float().train(), make_batch()
    seen = []
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        model(batch).sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert {weights.grad.dtype for weights in model.parameters() if weights.grad is not None} == {torch.float32}


# --- what came after 2017 ------------------------------------------------------------------------------------------


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def parameters_moved(module):
    """The module in float64, its weights larger than at birth."""
    with torch.no_grad():
        for weights in module.double().parameters():
            weights += 0.3 * torch.randn_like(weights)
    return module


def test_rms_norm_is_the_formula():
    torch.manual_seed(1)
    norm, x = parameters_moved(NORMS["rms"](6)), normal(2, 3, 6)
    found = norm(x)
    for b in range(2):
        for t in range(3):
            root = math.sqrt(sum(value**2 for value in x[b, t].tolist()) / 6 + 1e-5)
            expected = [value / root * gain for value, gain in zip(x[b, t].tolist(), norm.weight.tolist(), strict=True)]
            assert found[b, t].tolist() == pytest.approx(expected, rel=1e-12)
    assert len(list(norm.parameters())) == 1
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x.requires_grad_(), norm.weight))


@pytest.mark.parametrize("name", ["transformer-learned", "transformer-rotary"])
def test_a_model_with_rms_norm_has_no_other(name):
    model = make_model(name)
    norms = [module for module in model.modules() if isinstance(module, nn.RMSNorm | nn.LayerNorm)]
    final = 2 * (name == "transformer-rotary")  # it is pre-norm
    assert all(isinstance(norm, nn.RMSNorm) for norm in norms) and len(norms) == 2 * 2 + 2 * 3 + final


def test_swiglu_is_the_formula():
    torch.manual_seed(1)
    part = parameters_moved(FeedForward(model_config("transformer-pre", activation="swiglu").encoder)).eval()
    x = normal(2, 3, 8)
    W, V = part.inner.weight[:12], part.inner.weight[12:]
    b, c = part.inner.bias[:12], part.inner.bias[12:]
    assert part.inner.weight.shape == (24, 8) and part.outer.weight.shape == (8, 12)
    for row, found in zip(x.flatten(0, 1), part(x).flatten(0, 1), strict=True):
        gate, value = W @ row + b, V @ row + c
        same(found, part.outer.weight @ (gate / (1 + torch.exp(-gate)) * value) + part.outer.bias)
    assert torch.autograd.gradcheck(lambda x, *_: part(x), (x.requires_grad_(), *part.parameters()))


def test_encoder_and_decoder_have_their_own_number_of_layers():
    for changes, expected in (({"encoder_layers": 3}, (3, 2)), ({"decoder_layers": 1}, (2, 1)),
                              ({"encoder_layers": 1, "decoder_layers": 3}, (1, 3))):
        model = make_model("transformer-pre", **changes)
        assert (len(model.encoder.layers), len(model.decoder.layers)) == expected


def test_the_cache_holds_the_heads_of_keys_and_values_alone():
    batch = make_batch()
    for kv_heads in (1, 2, 4):
        model = make_model("transformer-pre", heads=4, kv_heads=kv_heads)
        _, state = model.decoder(batch.target_in[:, :3], model.start(batch))
        for tensors, length in ((state.past.blocks, 3), (state.shared, batch.source.shape[1])):
            assert tensors.keys() == {f"{layer}.{name}" for layer in range(2) for name in ("keys", "values")}
            assert {tuple(tensor.shape) for tensor in tensors.values()} == {(4, kv_heads, length, 2)}
        assert state.cache == {}


# --- positions in their place: the first layer, one number at a time ------------------------------------------------


def placed(side, tokens):
    """Token vectors of (B, T) tokens with what the kind of position adds to them."""
    x = side.embedding(tokens)
    for t in range(tokens.shape[1]):
        if kind(side) == "Sinusoidal":
            x[:, t] += torch.tensor(sinusoid(t, x.shape[2]), dtype=x.dtype)
        if kind(side) == "Learned":
            x[:, t] += side.positions.table[t]
    return x


def kind(side):
    return type(side.positions).__name__


def scores_of(side, x, past_only):
    """Scores (B, H, T, T) of the first layer's self-attention, written out; -inf where nothing may be looked at."""
    attention, (B, T, D) = side.layers[0].attention, x.shape
    H, K = attention.heads, attention.kv_heads
    queries = attention.query(x).view(B, T, H, D // H).tolist()
    keys = attention.key_value(x)[..., : D * K // H].view(B, T, K, D // H).tolist()
    scores = torch.full((B, H, T, T), -math.inf, dtype=x.dtype)
    for b, h, t, s in ((b, h, t, s) for b in range(B) for h in range(H) for t in range(T) for s in range(T)):
        if past_only and s > t:
            continue
        query, key = queries[b][t][h], keys[b][s][h // (H // K)]
        if kind(side) == "Rotary":
            query, key = turned(query, t), turned(key, s)
        scores[b, h, t, s] = sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(D // H)
        if kind(side) == "Relative":
            scores[b, h, t, s] += side.positions.table[bucket(s - t, not past_only), h]
        if kind(side) == "Alibi":
            scores[b, h, t, s] -= slope(h, H) * abs(t - s)
    return scores


def close(left, right):
    """The tables of sines are float32."""
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def first_layer(name, heads=4, kv_heads=2):
    """A post-norm model, whose first attention meets the token vectors as they are, and a batch of longer rows."""
    model = make_model("transformer-post", positions=name, heads=heads, kv_heads=kv_heads, layers=1)
    return model, make_batch([(13, 11), (4, 14)])


EVERY = pytest.mark.parametrize("name", POSITIONS)


@EVERY
@torch.no_grad()
def test_positions_in_the_encoder(name):
    model, batch = first_layer(name)
    taps = {}
    model.encode(batch.source, batch.source_mask, taps)
    scores = scores_of(model.encoder, placed(model.encoder, batch.source), past_only=False)
    close(taps["encoder.0"], scores.masked_fill(~batch.source_mask[:, None, None], -math.inf).softmax(-1))


@EVERY
@pytest.mark.parametrize("sizes", [[15], [1] * 15, [4, 1, 10]], ids=["at once", "one by one", "in pieces"])
@torch.no_grad()
def test_positions_in_the_decoder_and_none_in_its_look_at_the_source(name, sizes):
    model, batch = first_layer(name)
    memory, state, features = model.encode(batch.source, batch.source_mask), model.start(batch), []
    own, cross = torch.zeros(2, 4, 15, 15, dtype=torch.float64), []
    for tokens in batch.target_in.split(sizes, dim=1):
        taps, begin = {}, state.length
        part, state = model.decoder(tokens, state, taps)
        own[:, :, begin : state.length, : state.length] = taps["decoder.0"]
        cross.append(taps["cross.0"])
        features.append(part)
    side, layer = model.decoder, model.decoder.layers[0]
    x = placed(side, batch.target_in)
    weights = scores_of(side, x, past_only=True).softmax(-1)
    close(own, weights)

    def heads(x):
        return x.view(*x.shape[:2], -1, 2).transpose(1, 2)

    def full(keys_or_values):
        return heads(keys_or_values).repeat_interleave(2, dim=1)

    def output(attention, contexts):
        return attention.output(contexts.transpose(1, 2).flatten(2))

    _, values = layer.attention.key_value(x).chunk(2, -1)
    x = layer.attention_residual.norm(x + output(layer.attention, weights @ full(values)))
    keys, values = layer.cross.key_value(memory.states).chunk(2, -1)
    scores = heads(layer.cross.query(x)) @ full(keys).mT / math.sqrt(2)
    weights = scores.masked_fill(~batch.source_mask[:, None, None], -math.inf).softmax(-1)
    close(torch.cat(cross, dim=2), weights)
    x = layer.cross_residual.norm(x + output(layer.cross, weights @ full(values)))
    close(torch.cat(features, dim=1), layer.feedforward_residual.norm(x + layer.feedforward(x)))


@EVERY
def test_each_kind_but_none_tells_the_encoder_what_stands_where(name):
    model, source = make_model("transformer-pre", positions=name), torch.tensor([[4, 5, 6, 7, 2]])
    order, mask = torch.tensor([3, 0, 4, 1, 2]), torch.ones(1, 5, dtype=torch.bool)
    states, moved = (model.encode(each, mask).states for each in (source, source[:, order]))
    difference = (states[:, order] - moved).abs().max().item()
    assert difference < 1e-10 if name == "none" else difference > 1e-3


def test_one_table_of_distances_serves_all_layers_of_a_side():
    model = make_model("transformer-pre", positions="relative", layers=3)
    tables = {name: tuple(weights.shape) for name, weights in model.named_parameters() if "positions" in name}
    assert tables == {"encoder.positions.table": (32, 2), "decoder.positions.table": (32, 2)}


def test_learned_positions_end_where_the_settings_say():
    model, batch = make_model("transformer-learned", max_positions=6), make_batch([(5, 5)])
    _, state = model.decoder(batch.target_in, model.start(batch))
    with pytest.raises(DataError, match=r"has 7 tokens, .* max_positions = 6 places"):
        model.decoder(batch.target_in[:, :1], state)
    with pytest.raises(DataError, match=r"has 8 tokens, .* max_positions = 6 places"):
        model.start(make_batch([(7, 1)]))
