"""Shows that each law of test_laws.py fails when what it protects is broken on purpose.

    python tests/broken_laws.py [part of a law's name]

First the chosen tests run as they are and must pass. Then each runs with one fault patched into the package, and must
fail by its own assertion: a crash does not count. Prints law | what was broken | on which model | how it failed, and
exits with 1 if a broken law passes, or if a law of test_laws.py has no fault here.
"""

import contextlib
import io
import os
import re
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from regard.data.batches import Batch
from regard.decode import search
from regard.decode.hypotheses import Paths
from regard.model import attention, conv, layers, positions, rnn, rows, seq2seq, stepwise, sublayers
from regard.model.state import Memory, Past, State
from regard.text.tokenizer import EOS
from regard.training import checkpoint, device, loop, objective

FILE = Path(__file__).with_name("test_laws.py")


def change(patch, owner, name, changed):
    """Put changed(original, *arguments) in the place of a function or method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **named: changed(original, *arguments, **named))


# --- masks, positions and cached state -----------------------------------------------------------------------------


def causal_mask_one_too_far(patch):
    change(patch, torch.Tensor, "tril", lambda tril, x, diagonal=0: tril(x, diagonal + 1))


def padding_is_looked_at(patch):
    patch.setattr(attention, "weigh", lambda scores, mask: torch.softmax(scores, dim=-1))
    for module in (attention, rnn):
        patch.setattr(module, "hiding", lambda mask, dtype: torch.zeros_like(mask, dtype=dtype))
    change(patch, attention.MultiHeadAttention, "fused", lambda original, *each: original(*each[:4], None, each[5]))


def backwards_from_the_padding(patch):
    patch.setattr(rnn, "reverse", lambda x, mask: x.flip(1))


def mean_over_padding_too(patch):
    change(patch, rnn.RNNEncoder, "summarise", lambda original, self, states, mask: states.mean(1))


def first_key_is_forgotten(patch):
    def put(original, self, name, new):
        found = original(self, name, new)
        return found.index_fill(2, torch.tensor([0]), 0.0) if found.shape[2] > new.shape[2] else found

    change(patch, Past, "put", put)


def places_counted_anew_in_each_call(patch):
    change(patch, positions.Sinusoidal, "embed", lambda original, self, x, start=0: original(self, x))


def distances_counted_anew_in_each_call(patch):
    def bias(original, self, x, start=0):
        return original(self, x, start) if not start else original(self, x, start).roll(1, dims=-1)

    change(patch, positions.Relative, "bias", bias)


def not_kept(part):
    """A decoder's state that never changes in some of its tensors, as it would be if they were not handed on."""
    def patch(patch):
        change(patch, State, "advance", lambda original, self, tokens, cache, *past: original(
            self, tokens, {name: tensor for name, tensor in cache.items() if not name.endswith(part)}, *past))

    return patch


def window_counted_anew_in_each_call(patch):
    change(patch, attention.Monotonic, "forward", lambda original, self, query, mask, position, beam: original(
        self, query, mask, 0, beam))


def window_one_too_far(patch):
    change(patch, attention.Monotonic, "forward", lambda original, self, query, mask, position, beam=1: original(
        self, query, mask, position + 1, beam))


def window_without_its_gaussian(patch):
    change(patch, attention.Predictive, "forward", lambda original, *arguments: (original(*arguments)[0], 1.0))


def window_without_ends(patch):
    change(patch, attention.Predictive, "forward", lambda original, self, query, mask, *place: (
        mask[:, None, :], original(self, query, mask, *place)[1]))


def convolution_sees_the_next_token(patch):
    change(patch, conv.GatedConvolution, "forward", lambda original, self, x: original(self, x.roll(-1, 1)))


def convolution_reads_padding(patch):
    def forward(original, self, source, mask, taps=None):
        return replace(original(self, source, torch.ones_like(mask), taps), mask=mask)

    change(patch, conv.ConvEncoder, "forward", forward)


def values_are_not_selected(patch):
    change(patch, Memory, "select", lambda original, self, rows: replace(original(self, rows), values=self.values))


def memory_is_not_selected(patch):
    patch.setattr(State, "select", lambda self, rows: replace(
        self, cache={name: tensor[rows.flatten()] for name, tensor in self.cache.items()}))


def rows_are_selected_backwards(patch):
    change(patch, State, "select", lambda original, self, rows: original(self, rows.flip(0)))


# --- dropout, probabilities, loss ----------------------------------------------------------------------------------


def rows_are_laid_out_beside_their_place(patch):
    def places(original, self, heads, length, parts=1):
        place, piece = original(self, heads, length, parts)
        return place, piece if length == self.size[1] else piece.roll(1)

    change(patch, rows.Packed, "places", places)


def positions_that_were_added_are_looked_at(patch):
    def start(original, self, mask):
        original(self, mask)
        self.mask = torch.ones_like(self.mask)

    change(patch, rows.Packed, "__init__", start)


def attention_written_out_is_not_scaled(patch):
    patch.setattr(sublayers, "scaled", lambda x, heads, weight, bias: (weight, bias))


def nothing_is_hidden_where_sublayers_are_written_out(patch):
    change(patch, sublayers.Stack, "of", lambda original, layout, x, order, mask, *across: original(
        layout, x, order, torch.ones_like(mask), *across))


def dropout_in_eval_mode(patch):
    patch.setattr(layers.Dropout, "drops", property(lambda self: self.threshold > 0))


def no_branch_is_left_out(patch):
    patch.setattr(layers.StochasticDepth, "leaves_out", False)


def branches_left_out_in_eval_mode(patch):
    def forward(original, self, *branch):
        self.training = True
        return original(self, *branch)

    change(patch, layers.StochasticDepth, "forward", forward)


def attention_dropout_is_ignored(patch):
    change(patch, attention.MultiHeadAttention, "__init__",
           lambda original, self, width, heads, dropout, *others: original(self, width, heads, 0.0, *others))


def logits_for_log_probabilities(patch):
    patch.setattr(seq2seq.Seq2Seq, "log_probabilities", lambda self, features, source: self.project(features))


def copying_takes_twice_its_share(patch):
    def mixed(original, features, output, source):
        width = output.shape[1] + 1
        return original(torch.cat([features[..., :width], 2 * features[..., width:]], dim=-1), output, source)

    change(patch, seq2seq, "mixed_log_probabilities", mixed)
    change(patch, objective, "mixed_log_probabilities", mixed)


def nothing_is_copied(patch):
    def mixed(original, features, output, source):
        width = output.shape[1]
        return original(torch.cat([features[..., :width], features[..., width : width + 1] + 100,
                                   features[..., width + 1 :]], dim=-1), output, source)

    change(patch, seq2seq, "mixed_log_probabilities", mixed)
    change(patch, objective, "mixed_log_probabilities", mixed)


def half_of_the_smoothing(patch):
    change(patch, objective, "cross_entropy", lambda original, features, weight, targets, smoothing: original(
        features, weight, targets, smoothing / 2))


def half_of_the_tables_gradient(patch):
    backward = objective._ProjectedCrossEntropy.backward

    def halved(ctx, *grads):
        features, weight, *others = backward(ctx, *grads)
        return features, weight / 2, *others

    patch.setattr(objective._ProjectedCrossEntropy, "backward", staticmethod(halved))


def gate_without_gradient(patch):
    def mixed(original, features, output, source):
        gate = output.shape[1]
        parts = features[..., :gate], features[..., gate : gate + 1].detach(), features[..., gate + 1 :]
        return original(torch.cat(parts, dim=-1), output, source)

    change(patch, objective, "mixed_log_probabilities", mixed)


def keys_of_a_loop_without_gradient(patch):
    change(patch, stepwise.Products, "grads", lambda original, *arguments: [
        torch.zeros_like(grad) for grad in original(*arguments)])


def what_is_fed_without_gradient(patch):
    change(patch, stepwise.Layer, "back", lambda original, *arguments: (
        torch.zeros_like(original(*arguments)[0]), original(*arguments)[1]))


def coverage_without_gradient(patch):
    change(patch, objective, "coverage_loss", lambda original, weights, mask: original(weights.detach(), mask))


def guidance_without_gradient(patch):
    change(patch, objective, "alignment_loss", lambda original, weights, links: original(weights.detach(), links))


# --- search --------------------------------------------------------------------------------------------------------


def search_goes_on_from_the_old_state(patch):
    change(patch, search, "read", lambda original, model, paths, state: (*original(model, paths, state)[:3], state))


def search_does_not_reorder_its_state(patch):
    def select(original, self, rows):
        held = len(self.memory.mask) * self.beam
        return original(self, torch.arange(held).view_as(rows) if rows.numel() == held else rows)

    change(patch, State, "select", select)


def length_penalty_twice(patch):
    change(patch, Paths, "hypotheses", lambda original, self, penalty, *others: original(self, 2 * penalty, *others))


def open_hypotheses_are_lost(patch):
    change(patch, search.Ended, "put", lambda original, self, kids, rows: original(
        self, kids, rows[kids.tokens.flatten()[rows] == EOS]))


# --- where it looks ------------------------------------------------------------------------------------------------


def scores_are_not_normalised(patch):
    patch.setattr(attention, "weigh", lambda scores, mask: scores.exp() if mask is None else scores.exp() * mask)


def asking_changes_the_context(patch):
    def forward(original, self, query, keys, values, mask, bias=None, want_weights=False, *layout):
        context, weights = original(self, query, keys, values, mask, bias, want_weights, *layout)
        return context * (1 + 1e-9 * want_weights), weights

    change(patch, attention.MultiHeadAttention, "forward", forward)


def taps_stay_in_the_order_of_reading(patch):
    def encode(original, self, source, mask, taps=None):
        if taps is not None:
            self.encoder(rnn.reverse(source, mask), mask, taps)
        return original(self, source, mask)

    change(patch, seq2seq.Seq2Seq, "encode", encode)


def states_stay_in_the_order_of_reading(patch):
    def encode(original, self, source, mask, taps=None):
        memory = original(self, source, mask, taps)
        return replace(memory, states=rnn.reverse(memory.states, mask)) if self.reverse_source else memory

    change(patch, seq2seq.Seq2Seq, "encode", encode)


# --- saving, going on, learning ------------------------------------------------------------------------------------


def weights_are_saved_in_half_precision(patch):
    change(patch, checkpoint, "save_file", lambda original, tensors, path: original(
        {name: tensor.half().to(tensor.dtype) for name, tensor in tensors.items()}, path))


def epoch_begins_anew(patch):
    change(patch, loop.Trainer, "standing_of", lambda original, self, state: replace(
        original(self, state), position=0))


def dropout_follows_no_seed(patch):
    change(patch, device, "seed", lambda original, *numbers: torch.seed())


def running_averages_are_forgotten(patch):
    def put(original, optimizer, model, tensors, where):
        original(optimizer, model, {name: tensor if name.startswith("random") else tensor * 0
                                    for name, tensor in tensors.items()}, where)

    change(patch, loop, "put_optimizer", put)


def epoch_begins_anew_after_a_kill(patch):
    law = sys.modules["test_laws"]
    fault = ("from dataclasses import replace; from regard.training.loop import Trainer; whole = Trainer.standing_of; "
             "Trainer.standing_of = lambda self, state: replace(whole(self, state), position=0); ")
    patch.setattr(law, "TRAIN", fault + law.TRAIN)


def decoder_reads_what_it_should_say(patch):
    def of(original, sources, targets=None):
        batch = original(sources, targets)
        return replace(batch, target_in=batch.target_out) if targets else batch

    change(patch, Batch, "of", of)


def row_left_out(patch):
    patch.delitem(sys.modules["test_laws"].MODELS, "transformer-alibi-reversed")


class Fault(NamedTuple):
    """One way to break a law: in words, the test's parameters as pytest writes them, and the patch."""

    words: str
    where: str
    patch: object


LAWS = {
    "test_the_table_holds_each_choice_of_each_setting": [
        Fault("the table's only row with positions = \"alibi\" is left out", "TransformerSideConfig", row_left_out),
    ],
    "test_stepwise_is_parallel": [
        Fault("the cache forgets the first key", "one by one-transformer-post", first_key_is_forgotten),
        Fault("places are counted anew in each call", "1 4 2-transformer-pre", places_counted_anew_in_each_call),
        Fault("distances of cached keys are off by one", "6 1-transformer-relative",
              distances_counted_anew_in_each_call),
        Fault("the cell's state is not kept", "6 1-after-dot", not_kept("hidden")),
        Fault("what the last attention made is not kept", "1 4 2-after-feeding", not_kept("fed")),
        Fault("coverage is not kept", "one by one-before-coverage", not_kept("coverage")),
        Fault("a convolution's last inputs are not kept", "6 1-mixed-rnn-conv", not_kept("past")),
    ],
    "test_padding_and_neighbours_change_nothing": [
        Fault("padding is looked at (one head)", "eval-before-additive", padding_is_looked_at),
        Fault("padding is looked at (many heads)", "eval-transformer-post", padding_is_looked_at),
        Fault("the backward direction begins in the padding", "eval-fixed-lstm", backwards_from_the_padding),
        Fault("the mean is taken over padding too", "train-fixed-elman-mean", mean_over_padding_too),
        Fault("a convolution reads padding", "eval-mixed-conv-transformer", convolution_reads_padding),
    ],
    "test_the_future_changes_nothing": [
        Fault("the causal mask leaks one position", "eval-transformer-pre", causal_mask_one_too_far),
        Fault("no causal mask in training mode", "train-transformer-rotary",
              nothing_is_hidden_where_sublayers_are_written_out),
        Fault("a convolution sees the next token", "eval-conv-kernel-5", convolution_sees_the_next_token),
    ],
    "test_selected_rows_are_as_if_computed_anew": [
        Fault("select leaves the memory as it was", "after-general", memory_is_not_selected),
        Fault("select returns the rows backwards", "transformer-pre", rows_are_selected_backwards),
        Fault("select leaves the memory's values as they were", "mixed-conv-after", values_are_not_selected),
    ],
    "test_training_says_what_the_trained_model_says": [
        Fault("packed rows are laid out beside their place", "transformer-post", rows_are_laid_out_beside_their_place),
        Fault("positions that were added are looked at", "transformer-alibi-reversed",
              positions_that_were_added_are_looked_at),
        Fault("attention written out is not scaled", "transformer-none", attention_written_out_is_not_scaled),
        Fault("padding is looked at (sublayers written out)", "mixed-transformer-conv",
              nothing_is_hidden_where_sublayers_are_written_out),
    ],
    "test_dropout_ends_with_training": [
        Fault("dropout goes on in eval mode", "conv", dropout_in_eval_mode),
        Fault("attention_dropout is read and ignored", "transformer-pre", attention_dropout_is_ignored),
        Fault("stochastic_depth is read and ignored", "transformer-post", no_branch_is_left_out),
        Fault("branches are left out in eval mode", "conv-kernel-5", branches_left_out_in_eval_mode),
    ],
    "test_log_probabilities_sum_to_1_and_the_loss_is_made_of_them": [
        Fault("logits are given for log-probabilities", "before-dot", logits_for_log_probabilities),
        Fault("copying takes twice its share", "after-copy", copying_takes_twice_its_share),
        Fault("the loss smooths half as much", "transformer-learned", half_of_the_smoothing),
    ],
    "test_beam_of_one_is_greedy": [
        Fault("search goes on from the state before the step", "after-dot", search_goes_on_from_the_old_state),
    ],
    "test_beam_score_is_forced_score_and_output_does_not_depend_on_neighbours": [
        Fault("search does not reorder its state", "before-concat", search_does_not_reorder_its_state),
        Fault("the length penalty is applied twice", "fixed-gru-every-step", length_penalty_twice),
        Fault("neighbours' padding is looked at", "transformer-pre", padding_is_looked_at),
    ],
    "test_beam_is_brute_force": [
        Fault("open hypotheses are lost at the greatest length", "0.0-fixed-lstm", open_hypotheses_are_lost),
        Fault("the length penalty is applied twice", "1.0-transformer-pre", length_penalty_twice),
        Fault("search does not reorder its state", "0.0-after-general", search_does_not_reorder_its_state),
    ],
    "test_attention_is_a_distribution_over_what_may_be_looked_at_and_asking_changes_nothing": [
        Fault("weights are not normalised", "after-general", scores_are_not_normalised),
        Fault("padding is looked at", "before-additive", padding_is_looked_at),
        Fault("asking for weights changes the context", "transformer-pre", asking_changes_the_context),
        Fault("the window of local_m stands one place too far", "before-local-m", window_one_too_far),
        Fault("the window of local_p has no ends", "after-local-p", window_without_ends),
        Fault("the window of local_p has no Gaussian", "before-local-p", window_without_its_gaussian),
    ],
    "test_forced_attention_is_that_of_the_search_step_by_step": [
        Fault("the cache forgets the first key", "transformer-post", first_key_is_forgotten),
        Fault("the window of local_m begins anew in each call", "after-local-m", window_counted_anew_in_each_call),
    ],
    "test_reading_backwards_is_reading_a_reversed_source_and_attention_keeps_the_sources_order": [
        Fault("attention is not put back into the source's order", "transformer-reversed",
              taps_stay_in_the_order_of_reading),
        Fault("states are not put back into the source's order", "before-concat",
              states_stay_in_the_order_of_reading),
    ],
    "test_saved_and_loaded_is_the_same_to_the_bit": [
        Fault("weights are rounded to half precision on the way", "transformer-pre",
              weights_are_saved_in_half_precision),
    ],
    "test_gradients_are_those_of_differences": [
        Fault("the output table's gradient is halved", "after-dot", half_of_the_tables_gradient),
        Fault("the copy gate has no gradient", "before-copy", gate_without_gradient),
        Fault("the coverage loss has no gradient", "before-coverage", coverage_without_gradient),
        Fault("what a loop says of the keys is lost", "before-dot", keys_of_a_loop_without_gradient),
        Fault("what enters a loop beside the token has no gradient", "after-feeding", what_is_fed_without_gradient),
        Fault("guided alignment has no gradient", "transformer-pre", guidance_without_gradient),
    ],
    "test_resumed_is_uninterrupted": [
        Fault("the epoch begins anew", "transformer-pre", epoch_begins_anew),
        Fault("what is dropped is no function of seed and step", "fixed-gru-every-step", dropout_follows_no_seed),
    ],
    "test_more_steps_later_are_as_if_asked_for_at_once": [
        Fault("AdamW's running averages are forgotten", "before-additive", running_averages_are_forgotten),
    ],
    "test_killed_and_started_again_is_uninterrupted": [
        Fault("the epoch begins anew", "", epoch_begins_anew_after_a_kill),
    ],
    "test_it_learns_to_reverse_a_sequence": [
        Fault("the decoder reads the token that it should say", "conv", decoder_reads_what_it_should_say),
    ],
    "test_it_learns_to_copy_tokens_that_no_example_had": [
        Fault("the gate lets nothing be copied", "before-copy", nothing_is_copied),
    ],
}


class Watch:
    """A pytest plugin that runs each test with a fault, and keeps what it raised (None: it passed)."""

    def __init__(self, fault=None):
        self.fault, self.raised = fault, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.raised[item.name] = None
        with pytest.MonkeyPatch.context() as patch:
            if self.fault:
                self.fault.patch(patch)
            try:
                return (yield)
            except BaseException as error:
                self.raised[item.name] = error
                raise


def run(names, fault=None):
    """Run tests of test_laws.py: what each raised by name, and what pytest printed."""
    watch, talk = Watch(fault), io.StringIO()
    with contextlib.redirect_stdout(talk):
        pytest.main([*(f"{FILE}::{name}" for name in names), "-q", "-p", "no:cacheprovider"], plugins=[watch])
    return watch.raised, talk.getvalue()


def name_of(law, fault):
    return f"{law}[{fault.where}]" if fault.where else law


def how_it_failed(error):
    """How a law failed, in a line; None where it did not fail by its own assertion."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if any(Path(frame.filename).is_relative_to(FILE.parents[1] / folder) for folder in ("src", "tests"))]
    if not isinstance(error, AssertionError | GradcheckError) or Path(frames[-1].filename) != FILE:
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    greatest = [line.partition(" at ")[0] for line in lines if line.startswith("Greatest absolute difference")]
    line = next(frame.lineno for frame in frames if Path(frame.filename) == FILE)
    told = f"line {line}: " + " ".join([*lines[:1], *greatest])
    return re.sub(r"(\.\d{4})\d+", r"\1", re.sub(r", dtype=[\w.]+|, grad_fn=<\w+>", "", told)).rstrip(",")


def failing(names):
    """Those of some tests that fail, or are not there, with nothing broken, and what pytest printed."""
    raised, talk = run(names)
    return [name for name in names if raised.get(name, "missing") is not None], talk


def broken(law, number):
    """Run one law with one of its faults: whether it found it, and a row of the table."""
    fault = LAWS[law][number]
    raised, talk = run([name_of(law, fault)], fault)
    error = raised.get(name_of(law, fault))
    told = how_it_failed(error) if error else None
    answer = told or (f"CRASHED INSTEAD: {error!r}" if error else "PASSED" if raised else f"DID NOT RUN: {talk[-500:]}")
    answer = answer.replace("|", "\\|").replace("\n", " ")
    return told is not None, (f"| {law.removeprefix('test_').replace('_', ' ')} | {fault.words} "
                              f"| {fault.where or '(one)'} | {answer[:160]} |")


def main(part=""):
    import test_laws  # here alone: in the other processes pytest imports it, and rewrites what it asserts

    start = time.perf_counter()
    chosen = [(law, number) for law, faults in LAWS.items() if part in law for number in range(len(faults))]
    if not chosen:
        sys.exit(f"No law's name holds {part!r}. They are: {', '.join(LAWS)}")
    if (laws := {name for name in vars(test_laws) if name.startswith("test_")}) != LAWS.keys():
        sys.exit(f"Laws and faults differ in {', '.join(sorted(laws ^ LAWS.keys()))}")
    names, jobs = list(dict.fromkeys(name_of(law, LAWS[law][number]) for law, number in chosen)), os.cpu_count() or 1
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for failed, talk in pool.map(failing, [names[job::jobs] for job in range(min(jobs, len(names)))]):
            if failed:
                sys.exit(f"{talk}\nThese fail, or are not there, with nothing broken: {', '.join(failed)}")
        print(f"{len(names)} tests pass as they are.\n\n| law | what was broken | on which model | how it failed |\n"
              "|---|---|---|---|", flush=True)
        held = []
        for found, row in pool.map(broken, *zip(*chosen, strict=True)):
            print(row, flush=True)
            held.append(found)
    print(f"\n{sum(held)} of {len(held)} faults were found by their law, in {time.perf_counter() - start:.0f} s.")
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
