"""What `import regard` offers is a promise; this pins it."""

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import regard

PARAMETERS = {
    "attend": ["query", "keys", "values", "score", "mask"],
    "load": ["path", "checkpoint", "device"],
    "read_config": ["path", "overrides"],
    "train": ["config", "out", "fresh", "force", "quiet"],
    "Translation": ["text", "score", "log_probability", "tokens", "alternatives", "problem"],
    "Translator.translate": ["self", "lines", "beam", "nbest", "length_penalty", "batch_tokens", "batch_sentences"],
    "Translator.stream": ["self", "lines", "beam", "nbest", "length_penalty", "batch_tokens", "batch_sentences"],
    "Translator.score": ["self", "sources", "targets"],
    "Translator.look": ["self", "source", "target", "beam"],
}


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


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'regard' has no attribute 'tain'"):
        regard.tain  # noqa: B018


def test_import_does_not_wait_for_torch():
    done = subprocess.run([sys.executable, "-c", "import regard, sys; sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0
