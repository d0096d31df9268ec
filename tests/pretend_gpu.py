"""A GPU that is not here: tensors that say they are on one, whose numbers are computed on the processor.

What it holds code to is what a GPU would: tensors of two devices do not meet, a product's factors have one type, and
autocast narrows and widens what it does on a GPU. It counts how often the processor waits for an answer.

    PYTHONPATH=tests python -m pytest -p pretend_gpu tests/on_a_gpu.py

It is a plugin, to be there before Regard is, in a process of its own: torch knows one such device and cannot forget it.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
GPU, aten = torch.device("gpu", 0), torch.ops.aten
Tensor.is_cuda = property(lambda x: x.device.type == GPU.type)
torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()  # which it could not be computed in
torch.__future__.set_swap_module_params_on_conversion(True)  # so that a tied table stays one
COPIES = {aten._to_copy.default, aten.copy_.default}
ANSWERS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""What cannot go on before the GPU has said a number, or how many there are."""
WAITS: Counter[str] = Counter()
"""How often each operation has waited."""

# Those that Regard may use; torch's reference of "Ops that can autocast" on CUDA has them all.
NARROWED = ["mm", "addmm", "addmv", "addbmm", "bmm", "baddbmm", "matmul", "linear", "mv", "conv1d",
            "scaled_dot_product_attention", "lstm.input", "gru.input", "rnn_tanh.input"]
WIDENED = ["softmax.int", "log_softmax.int", "layer_norm", "cumsum", "cumprod", "exp", "log", "log1p", "expm1", "sum",
           "sum.dim_IntList", "prod", "pow.Tensor_Scalar", "norm.Scalar", "rsqrt", "reciprocal", "softplus", "renorm"]


class Far(Tensor):
    """A tensor on the GPU; `here` holds its numbers."""

    @staticmethod
    def __new__(cls, here):
        return Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=GPU,
                                             storage_offset=here.storage_offset())

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f"Far({self.here})"

    @classmethod
    def __torch_dispatch__(cls, operation, kinds, given=(), named=None):
        return compute(operation, given, named or {})


def is_far(device):
    """Whether a device, by whatever it is named, is the GPU; None where none is named."""
    return None if device is None else torch.device(device).type == GPU.type


def compute(operation, given, named):
    """What an operation of torch gives, where its tensors are."""
    tensors = [each for each in tree_leaves((given, named)) if isinstance(each, Tensor)]
    some_far, goes = any(isinstance(each, Far) for each in tensors), is_far(named.get("device"))
    if not some_far and not goes:
        return operation(*given, **named)
    if some_far and operation not in COPIES and any(not isinstance(each, Far) and each.dim() for each in tensors):
        raise RuntimeError(f"{operation}: tensors on two devices, {[(each.shape, each.device) for each in tensors]}")
    masks = operation in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
        each is not None and each.dtype == torch.bool for each in given[1])
    if operation in ANSWERS or masks or goes is False:
        WAITS[str(operation)] += 1
    here, how = tree_map_only(Far, lambda far: far.here, (given, named))
    if goes is not None:
        how = {name: value for name, value in how.items() if name != "pin_memory"} | {"device": "cpu"}
    found = operation(*here, **how)
    if goes is False:
        return found
    found = tree_map_only(Tensor, Far, found)
    return return_and_correct_aliasing(operation, given, named, found) if some_far else found


class Computed(TorchDispatchMode):
    """Tensors are made on the GPU where it is named."""

    def __torch_dispatch__(self, operation, kinds, given=(), named=None):
        return compute(operation, given, named or {})


class Lists(TorchFunctionMode):
    """Lists of numbers go to the GPU and come from it as tensors: torch itself would do that where nobody sees it."""

    def __torch_function__(self, function, kinds, given=(), named=None):
        named = dict(named or {})
        if function in (torch.tensor, torch.as_tensor) and is_far(named.get("device")):
            device = named.pop("device")
            return function(*given, **named).to(device)
        if function is Tensor.new_tensor and given[0].is_cuda:
            return torch.tensor(*given[1:], **{"dtype": given[0].dtype} | named).to(GPU)
        if function is Tensor.tolist and given[0].is_cuda:
            return given[0].cpu().tolist()
        if function in (Tensor.__getitem__, Tensor.__setitem__) and given[0].is_cuda:
            index = given[1] if isinstance(given[1], tuple) else (given[1],)
            index = tuple(torch.tensor(each).to(GPU) if isinstance(each, list) else each for each in index)
            return function(given[0], index, *given[2:])
        return function(*given, **named)


def autocast(library, name, kind):
    """Have autocast compute an operation in a type, as CUDA's does."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(x):
        return x.to(kind) if x.is_cuda and x.is_floating_point() and x.dtype != torch.float64 else x

    def run(*given, **named):
        given, named = tree_map_only(Tensor, cast, (given, named))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*given, **named)

    library.impl(name, run)


AUTOCAST = [torch.library.Library(name, "IMPL", "AutocastPrivateUse1") for name in ("aten", "_")]
"""What autocast does there, as long as somebody holds it."""
for _names, _kind in ((NARROWED, torch.bfloat16), (WIDENED, torch.float32)):
    for _name in _names:
        autocast(AUTOCAST[0], _name, _kind)
AUTOCAST[1].fallback(torch.library.fallthrough_kernel)


def stepwise(cells):
    """torch's cells as calls that every device has, where they have one kernel of a GPU."""
    def run(*given):
        with enable_python_dispatcher():
            return cells(*given)

    return run


for _name in ("rnn_tanh", "gru", "lstm"):
    setattr(torch._VF, _name, stepwise(getattr(torch._VF, _name)))


@contextmanager
def at_work():
    """A context in which the GPU is there; gives what has waited for it, by operation."""
    WAITS.clear()
    with ExitStack() as stack:
        for each in (Computed(), Lists()):
            stack.enter_context(each)
        yield WAITS
