"""`regard.attend` without any model, its kernel form, its two pages and its example."""

import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regard
from regard.errors import ConfigError
from regard.model.attention import SCORES, Additive, Dot, Gaussian, General, Score, attend

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "attention.md", ROOT / "docs" / "attention.zh.md"]
T, S, D, E = 3, 5, 4, 2
BATCHES = {  # of query, keys and values
    "none": ((), (), ()), "B": ((2,), (2,), (2,)), "B, H": ((2, 3), (2, 3), (2, 3)), "shared keys": ((2,), (), ()),
    "shared query": ((), (2,), (2,)), "shared values": ((2,), (2,), ()), "shared heads": ((2, 3), (2, 1), (2, 1)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


NAMES = [*SCORES, "gaussian", "learned gaussian"]


def a_score(name):
    """In float64, for queries and keys of width D."""
    kernels = {"gaussian": Gaussian(1.5), "learned gaussian": Gaussian(1.5, learn=True)}
    return (kernels[name] if name in kernels else SCORES[name](D, D)).double()


def plainly(score, query, keys, values, allowed):
    """Attention of one query, (D,), as the sum of its definition; zeros where nothing is allowed."""
    raw = [math.exp(score(query[None], key[None]).item()) if may else 0.0
           for key, may in zip(keys, allowed, strict=True)]
    weights = [each / sum(raw) if sum(raw) else 0.0 for each in raw]
    context = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return context, torch.tensor(weights, dtype=torch.float64)


def check_plainly(score, query, keys, values, allowed, context, weights):
    """Every row of context and weights against the definition; `allowed` is a mask of their whole shape, (…, T, S)."""
    batch = allowed.shape[:-2]
    assert context.shape == (*batch, T, E) and weights.shape == (*batch, T, S)
    query, keys, values = (x.expand(*batch, *x.shape[-2:]) for x in (query, keys, values))
    for place in itertools.product(*map(range, (*batch, T))):
        expected, shares = plainly(score, query[place], keys[place[:-1]], values[place[:-1]], allowed[place])
        torch.testing.assert_close(context[place], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(weights[place], shares, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_score_over_every_batch_is_the_definition(name, batch):
    score = a_score(name)
    query, keys, values = (normal(*sizes, *last) for sizes, last in zip(batch, ((T, D), (S, D), (S, E)), strict=True))
    with torch.no_grad():
        context, weights = attend(query, keys, values, score)
        everything = torch.ones(*max(batch, key=len), T, S, dtype=torch.bool)
        check_plainly(score, query, keys, values, everything, context, weights)


def test_one_set_of_weights_serves_many_sets_of_values():
    query, keys, values = normal(T, D), normal(S, D), normal(2, S, E)
    context, weights = attend(query, keys, values)
    assert context.shape == (2, T, E) and weights.shape == (T, S)
    for b in range(2):
        torch.testing.assert_close(context[b], attend(query, keys, values[b])[0])


@pytest.mark.parametrize("name", ["dot", "scaled_dot"])
def test_a_score_without_parameters_goes_by_name(name):
    query, keys, values = normal(2, T, D), normal(2, S, D), normal(2, S, E)
    for by_name, by_module in zip(attend(query, keys, values, name), attend(query, keys, values, SCORES[name](D, D)),
                                  strict=True):
        assert torch.equal(by_name, by_module)
    products = (query.unsqueeze(-2) * keys.unsqueeze(-3)).sum(-1)
    expected = torch.softmax(products if name == "dot" else products / math.sqrt(D), dim=-1)
    torch.testing.assert_close(attend(query, keys, values, name)[1], expected)
    assert torch.equal(regard.attend(query, keys, values)[0], attend(query, keys, values, "scaled_dot")[0])


@pytest.mark.parametrize("name", ["general", "concat", "additive"])
def test_a_score_with_parameters_takes_unlike_widths_and_is_refused_by_name(name):
    query, keys, values = normal(2, T, 3), normal(2, S, 6), normal(2, S, E)
    score = SCORES[name](3, 6).double()
    with torch.no_grad():
        context, weights = attend(query, keys, values, score)
        check_plainly(score, query, keys, values, torch.ones(2, T, S, dtype=torch.bool), context, weights)
    with pytest.raises(ConfigError, match=f'score="{name}".*by name there are "dot" and "scaled_dot"'):
        attend(query, keys, values, name)


A_ROW = torch.tensor([True, False, True, True, False])
ROWS = torch.tensor([[True, False, True, True, False], [False] * 5, [False, False, False, False, True]])
THERE = torch.tensor([[True] * 5, [True, True, False, False, False]])
MASKS = {  # batch, mask, the same at full size
    "(S,)": ((), A_ROW, A_ROW.expand(T, S)),
    "(S,), batch": ((2,), A_ROW, A_ROW.expand(2, T, S)),
    "(T, S)": ((), ROWS, ROWS),
    "(T, 1)": ((), ROWS[:, :1], ROWS[:, :1].expand(T, S)),
    "(B, S)": ((2,), THERE, THERE[:, None].expand(2, T, S)),
    "(1, S)": ((2,), A_ROW[None], A_ROW.expand(2, T, S)),
    "(B, S) where B is T": ((3,), ROWS, ROWS[:, None].expand(3, T, S)),
    "(1, T, S)": ((2,), ROWS[None], ROWS.expand(2, T, S)),
    "(B, T, S)": ((2,), ROWS & THERE[:, None], ROWS & THERE[:, None]),
    "(B, 1, 1, S)": ((2, 3), THERE[:, None, None], THERE[:, None, None].expand(2, 3, T, S)),
    "(T, S), heads": ((2, 3), ROWS, ROWS.expand(2, 3, T, S)),
}


@pytest.mark.parametrize(("batch", "mask", "full"), MASKS.values(), ids=MASKS)
def test_every_form_of_mask_is_the_definition(batch, mask, full):
    query, keys, values = normal(*batch, T, D), normal(*batch, S, D), normal(*batch, S, E)
    context, weights = attend(query, keys, values, "dot", mask)
    check_plainly(Dot(D, D), query, keys, values, full, context, weights)
    assert torch.equal(weights != 0, full)


def test_a_mask_of_two_dimensions_beside_a_batch_of_queries_over_shared_keys():
    query, keys, values = normal(2, T, D), normal(S, D), normal(S, E)
    context, weights = attend(query, keys, values, "dot", THERE)
    check_plainly(Dot(D, D), query, keys, values, THERE[:, None].expand(2, T, S), context, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_of_the_inputs_type_and_a_query_that_may_look_at_nothing_gets_zeros(name, dtype):
    score = a_score(name)
    inputs = [normal(2, T, D), normal(2, S, D), normal(2, S, E)]
    expected, _ = attend(*inputs, score, ROWS[None])
    found = [x.to(dtype).requires_grad_() for x in inputs]
    context, weights = attend(*found, score.to(dtype), ROWS[None])
    assert context.dtype == weights.dtype == dtype
    torch.testing.assert_close(context.double(), expected, rtol=0, atol={8: 1e-12, 4: 1e-5, 2: 0.1}[dtype.itemsize])
    assert context[:, 1].eq(0).all() and weights[:, 1].eq(0).all()
    context.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in found) and found[0].grad[:, 1].eq(0).all()


def test_no_keys_at_all_give_zeros():
    context, weights = attend(normal(2, T, D), normal(2, 0, D), normal(2, 0, E))
    assert context.shape == (2, T, E) and context.eq(0).all() and weights.shape == (2, T, 0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    score = a_score(name)
    inputs = [x.requires_grad_() for x in (normal(T, D), normal(S, D), normal(S, E))]

    def run(query, keys, values, *weights):
        own = {key: each for (key, _), each in zip(score.named_parameters(), weights, strict=True)}
        return attend(query, keys, values, lambda *both: torch.func.functional_call(score, own, both), ROWS)

    assert torch.autograd.gradcheck(run, (*inputs, *score.parameters()))
    torch.autograd.backward([attend(*inputs, score, ROWS[2:].expand(T, S))[0].sum()])
    assert inputs[1].grad[:4].eq(0).all() and inputs[2].grad[:4].eq(0).all() and inputs[2].grad[4].ne(0).all()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("learn", [False, True])
def test_the_gaussian_is_the_estimator_of_nadaraya_and_watson(width, learn):
    xs, ys, asked = normal(20, width), normal(20), normal(7, width)
    kernel = Gaussian(0.7, learn).double()
    h = kernel.bandwidth.item() if learn else 0.7
    assert h == pytest.approx(0.7, rel=1e-6)
    with torch.no_grad():
        context, _ = attend(asked, xs, ys[:, None], kernel)
    for t in range(7):
        above = below = 0.0
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            near = math.exp(-sum(((a - b) / h) ** 2 for a, b in zip(asked[t].tolist(), x, strict=True)) / 2)
            above, below = above + near * y, below + near
        assert context[t].item() == pytest.approx(above / below, rel=1e-10)


def test_the_gaussian_answers_far_from_all_samples_where_the_formula_is_nothing_by_nothing():
    xs = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert math.exp(-((1000 - 1) ** 2) / 2) == 0
    context, _ = attend(torch.tensor([[1000.0]], dtype=torch.float64), xs, 3 * xs, Gaussian(1))
    assert context.item() == 3


def test_a_bandwidth_is_learned_and_stays_above_zero():
    kernel = Gaussian(2.0, learn=True)
    assert [name for name, _ in kernel.named_parameters()] == ["log_bandwidth"] and not list(Gaussian(2.0).parameters())
    optimizer = torch.optim.SGD(kernel.parameters(), lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        kernel.bandwidth.backward()
        optimizer.step()
    assert 0 < kernel.bandwidth.item() < 0.1
    for bandwidth in (0, -1, math.inf, math.nan):
        with pytest.raises(ConfigError, match=rf"Gaussian\(bandwidth={bandwidth}\): a finite number above 0"):
            Gaussian(bandwidth)
    assert "gaussian" not in SCORES and not any(issubclass(score, Gaussian) for score in SCORES.values())


def flat(query, keys):
    """A score of a wrong shape: one number for each item and key, as if there were one query."""
    return torch.zeros(query.shape[0], keys.shape[-2], dtype=query.dtype)


REFUSED = {  # query, keys, values, score, mask, message
    "dot": ((T, 4), (S, 6), (S, E), "dot", None, "a dot score needs query and key of one width, and they are 4 and 6"),
    "scaled dot": ((T, 4), (S, 6), (S, E), "scaled_dot", None, "one width, and they are 4 and 6"),
    "gaussian": ((T, 1), (S, 6), (S, E), Gaussian(1), None, "a Gaussian score needs .* and they are 1 and 6"),
    "module, query": ((T, 4), (S, 6), (S, E), General(5, 6), None,
                      r"this General score was made for query of width 5, and query has shape \(3, 4\): make the score "
                      "for width 4"),
    "module, keys": ((T, 4), (S, 6), (S, E), Additive(4, 5), None, r"for keys of width 5, and keys has shape \(5, 6\)"),
    "values": ((T, 4), (S, 4), (6, E), "dot", None,
               r"attend: query \(3, 4\), keys \(5, 4\), values \(6, 2\): there are 5 keys and 6 values, and one value"),
    "numbers": ((T, 1), (S, 1), (S,), "dot", None,
                r"values \(5,\): .*expected to be \(…, positions, width\): write x\[:, None\]"),
    "one query": ((4,), (S, 4), (S, E), "dot", None, r"query \(4,\), .*x\[None, :\] for one that is a single position"),
    "scalar": ((), (S, 4), (S, E), "dot", None, r"query \(\), .*expected to be"),
    "batches": ((2, T, 4), (3, S, 4), (3, S, E), "dot", None, "before the last two were expected to be equal"),
    "batch of values": ((2, T, 4), (2, S, 4), (3, S, E), "dot", None, "expected to be equal, 1 or left out"),
    "mask of numbers": ((T, 4), (S, 4), (S, E), "dot", torch.ones(T, S),
                        r"mask \(3, 5\): the mask is of torch.float32, and torch.bool was expected, True where a key"),
    "mask too wide": ((T, 4), (S, 4), (S, E), "dot", torch.ones(T, 6, dtype=torch.bool),
                      r"mask \(3, 6\): a mask that broadcasts to \(3, 5\), \(…, T, S\), was expected$"),
    "mask (T, S) in a batch": ((2, T, 4), (2, S, 4), (2, S, E), "dot", torch.ones(T, S, dtype=torch.bool),
                               r"broadcasts to \(2, 3, 5\).* it is \(B, S\): write mask\[None\] for \(T, S\)$"),
    "mask that would widen": ((1, T, 4), (1, S, 4), (1, S, E), "dot", torch.ones(2, T, S, dtype=torch.bool),
                              r"broadcasts to \(1, 3, 5\)"),
    "mask with a batch": ((T, 4), (S, 4), (S, E), "dot", torch.ones(2, T, S, dtype=torch.bool),
                          r"broadcasts to \(3, 5\)"),
    "score of a wrong shape": ((2, T, 4), (2, S, 4), (2, S, E), flat, None,
                               r"the score gave \(2, 5\), and \(…, T, S\) = \(…, 3, 5\) was expected"),
}


@pytest.mark.parametrize(("query", "keys", "values", "score", "mask", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(query, keys, values, score, mask, message):
    with pytest.raises(ConfigError, match=message):
        attend(torch.randn(query), torch.randn(keys), torch.randn(values), score, mask)


def test_a_score_of_ones_own_needs_no_widths():
    class Nearest(Score):
        def compare(self, query, projected):
            return -torch.cdist(query, projected, p=1)

    query, keys, values = normal(2, T, D), normal(2, S, D), normal(2, S, E)
    context, weights = attend(query, keys, values, Nearest())
    check_plainly(Nearest(), query, keys, values, torch.ones(2, T, S, dtype=torch.bool), context, weights)


def test_the_three_stages_are_three_lines():
    assert """
    scores = score(query, keys)
    weights = weigh(scores, mask)
    context = weights @ values
""" in inspect.getsource(attend)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs_and_names_every_score(page):
    text = page.read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    assert names["weights"].shape == (1, 40) and names["score"].weight.weight.shape == (6, 4)
    assert all(f"| `{name}` | `{score.__name__}(D, D" in text for name, score in SCORES.items())


@pytest.mark.parametrize("seed", range(3))
def test_the_score_that_learns_does_so_whatever_the_seed(seed):
    block = next(block for block in re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
                 if "Adam" in block)
    torch.manual_seed(seed)
    names = {"torch": torch, "regard": regard, "General": General}
    exec(block, names)
    assert names["weights"][:, 0, 0].mean() > 0.7


def test_the_pages_hold_the_same_code_and_output():
    english, chinese = ([re.sub(r"[^\x00-\x7f]|#.*", "", block).split() for block in re.findall(
        r"```(?:python|text)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)] for page in PAGES)
    assert english == chinese


def test_the_example_prints_what_the_pages_say_and_draws(tmp_path):
    picture = tmp_path / "pooling.png"
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "attention_pooling.py"), "--out", str(picture)],
                          capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, timeout=300,
                          env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    *table, drawn = done.stdout.splitlines()
    for page in PAGES:
        assert "\n".join(["```text", *table, "```"]) in page.read_text(encoding="utf-8")
    assert drawn == f"drawn in {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000
