"""Validation scores against the plain way: one sentence at a time."""

import pytest
import torch

from conftest import make_config, model_config
from regard.data.batches import Batch
from regard.decode.search import Limits, forced, greedy
from regard.errors import DataError
from regard.metrics import bleu, token_error_rate
from regard.model.seq2seq import build_model
from regard.text.corpus import read_pairs
from regard.text.tokenizer import Tokenizers
from regard.training import validation as module
from regard.training.validation import Validation

CPU = torch.device("cpu")


def prepared(corpus, **train):
    config = make_config(corpus, decode={"max_length": 6}, **train)
    tokenizers = Tokenizers.train(config.tokenizer, read_pairs(config.data.train[0], config.data.root))
    torch.manual_seed(1)
    model = build_model(model_config("after-general"), *(side.size for side in tokenizers))
    with torch.no_grad():
        for weights in model.parameters():
            weights += torch.randn_like(weights)
    return config, tokenizers, model


@pytest.mark.parametrize("batch_tokens", [1, 4096])
@pytest.mark.parametrize("metric, score", [("loss", None), ("bleu", bleu), ("token_error_rate", token_error_rate)])
def test_scores(corpus, metric, score, batch_tokens, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    config, tokenizers, model = prepared(corpus, metric=metric)
    validation = Validation(config, tokenizers, CPU)
    random = torch.get_rng_state()
    scores = validation.scores(model.train())
    assert torch.equal(torch.get_rng_state(), random), "a validation must not move the training's random numbers"

    surprise, tokens, outputs = 0.0, 0, []
    for source, target in zip(validation.sources, validation.targets, strict=True):
        batch = Batch.of([source], [target])
        surprise -= float(forced(model.eval(), batch).sum())
        tokens += batch.tokens
        outputs += tokenizers.target.decode([greedy(model, batch, Limits(6))[0].tokens])
    assert len(set(outputs)) > 1, "outputs that are all alike would prove nothing"
    expected = {"loss": pytest.approx(surprise / tokens, abs=1e-5)}
    if metric == "bleu":
        expected[metric] = pytest.approx(score(outputs, validation.pairs.targets, "none").value)
    elif metric == "token_error_rate":
        expected[metric] = pytest.approx(score(outputs, validation.pairs.targets).value)
    assert scores == expected


def test_token_error_rate_parts_words_as_bleu_does(corpus, monkeypatch):
    config, tokenizers, model = prepared(corpus, metric="token_error_rate")
    config = config.model_copy(update={"data": config.data.model_copy(update={"bleu_tokenize": "char"})})
    asked = []
    monkeypatch.setattr(module, "token_error_rate", lambda outputs, references, tokenize: (
        asked.append(tokenize), token_error_rate(outputs, references, tokenize))[1])
    Validation(config, tokenizers, CPU).scores(model)
    assert asked == ["char"]


def test_a_validation_file_without_a_pair(corpus):
    config, tokenizers, _ = prepared(corpus)
    for side in ("source", "target"):
        (corpus / f"valid.{side}").write_text("\n")
    with pytest.raises(DataError, match=r"data.valid: valid.source \+ valid.target: 0 pairs; .*: no pair to validate"):
        Validation(config, tokenizers, CPU)
