"""Looking inside: what a model did on one sentence, as tensors, in the terminal and as a picture."""

from regard.look.trace import Trace

__all__ = ["Trace"]
