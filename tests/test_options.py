"""What one call may ask, and each thing that cannot be, with its message; many at once are all told."""

import pytest

from conftest import make_config, model_config
from regard.config import DecodeConfig
from regard.decode.options import Asked, Options, attends
from regard.errors import ConfigError

ATTENDING, FIXED = model_config("transformer-pre"), model_config("fixed-gru-every-step")
CONV = model_config("conv", max_positions=60)


def options(given, model=ATTENDING, **settings):
    return Options.of(DecodeConfig(**settings), given, [model])


def refusals(given, model=ATTENDING, **settings):
    with pytest.raises(ConfigError) as error:
        options(given, model, **settings)
    return str(error.value).splitlines()


def test_every_option_of_a_call_is_checked_and_every_setting_can_be_asked_for():
    assert set(Asked.__annotations__) == Options.model_fields.keys() | {"prefix", "force"}
    assert DecodeConfig.model_fields.keys() < Options.model_fields.keys()


def test_what_a_call_leaves_out_the_config_says():
    found = options({"beam": 4, "ban": ("a",)}, length_penalty=0.3, groups=1, max_length=99)
    assert (found.beam, found.length_penalty, found.max_length, found.ban, found.nbest) == (4, 0.3, 99, ("a",), 1)
    assert options({"sample": False}, sample=True, beam=3).sample is False


@pytest.mark.parametrize("given, outputs", [({}, 1), ({"nbest": 3}, 5), ({"sample": True, "nbest": 3}, 3)])
def test_a_beam_must_find_spare_outputs_since_equal_texts_are_left_out(given, outputs):
    assert options(given).outputs == outputs


REFUSED = {
    "beam": ({"beam": 0}, "beam = 0: expected 1 or more"),
    "nbest": ({"nbest": 0}, "nbest = 0: expected 1 or more"),
    "top_k": ({"sample": True, "top_k": 0}, "top_k = 0: expected 1 or more"),
    "top_p of 0": ({"sample": True, "top_p": 0.0}, "top_p = 0.0: expected more than 0"),
    "top_p over 1": ({"sample": True, "top_p": 1.5}, "top_p = 1.5: expected at most 1"),
    "temperature": ({"sample": True, "temperature": 0.0}, "temperature = 0.0: expected more than 0"),
    "seed": ({"sample": True, "seed": -1}, "seed = -1: expected 0 or more"),
    "length_penalty": ({"length_penalty": -0.1}, "length_penalty = -0.1: expected 0 or more"),
    "coverage_penalty": ({"coverage_penalty": -1.0}, "coverage_penalty = -1.0: expected 0 or more"),
    "length_penalty_kind": ({"length_penalty_kind": "wu"}, "length_penalty_kind = wu: expected 'power' or 'gnmt'"),
    "groups": ({"groups": 0}, "groups = 0: expected 1 or more"),
    "diversity": ({"groups": 5, "diversity": -0.5}, "diversity = -0.5: expected 0 or more"),
    "min_length": ({"min_length": -1}, "min_length = -1: expected 0 or more"),
    "max_length": ({"max_length": 0}, "max_length = 0: expected 1 or more"),
    "min_ratio": ({"min_ratio": -1.0}, "min_ratio = -1.0: expected 0 or more"),
    "max_ratio": ({"max_ratio": -1.0}, "max_ratio = -1.0: expected 0 or more"),
    "max_extra": ({"max_extra": -1}, "max_extra = -1: expected 0 or more"),
    "no_repeat_ngram": ({"no_repeat_ngram": -2}, "no_repeat_ngram = -2: expected 0 or more"),
    "batch_sentences": ({"batch_sentences": 0}, "batch_sentences = 0: expected 1 or more"),
    "batch_tokens": ({"batch_tokens": 0}, "batch_tokens = 0: expected 1 or more"),
    "not a number": ({"beam": "wide"}, "beam = wide: input should be a valid integer"),
    "nan": ({"length_penalty": float("nan")}, "length_penalty = nan: input should be a finite number"),
    "unknown": ({"topk": 3}, 'there is no option "topk". Did you mean "top_k"?'),
    "unknown and far": ({"zzz": 3}, 'there is no option "zzz". There are: beam, nbest, length_penalty, '),
    "nbest over beam": ({"nbest": 3, "beam": 2}, "nbest = 3 with beam = 2: a search that keeps 2 hypotheses cannot"),
    "groups that do not divide": ({"groups": 2}, "groups = 2 do not divide beam = 5: use beam = 6"),
    "more groups than beams": ({"groups": 8}, "groups = 8 do not divide beam = 5: use beam = 8"),
    "diversity without groups": ({"diversity": 0.7}, "diversity = 0.7 means nothing without groups: set groups = 5"),
    "force in groups": ({"groups": 5, "force": ["a"]}, "force with groups = 5: forced phrases share the beam out"),
    "temperature without sample": ({"temperature": 0.7}, "temperature = 0.7 means nothing without sample: set sample"),
    "top_k without sample": ({"top_k": 3}, "top_k = 3 means nothing without sample"),
    "top_p without sample": ({"top_p": 0.5}, "top_p = 0.5 means nothing without sample"),
    "seed without sample": ({"seed": 3}, "seed = 3 means nothing without sample"),
    "beam with sample": ({"sample": True, "beam": 4}, "beam means nothing with sample, which draws one token after"),
    "groups with sample": ({"sample": True, "groups": 5}, "groups means nothing with sample"),
    "force with sample": ({"sample": True, "force": ["a"]}, "force means nothing with sample"),
    "tree with sample": ({"sample": True, "tree": True}, "tree means nothing with sample"),
    "shortest over longest": ({"min_length": 9, "max_length": 8}, "min_length = 9 is over max_length = 8: lower it"),
    "no room": ({"max_ratio": 0.5, "max_extra": 0}, "max_ratio = 0.5 and max_extra = 0 leave no room for an output"),
    "ratios that cross": ({"min_ratio": 3.0, "max_extra": 0}, "min_ratio = 3.0 is over max_ratio = 2.0: lower it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    given, message = REFUSED[name]
    reasons = refusals(given)
    assert len(reasons) == 1 and reasons[0].startswith(message), reasons


@pytest.mark.parametrize("given", [
    {"sample": True, "beam": 1}, {"sample": True, "nbest": 50, "seed": 3, "temperature": 0.5, "top_k": 1, "top_p": 1.0},
    {"groups": 5, "diversity": 0.0}, {"force": ["a"], "beam": 1}, {"tree": True, "beam": 1}, {"nbest": 5},
    {"min_length": 256}, {"max_ratio": 0.0}])
def test_what_can_be(given):
    options(given)


def test_all_reasons_are_told_at_once():
    reasons = refusals({"beam": 0, "groups": 2, "temperature": -1.0, "top_k": 3, "nbest": 9, "min_length": 300,
                        "replace_unknown": True, "bean": 1}, FIXED)
    for part in ("beam = 0: expected", "temperature = -1.0: expected", "top_k = 3 means nothing", "no option \"bean\"",
                 "groups = 2 do not divide beam = 5", "nbest = 9 with beam = 5", "min_length = 300 is over max_length",
                 "replace_unknown needs attention"):
        assert sum(part in reason for reason in reasons) == 1, part
    assert len(reasons) == 9  # and temperature without sample


def test_attention_is_needed_for_what_counts_it():
    assert attends(ATTENDING) and attends(CONV) and not attends(FIXED)
    for given in ({"coverage_penalty": 0.2}, {"replace_unknown": True}):
        name, = given
        assert refusals(given, FIXED) == [
            f"{name} needs attention to the source, and this model has only a fixed vector: leave it out"]
        options(given)
        Options.of(DecodeConfig(), given, [FIXED, ATTENDING])  # an ensemble of which one looks
    assert refusals({}, FIXED, coverage_penalty=0.2)


def test_positions_that_a_model_does_not_know():
    settings = {"max_length": 60, "max_source_tokens": 59}
    options({}, CONV, **settings)
    assert refusals({"max_length": 61}, CONV, **settings) == [
        "max_length = 61 is over what the decoder's max_positions = 60 allow: lower it"]
    assert refusals({"max_source_tokens": 60}, CONV, **settings) == [
        "max_source_tokens = 60 is over what the encoder's max_positions = 60 allow: lower it"]


def test_decode_settings_that_cannot_work_together_are_refused_where_the_config_is_read(tmp_path):
    with pytest.raises(ConfigError) as error:
        make_config(tmp_path, decode={"beam": 4, "groups": 3, "min_length": 300})
    assert str(error.value).splitlines() == [
        "test, [decode]: groups = 3 do not divide beam = 4: use beam = 6.",
        "test, [decode]: min_length = 300 is over max_length = 256: lower it, or raise max_length."]
    assert make_config(tmp_path, decode={"beam": 6, "groups": 3, "temperature": 0.7}).decode.temperature == 0.7
