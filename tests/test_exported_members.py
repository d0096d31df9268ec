"""What `import regard` offers is a promise; this pins it."""

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import regard

PARAMETERS = {
    "attend": ["query", "keys", "values", "score", "mask"],
    "load": ["path", "checkpoint", "device", "engine", "precision"],
    "read_config": ["path", "overrides"],
    "train": ["config", "out", "fresh", "force", "quiet", "reporter"],
    "Translation": ["text", "score", "log_probability", "tokens", "alternatives", "problem", "parts",
                    "log_probabilities", "entropies", "tree"],
    "Translator.translate": ["self", "lines", "asked"],
    "Translator.stream": ["self", "lines", "asked"],
    "Translator.score": ["self", "sources", "targets"],
    "Translator.look": ["self", "source", "target", "beam"],
}


ASKED = ["beam", "nbest", "length_penalty", "length_penalty_kind", "coverage_penalty", "max_length", "max_ratio",
         "max_extra", "min_length", "min_ratio", "groups", "diversity", "sample", "temperature", "top_k", "top_p",
         "seed", "prefix", "force", "ban", "no_repeat_ngram", "replace_unknown", "scores", "token_scores", "tree",
         "max_source_tokens", "batch_tokens", "batch_sentences"]
"""What `translate` and `stream` may be asked for, by name."""


def test_names():
    assert regard.__all__ == ["Config", "Translation", "Translator", "__version__", "attend", "load", "read_config",
                              "train"]
    assert dir(regard) == sorted(regard.__all__)
    assert all(getattr(regard, name) is not None for name in regard.__all__)
    assert regard.__version__ == version("regard")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    found = regard
    for part in name.split("."):
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters) == PARAMETERS[name]


def test_what_a_translation_may_be_asked_for():
    from regard.translator import Asked

    assert list(Asked.__annotations__) == ASKED


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'regard' has no attribute 'tain'"):
        regard.tain  # noqa: B018


def test_import_does_not_wait_for_torch():
    done = subprocess.run([sys.executable, "-c", "import regard, sys; sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0
