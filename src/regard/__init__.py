"""Regard: train, run and explain models that turn one sequence into another.

    import regard

    translator = regard.load("runs/en-de")
    translator.translate("A dog runs.").text

Names are imported when first used, so that `import regard` (and `regard --help`) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.config import Config as Config
    from regard.config import read_config as read_config
    from regard.model.attention import attend as attend
    from regard.training.loop import train as train
    from regard.translator import Translation as Translation
    from regard.translator import Translator as Translator
    from regard.translator import load as load

__version__ = "0.1.0"

_HOMES = {
    "Config": "regard.config",
    "read_config": "regard.config",
    "attend": "regard.model.attention",
    "train": "regard.training.loop",
    "Translation": "regard.translator",
    "Translator": "regard.translator",
    "load": "regard.translator",
}

__all__ = ["Config", "Translation", "Translator", "__version__", "attend", "load", "read_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
