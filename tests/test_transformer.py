"""The Transformer against torch's own layers with the same weights."""

import pytest
import torch
from torch import nn

from conftest import make_batch, make_model

NORMS = pytest.mark.parametrize("name", ["transformer-pre", "transformer-post"])


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


@NORMS
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


@NORMS
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
