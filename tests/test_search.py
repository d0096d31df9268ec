"""What search promises beside the laws: limits, order, what is never said, on a model whose every step is known; and
that a beam as wide as there are outputs finds all that the rules allow, scored as published."""

import copy
import math
from functools import cache

import pytest
import torch

from conftest import FAMILIES, make_batch, make_model
from regard.config import DecodeConfig
from regard.data.batches import Batch
from regard.decode.ensemble import Ensemble
from regard.decode.search import LINGER, NEVER, Demands, Limits, beam_search, forced, greedy, ranked
from regard.decode.search import search as search_all
from regard.errors import ConfigError
from regard.model.state import Memory, State
from regard.text.tokenizer import EOS
from regard.training.objective import loss_of
from tiny_search import LETTERS, Hashed, brute_force, every_output, holds, likeliest, repeats, run

SIZE = 7
A, B, C = 4, 5, 6


class Known:
    """A model whose next token depends on the one before: `table` gives probabilities; the source's first id shifts."""

    def __init__(self, table):
        self.log_p = torch.full((SIZE, SIZE), -30.0)
        for before, after in table.items():
            for token, probability in after.items():
                self.log_p[before, token] = math.log(probability)

    def start(self, batch):
        mask = batch.source_mask
        states = mask[:, :, None].float()
        return State(Memory(states, mask, mask.float(), batch.source, states), 0, {"read": torch.zeros(len(mask), 0)})

    def decoder(self, tokens, state):
        read = torch.cat([state.cache["read"], tokens], dim=1)
        return self.log_p[tokens], state.advance(tokens.shape[1], {"read": read})

    def log_probabilities(self, features, source):
        return features.log_softmax(-1)

    def __call__(self, batch, taps=None):
        return self.log_p[batch.target_in]


START = 1
GARDEN = Known({  # greedy takes A; the best whole output begins with B
    START: {A: 0.6, B: 0.4}, A: {A: 0.5, C: 0.3, EOS: 0.2}, B: {EOS: 0.9, C: 0.1}, C: {EOS: 1.0},
})
ENDLESS = Known({START: {A: 0.9, B: 0.1}, A: {A: 0.9, B: 0.1}, B: {A: 0.9, B: 0.1}})


def search(model, beam=3, length_penalty=0.0, limits=None, sources=([4],)):
    return beam_search(model, Batch.of(list(sources)), beam, length_penalty, limits)


def test_beam_finds_what_greedy_misses():
    assert greedy(GARDEN, Batch.of([[4]]), Limits(3))[0].tokens == [A, A, A]
    best, second, _ = search(GARDEN)[0]
    assert best.tokens == [B, EOS] and best.log_probability == pytest.approx(math.log(0.36), abs=1e-5)
    assert second.tokens == [A, C, EOS] and second.log_probability == pytest.approx(math.log(0.18), abs=1e-5)


@pytest.mark.parametrize("length_penalty, tokens", [(0.0, [A, EOS]), (3.0, [A, B, EOS])])
def test_the_length_penalty_ranks(length_penalty, tokens):
    model = Known({START: {A: 1.0}, A: {EOS: 0.6, B: 0.4}, B: {EOS: 1.0}})
    best = search(model, 4, length_penalty)[0][0]
    assert best.tokens == tokens
    assert best.score == best.log_probability / len(tokens) ** length_penalty
    assert ranked(-6.0, 0, 1.0) == -6.0 and ranked(-6.0, 2, 1.0) == -3.0 and ranked(-6.0, 2, 0.0) == -6.0


@pytest.mark.parametrize("source, most, longest", [([], 256, 12), ([4] * 5, 256, 22), ([4] * 5, 7, 7), ([4], 1, 1)])
def test_limits_count_the_end_symbol_of_source_and_output(source, most, longest):
    limits, batch = Limits(most), Batch.of([source, [4] * 40])
    assert limits.of(batch.source_mask)[1].tolist() == [longest, min(most, 92)]
    for found in (greedy(ENDLESS, batch, limits)[0], *search(ENDLESS, 2, limits=limits, sources=[source, [4] * 40])[0]):
        assert len(found.tokens) == longest and EOS not in found.tokens


def test_sentences_of_all_lengths_end_each_in_its_time():
    sources = [[4] * length for length in (3, 0, 9, 1)]
    for found, source in zip(search(ENDLESS, sources=sources), sources, strict=True):
        assert {len(one.tokens) for one in found} == {2 * (len(source) + 1) + 10}
        assert [found] == search(ENDLESS, sources=[source])
    for one, source in zip(greedy(ENDLESS, Batch.of(sources)), sources, strict=True):
        assert one.tokens == [A] * (2 * (len(source) + 1) + 10)


def test_the_first_step_reads_each_sentence_once_and_those_that_are_done_soon_leave():
    model, rows = copy.copy(ENDLESS), []
    model.decoder = lambda tokens, state: rows.append(len(tokens)) or ENDLESS.decoder(tokens, state)
    sources = [[4] * (row % 20) for row in range(60)]
    search(model, 4, sources=sources)
    assert rows[0] == 60
    for length, read in enumerate(rows[1:], start=2):
        going = sum(2 * (len(source) + 1) + 10 >= length for source in sources)
        assert read % 4 == 0 and going <= read // 4 and LINGER * (read // 4 - going) < read // 4


@torch.enable_grad()
def test_a_model_learns_on_after_a_search_past_the_end_of_its_table():
    model, batch = make_model("transformer-rotary"), make_batch()
    for side in (model.encoder, model.decoder):
        side.positions.table = side.positions.table[:2].clone()
    beam_search(model, batch, 2, limits=Limits(12))
    assert len(model.decoder.positions.table) >= 12
    loss_of(model, batch)[0].backward()


def test_padding_and_start_are_never_said():
    flat = Known({before: dict.fromkeys(range(SIZE), 1 / SIZE) for before in range(SIZE)})
    outputs = [one.tokens for one in search(flat, 30, limits=Limits(3))[0]]
    assert len(outputs) == 30 and not {token for tokens in outputs for token in tokens} & set(NEVER)
    assert all(one.log_probability == pytest.approx(len(one.tokens) * math.log(1 / SIZE)) for one in search(flat)[0])


def test_a_beam_wider_than_the_vocabulary_gives_what_there_is():
    found = search(Known({START: {A: 1.0}, A: {EOS: 1.0}}), 50, limits=Limits(1))[0]
    assert [one.tokens for one in found][:2] == [[A], [EOS]] or found[0].tokens == [A]
    assert sorted(one.tokens[0] for one in found) == [token for token in range(SIZE) if token not in NEVER]


def test_forced_is_zero_at_padding():
    found = forced(GARDEN, Batch.of([[4], [4]], [[B], [A, C]]))
    expected = [[math.log(0.4), math.log(0.9), 0.0], [math.log(0.6), math.log(0.3), 0.0]]
    for row, values in zip(found.tolist(), expected, strict=True):
        assert row == pytest.approx(values, abs=1e-5)


# --- all strategies that have an exact answer, against every output there is ----------------------------------------

SOURCES = [[4, 5, 5], [5], []]
EXACT = {
    "plain": ({}, {}),
    "power": ({"length_penalty": 0.7}, {}),
    "gnmt": ({"length_penalty": 0.6, "length_penalty_kind": "gnmt"}, {}),
    "coverage": ({"length_penalty": 1.0, "coverage_penalty": 0.3}, {}),
    "gnmt with coverage": ({"length_penalty": 0.2, "length_penalty_kind": "gnmt", "coverage_penalty": 0.2}, {}),
    "shortest": ({"min_length": 3}, {}),
    "shortest by ratio": ({"min_ratio": 1.0, "max_ratio": 1.0, "max_extra": 0, "max_length": 4}, {}),
    "a token banned": ({}, {"ban": [[4]]}),
    "phrases banned": ({}, {"ban": [[4, 5], [5, 5, 5]]}),
    "no token twice": ({"no_repeat_ngram": 1}, {}),
    "no pair twice": ({"no_repeat_ngram": 2}, {}),
    "prefixes": ({}, {"prefixes": [[5], [4, 4], []]}),
    "a prefix of what is banned": ({}, {"prefixes": [[4], [4, 5], [5]], "ban": [[4]]}),
    "phrases forced": ({}, {"force": [[[4, 5]], [[5], [4]], []]}),
    "overlapping phrases forced": ({}, {"force": [[[4, 5], [5, 5]], [[5, 4, 5]], [[4, 4]]]}),
    "all at once": ({"length_penalty": 0.5, "min_length": 2, "no_repeat_ngram": 3, "coverage_penalty": 0.1},
                    {"prefixes": [[5], [], [4]], "force": [[[4]], [[5, 5]], []], "ban": [[3]]}),
}


def allowed(output, settings, demands, row, limits):
    """Whether the rules allow an output, written without a look at how search does it."""
    tokens = [id for id in output if id != EOS]
    prefix, force = (list(demands.get(name, [[]] * 3)[row]) for name in ("prefixes", "force"))
    shortest, longest = limits
    if tokens[: len(prefix)] != prefix or not shortest <= len(output) <= longest:
        return False
    for phrase in demands.get("ban", []):
        if any(tokens[end - len(phrase) : end] == phrase for end in range(len(prefix) + 1, len(tokens) + 1)
               if end >= len(phrase)):
            return False
    n = settings.get("no_repeat_ngram", 0)
    if n and any(repeats(tokens[:end], n) for end in range(len(prefix) + 1, len(tokens) + 1)):
        return False
    return all(holds(tokens, phrase) for phrase in force)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", range(13))
def test_a_wide_beam_is_brute_force(name, seed):
    settings, demands = EXACT[name]
    settings = {"max_length": 4, "length_penalty": 0.0} | settings
    model = Hashed(seed)
    found = run(model, SOURCES, Demands(outputs=200, **demands), beam=200, **settings)
    for row, (source, hypotheses) in enumerate(zip(SOURCES, found, strict=True)):
        longest = 4 if "max_ratio" not in settings else min(4, len(source) + 1)
        shortest = min(longest, max(settings.get("min_length", 0), math.ceil(settings.get("min_ratio", 0) *
                                                                             (len(source) + 1))))
        outputs = [output for output in every_output(LETTERS, longest)
                   if allowed(output, settings, demands, row, (shortest, longest))]
        expected = brute_force(model, source, outputs, DecodeConfig(**settings))
        assert {tuple(one.tokens): (one.log_probability, one.score) for one in hypotheses} == {
            output: pytest.approx(both, abs=1e-5) for output, both in expected.items()}
        assert len(hypotheses) == len(expected) > 0
        assert [one.score for one in hypotheses] == sorted((one.score for one in hypotheses), reverse=True)
        for one in hypotheses:
            assert one.score == pytest.approx(one.log_probability / one.length_norm + one.coverage, abs=1e-12)
            assert one.coverage <= 0
    assert (found[0][-1].coverage < 0) == bool(settings.get("coverage_penalty"))


def test_the_oracle_leaves_something_out_in_each_row_of_the_table():
    everything = list(every_output(LETTERS, 4))
    for name, (settings, demands) in EXACT.items():
        kept = [output for output in everything
                if allowed(output, settings, demands, 0, (settings.get("min_length", 0), 4))]
        ruled = {"min_length", "no_repeat_ngram"} & settings.keys() or demands
        assert (len(kept) < len(everything)) == bool(ruled), name


# --- the early end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"length_penalty": 0.0}, {"length_penalty": 0.3}, {"length_penalty": 1.0},
    {"length_penalty": 0.6, "length_penalty_kind": "gnmt"}, {"length_penalty": 0.2, "coverage_penalty": 0.2}])
def test_the_early_end_changes_none_of_the_best(settings):
    saved = 0
    for seed in range(40):
        for outputs in (1, 2):
            steps, found = [], []
            for early in (True, False):
                model = Hashed(seed)
                found.append(run(model, SOURCES, Demands(outputs=outputs, early_end=early), beam=3, max_length=12,
                                 **settings))
                steps.append(model.steps)
            early, whole = found
            assert [one[:outputs] for one in early] == [one[:outputs] for one in whole]
            assert steps[0] <= steps[1]
            saved += steps[1] - steps[0]
    assert saved > 0 or settings["length_penalty"] == 1.0


# --- what a hypothesis carries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"beam": 1}, {"beam": 4}, {"beam": 4, "groups": 2}, {"sample": True}])
def test_token_scores_are_those_of_a_forced_pass(settings):
    model = Hashed(3)
    settings = {"max_length": 5, "length_penalty": 1.0} | settings
    plain = run(model, SOURCES, Demands(outputs=3), **settings)
    noted = run(model, SOURCES, Demands(outputs=3, token_scores=True), **settings)
    for source, before, after in zip(SOURCES, plain, noted, strict=True):
        assert [one[:5] for one in before] == [one[:5] for one in after]
        assert all(one.log_probabilities is one.entropies is None for one in before)
        for one in after:
            assert sum(one.log_probabilities) == pytest.approx(one.log_probability, abs=1e-5)
            for place, token in enumerate(one.tokens):
                batch = Batch.of([source], [one.tokens[:place]])
                log_p = model.log_probabilities(model(batch), None)[0, -1].tolist()
                assert one.log_probabilities[place] == pytest.approx(log_p[token], abs=1e-5)
                assert one.entropies[place] == pytest.approx(-sum(math.exp(p) * p for p in log_p), abs=1e-5)


def test_entropy_where_a_token_has_no_probability():
    certain = Known({START: {A: 1.0}, A: {EOS: 1.0}})
    certain.log_probabilities = lambda features, source: features.masked_fill(features < -20, -torch.inf)
    found = run(certain, [[4]], Demands(token_scores=True), beam=2)[0][0]
    assert found.tokens == [A, EOS] and found.entropies == [0.0, 0.0]


def path(tree, node):
    tokens = []
    while node >= 0:
        tokens.insert(0, tree[node].token)
        node = tree[node].parent
    return tokens


@pytest.mark.parametrize("settings", [{"beam": 3}, {"beam": 1}, {"beam": 4, "groups": 2}])
def test_the_tree_holds_all_that_was_looked_at(settings):
    model, trees = Hashed(5), []
    settings = {"max_length": 5} | settings
    found = run(model, SOURCES, Demands(outputs=4), trees, **settings)
    assert found == run(model, SOURCES, Demands(outputs=4), **settings) and len(trees) == 3
    width = settings["beam"] // settings.get("groups", 1)
    for source, tree, hypotheses in zip(SOURCES, trees, found, strict=True):
        ended = {tuple(path(tree, place)): node for place, node in enumerate(tree) if node.fate == "ended"}
        assert {tuple(one.tokens) for one in hypotheses} <= ended.keys()
        assert all(ended[tuple(one.tokens)].log_probability == one.log_probability for one in hypotheses)
        for place, node in enumerate(tree):
            tokens = path(tree, place)
            assert node.parent < place and len(tokens) == node.step
            assert node.parent == -1 or tree[node.parent].fate == "open"
            total = sum(likeliest(model, source, tokens[:end])[token] for end, token in enumerate(tokens))
            assert node.log_probability == pytest.approx(total, abs=1e-5)
        for step in range(1, 6):
            level = [node for node in tree if node.step == step]
            kept = [node.log_probability for node in level if node.fate == "open"]
            pruned = [node.log_probability for node in level if node.fate == "pruned" and node.token != EOS]
            assert len(kept) <= settings["beam"] and len(level) <= 2 * settings["beam"]
            assert "groups" in settings or not kept or not pruned or min(kept) >= max(pruned)
        assert width == 1 or any(node.fate == "pruned" for node in tree)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"beam": 1}, {"beam": 3}, {"sample": True}])
def test_rules_that_leave_no_output(settings):
    demands = Demands(outputs=2, ban=[[3], [4], [5]])
    assert run(Hashed(), SOURCES, demands, max_length=4, min_length=4, **settings) == [[], [], []]
    assert [[one.tokens for one in found] for found in run(Hashed(), [[4]], demands, max_length=4, **settings)] in (
        [[[EOS]]], [[[EOS]] * 2])


def test_phrases_that_cannot_be_met_leave_no_output():
    for beam in (1, 4):
        found = run(Hashed(), SOURCES, Demands(force=[[[4] * 5], [[4]], []]), beam=beam, max_length=4)
        assert found[0] == [] and found[1] and found[2]


def test_a_coverage_penalty_needs_attention():
    with pytest.raises(ConfigError, match="coverage_penalty: this model has no attention to the source"):
        run(Hashed(attends=False), SOURCES, coverage_penalty=0.1)


# --- neighbours ------------------------------------------------------------------------------------------------------

STRATEGIES = {
    "greedy": ({"beam": 1}, {}),
    "beam": ({"beam": 4}, {"outputs": 4}),
    "early end": ({"beam": 4, "length_penalty": 0.0, "min_length": 3}, {"outputs": 1}),
    "diverse": ({"beam": 4, "groups": 2}, {"outputs": 4}),
    "sampling": ({"sample": True}, {"outputs": 2}),
    "narrow sampling": ({"sample": True, "top_k": 5, "top_p": 0.8, "temperature": 1.5}, {"outputs": 2}),
    "rules": ({"beam": 3, "min_ratio": 0.5, "no_repeat_ngram": 2}, {"outputs": 3, "ban": [[4], [5, 6]]}),
    "forced": ({"beam": 4}, {"outputs": 4, "force": [[6, 7], [5]], "prefixes": [8]}),
    "coverage": ({"beam": 3, "coverage_penalty": 0.2}, {"outputs": 3}),
}


def sixty_four():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 9, (length,), generator=draw).tolist()
            for length in torch.randint(0, 9, (64,), generator=draw).tolist()]


@cache
def lively(family):
    """An untrained model whose outputs differ from sentence to sentence."""
    batch = Batch.of(sixty_four())
    seed, outputs = 0, set()
    while len(outputs) < 10:
        seed += 1
        model = make_model(family, seed)
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.3 * torch.randn_like(weights)
        outputs = {tuple(one.tokens) for one in greedy(model, batch, Limits(8))}
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "ensemble"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_of_1_7_and_64_give_the_same(family, strategy):
    settings, demands = STRATEGIES[strategy]
    if strategy == "coverage" and family.startswith("fixed"):
        pytest.skip("a fixed vector covers nothing")
    model = Ensemble([lively(name) for name in FAMILIES[3:]]) if family == "ensemble" else lively(family)
    sources, every = sixty_four(), []
    for size in (64, 7, 1):
        found = []
        for start in range(0, 64 if size == 64 else 16, size):
            part = sources[start : start + size]
            own = dict(demands, lines=range(start, start + len(part)))
            for name in ("force", "prefixes"):
                if name in own:  # every third sentence is asked for nothing
                    own[name] = [own[name] if row % 3 else [] for row in range(start, start + len(part))]
            found += search_all(model, Batch.of(part), DecodeConfig(max_length=8, **settings), Demands(**own))
        every.append(found)
    for others in every[1:]:
        for one, other in zip(every[0], others, strict=False):
            assert [each.tokens for each in one] == [each.tokens for each in other]
            assert [each.score for each in one] == pytest.approx([each.score for each in other], abs=1e-5)
    assert len({tuple(found[0].tokens) for found in every[0]}) > 4
