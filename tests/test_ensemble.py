"""Several models that answer as one: the mean of their probabilities, at each step and over a whole output."""

import pytest
import torch

from conftest import FAMILIES, TARGET_SIZE, make_batch, make_model
from regard.config import DecodeConfig
from regard.data.batches import Batch
from regard.decode.ensemble import Ensemble, attention_of
from regard.decode.search import Demands, Limits, beam_search, forced, greedy, search

NAMES = ["before-additive", "conv", "transformer-pre", "fixed-gru-every-step"]
LIMITS = Limits(7)


def same(left, right, tolerance=1e-12):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], ["transformer-pre"]])
def test_probabilities_are_the_mean_of_the_models(names):
    models, batch = [make_model(name, seed) for seed, name in enumerate(names)], make_batch()
    ensemble = Ensemble(models)
    log_p = ensemble.log_probabilities(ensemble(batch), batch.source)
    each = torch.stack([model.log_probabilities(model(batch), batch.source).exp() for model in models])
    same(log_p.exp(), each.mean(0))
    same(log_p.exp().sum(-1), torch.ones_like(log_p[..., 0]))


def test_step_by_step_is_all_at_once_and_rows_can_be_selected():
    ensemble, batch = Ensemble([make_model(name) for name in NAMES]), make_batch()
    expected = ensemble.log_probabilities(ensemble(batch), batch.source)
    rows = torch.tensor([3, 0, 0, 2])
    state = ensemble.start(batch)
    for place in range(batch.target_in.shape[1]):
        if place == 2:
            state, expected = state.select(rows), expected[rows]
        target = batch.target_in if place < 2 else batch.target_in[rows]
        features, state = ensemble.decoder(target[:, place : place + 1], state)
        same(ensemble.log_probabilities(features, state.memory.source)[:, 0], expected[:, place])
        assert state.length == place + 1
    same(state.memory.source, batch.source[rows], 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_itself_is_itself(name):
    model, batch = make_model(name), make_batch()
    twice = Ensemble([model, model])
    for one, other in zip(beam_search(model, batch, 3, 1.0, LIMITS), beam_search(twice, batch, 3, 1.0, LIMITS),
                          strict=True):
        assert [each.tokens for each in one] == [each.tokens for each in other]
        assert [each.score for each in one] == pytest.approx([each.score for each in other], abs=1e-5)


def test_greedy_takes_what_the_mean_finds_likeliest_and_scores_it_so():
    models, batch = [make_model(name) for name in NAMES], make_batch([(4, 1)])
    ensemble = Ensemble(models)
    found, = greedy(ensemble, batch, LIMITS)
    for place, token in enumerate(found.tokens):
        before = Batch.of([batch.source[0, :-1].tolist()], [found.tokens[:place]])
        p = sum(model.log_probabilities(model(before), before.source)[0, -1].exp() for model in models) / len(models)
        assert p[2:].argmax() + 2 == token
    target = found.tokens if found.tokens[-1] != 2 else found.tokens[:-1]
    total = forced(ensemble, Batch.of([batch.source[0, :-1].tolist()], [target]))[0, : len(found.tokens)].sum()
    assert found.log_probability == pytest.approx(float(total), abs=1e-5)


def test_attention_is_the_mean_of_those_that_look():
    models, batch, taps = [make_model(name) for name in NAMES], make_batch(), {}
    Ensemble(models)(batch, taps)
    expected = []
    for model in models[:3]:
        own = {}
        model(batch, own)
        layers = [weights.mean(1) if weights.dim() == 4 else weights for name, weights in own.items()
                  if name.startswith("cross.")]
        expected.append(sum(layers) / len(layers))
    assert taps.keys() == {"cross.0"}
    same(taps["cross.0"], sum(expected) / 3)
    same(attention_of(taps), taps["cross.0"])
    nobody = {}
    Ensemble([models[3], models[3]])(batch, nobody)
    assert nobody == {} and attention_of(nobody) is None


def test_coverage_counts_the_mean_attention():
    ensemble, batch = Ensemble([make_model(name) for name in NAMES]), make_batch([(4, 1), (2, 1)])
    settings = DecodeConfig(beam=3, max_length=6, coverage_penalty=0.5)
    for row, found in enumerate(search(ensemble, batch, settings, Demands(outputs=3))):
        source = batch.source[row][batch.source_mask[row]][:-1].tolist()
        for one in found:
            taps = {}
            forced(ensemble, Batch.of([source], [[token for token in one.tokens if token != 2]]), taps)
            seen = taps["cross.0"][0, : len(one.tokens)].sum(0)
            assert one.coverage == pytest.approx(float(0.5 * seen.clamp(max=1).log().sum()), abs=1e-6)


def test_an_ensemble_is_a_module_with_all_weights():
    models = [make_model(name) for name in NAMES[:2]]
    ensemble = Ensemble(models).train()
    assert all(model.training for model in models) and not ensemble.eval().models[0].training
    assert len(list(ensemble.parameters())) == sum(len(list(model.parameters())) for model in models)
    assert ensemble.log_probabilities(ensemble(make_batch()), make_batch().source).shape[-1] == TARGET_SIZE
