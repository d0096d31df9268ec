"""The processes that train together, on one machine or many: `torchrun --nproc-per-node N … regard train CONFIG`.

Each has the whole model and computes some pieces of every update; their gradients are summed, so that all make the same
step. A training that nobody shares is a cluster of one. What torch.distributed says on the way is made an error that
says what to do; nothing that is sent is a pickle.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from regard.errors import RunError

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: one of them reads the text, and translates the validation data."""


@dataclass(frozen=True)
class Cluster:
    """One process among those that train together.

    Attributes:
        rank: its number, from 0. The first one prepares, validates, saves and speaks.
        size: how many there are.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    @property
    def part(self) -> slice:
        """Which pieces of an update this one computes."""
        return slice(self.rank, None, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place, in whatever order is fastest."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_in_order(self, values: Sequence[Tensor], pieces: int) -> Tensor:
        """The sum over all pieces, one after the other, so that it is the same to the last bit however many processes
        share them.

        Args:
            values: float (N,) each, of this one's `part` of the pieces.
            pieces: how many there are in all.
        """
        total = torch.zeros_like(values[0])
        for number in range(pieces):
            owner = number % self.size
            value = values[number // self.size] if owner == self.rank else torch.empty_like(total)
            total += self.from_rank(owner, value)
        return total

    def from_rank(self, owner: int, value: Tensor) -> Tensor:
        """A tensor as one process has it, on all."""
        if self.size > 1:
            dist.broadcast(value, owner)
        return value

    def agree(self, value: Any) -> Any:
        """What the first process says, on all: anything that JSON holds."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        length = self.from_rank(0, torch.tensor([len(text)], device=self.device))
        data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.is_first:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return json.loads(bytes(self.from_rank(0, data).cpu().numpy()))

    def agree_on(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors by name, on all; the others need none of them."""
        if self.size == 1:
            return dict(tensors)
        forms = {name: (str(each.dtype).removeprefix("torch."), list(each.shape)) for name, each in tensors.items()}
        found = {}
        for name, (dtype, shape) in self.agree(forms).items():
            value = tensors[name] if self.is_first else torch.empty(shape, dtype=getattr(torch, dtype))
            found[name] = self.from_rank(0, value.to(self.device).contiguous()).to(value.device)
        return found

    def refuse_unlike(self, what: str, value: str) -> None:
        """Raise RunError on every process unless all have the same, such as the digest of the data that they read."""
        first = self.agree(value)
        unlike = self.sum(torch.tensor([float(value != first)], device=self.device))
        if unlike:
            mine = "" if value == first else f"; this one has {value[:12]}…, the first {first[:12]}…"
            raise RunError(f"process {self.rank} of {self.size}: {int(unlike)} of the processes have other {what} than "
                           f"the first{mine}. Give all of them the same files, or a folder that they share")

    def refuse_other_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise RunError on every process unless all have the same settings, names with values that JSON holds; those
        that differ are named."""
        first = self.agree(settings)
        unlike = [f"{name} = {value!r} here and {first.get(name)!r} in the first" for name, value in settings.items()
                  if value != first.get(name)]
        count = self.sum(torch.tensor([float(bool(unlike))], device=self.device))
        if count:
            mine = f": {', '.join(unlike[:3])}{' …' if len(unlike) > 3 else ''}" if unlike else ""
            raise RunError(f"process {self.rank} of {self.size}: {int(count)} of the processes have other settings "
                           f"than the first{mine}. Give all of them the same config")


@contextmanager
def joined(device: torch.device) -> Iterator[Cluster]:
    """Join the processes that torchrun has started with this one; without torchrun, a cluster of one.

    Args:
        device: where this one computes; of several GPUs, torchrun's LOCAL_RANK says which.

    Raises:
        RunError: in the body, another process has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Cluster(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    place, rank = meeting_place(), int(os.environ["RANK"])
    met: dict[str, Any] = {} if place is None else {"store": place, "rank": rank, "world_size": size}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, **met)
    try:
        with left_alone(rank, size):
            yield Cluster(rank, size, device)
    finally:
        dist.destroy_process_group()


def meeting_place() -> Store | None:
    """Where the processes that torchrun has started tell each other their addresses; None: torch makes it.

    Torch 2.13 has one place for all attempts, where a process that is started again can read the address of one that
    has ended. So each attempt has its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
    return PrefixStore(f"regard/attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def left_alone(rank: int, size: int) -> Iterator[None]:
    """Turn the end of another process into an error that says what to do. torch.distributed tells of it in its own way,
    wherever processes wait for each other: also in a forward or backward pass, where weights are shared out."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise RunError(f"process {rank} of {size}: another process of this training has ended or does not answer; its "
                       "own message says why. What was saved is whole: the same command goes on from there, and so "
                       f"does torchrun --max-restarts ({str(error).splitlines()[0][:120]})") from None
