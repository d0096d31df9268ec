"""The Transformer against Hugging Face's Marian, an implementation by other people, with the same weights."""

import pytest
import torch

from conftest import make_batch, model_config
from regard.model.seq2seq import build_model

transformers = pytest.importorskip("transformers", reason="the extra 'dev' is not installed")

SIZE, WIDTH = 9, 8
HALVES = torch.arange(WIDTH).view(2, -1).T.flatten()
"""Marian writes its sines into the first half of the width and its cosines into the second; ours alternate. Place i of
our width is place HALVES[i] of theirs."""


def marian(activation):
    """A small Marian in float64, its weights large enough to matter."""
    torch.manual_seed(1)
    model = transformers.MarianMTModel(transformers.MarianConfig(
        vocab_size=SIZE, d_model=WIDTH, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, activation_function=activation,
        max_position_embeddings=64, scale_embedding=True, dropout=0.0, pad_token_id=0, eos_token_id=2,
        forced_eos_token_id=2, decoder_start_token_id=1)).double().eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.requires_grad:  # the table of positions has none
                weights += 0.3 * torch.randn_like(weights)
    assert not model.final_logits_bias.any()
    return model


def copy_map(ours, *theirs, inputs=None, outputs=None):
    """Linear maps of theirs, one upon the other, into one of ours, its width put into our order on the sides named."""
    rows = [each.weight if outputs is None else each.weight[outputs] for each in theirs]
    ours.weight.copy_(torch.cat([each if inputs is None else each[:, inputs] for each in rows]))
    ours.bias.copy_(torch.cat([each.bias if outputs is None else each.bias[outputs] for each in theirs]))


def copy_attention(ours, theirs):
    copy_map(ours.query, theirs.q_proj, inputs=HALVES)
    copy_map(ours.key_value, theirs.k_proj, theirs.v_proj, inputs=HALVES)
    copy_map(ours.output, theirs.out_proj, outputs=HALVES)


def copy_norm(ours, theirs):
    ours.norm.weight.copy_(theirs.weight[HALVES])
    ours.norm.bias.copy_(theirs.bias[HALVES])


def copy_layer(ours, theirs):
    copy_attention(ours.attention, theirs.self_attn)
    copy_norm(ours.attention_residual, theirs.self_attn_layer_norm)
    if hasattr(ours, "cross"):
        copy_attention(ours.cross, theirs.encoder_attn)
        copy_norm(ours.cross_residual, theirs.encoder_attn_layer_norm)
    copy_map(ours.feedforward.inner, theirs.fc1, inputs=HALVES)
    copy_map(ours.feedforward.outer, theirs.fc2, outputs=HALVES)
    copy_norm(ours.feedforward_residual, theirs.final_layer_norm)


@torch.no_grad()
def copied(theirs, activation):
    """A model of ours with their weights: one table for both embeddings and the output, norms after each residual."""
    config = model_config("transformer-post", tie="all", activation=activation, encoder_layers=3, decoder_layers=2)
    ours = build_model(config, SIZE, SIZE).double().eval()
    ours.output.copy_(theirs.model.shared.weight[:, HALVES])
    for side in ("encoder", "decoder"):
        for own, other in zip(getattr(ours, side).layers, getattr(theirs.model, side).layers, strict=True):
            copy_layer(own, other)
    return ours


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_logits_are_marians(activation):
    theirs, batch = marian(activation), make_batch([(5, 4), (2, 6), (1, 1), (20, 25)])
    ours = copied(theirs, activation)
    expected = theirs(batch.source, batch.source_mask.long(), batch.target_in).logits
    found = ours.project(ours(batch))
    torch.testing.assert_close(found[batch.target_mask], expected[batch.target_mask], rtol=1e-6, atol=1e-6)
    assert expected.std() > 0.5  # they are about something
    state, stepwise = ours.start(batch), []
    for token in batch.target_in.split(1, dim=1):
        features, state = ours.decoder(token, state)
        stepwise.append(ours.project(features))
    torch.testing.assert_close(torch.cat(stepwise, 1)[batch.target_mask], expected[batch.target_mask],
                               rtol=1e-6, atol=1e-6)
