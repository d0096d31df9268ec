"""Whether tensors that anybody may give to `regard.attend` fit each other."""

from typing import NoReturn

import torch
from torch import Tensor

from regard.errors import ConfigError


def fit(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask, as it stands before the scores. Refuses what does not fit or would be broadcast to something else."""
    def refuse(reason: str) -> NoReturn:
        given = {"query": query, "keys": keys, "values": values, "mask": mask}
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items() if x is not None)
        raise ConfigError(f"attend: {shapes}: {reason}")

    q, k, v = query.shape, keys.shape, values.shape
    if min(len(q), len(k), len(v)) < 2:
        refuse("query, keys and values were expected to be (…, positions, width): write x[:, None] for a vector that "
               "has one number at each position, x[None, :] for one that is a single position")
    if k[-2] != v[-2]:
        refuse(f"there are {k[-2]} keys and {v[-2]} values, and one value for each key was expected")
    batch = q[:-2]
    if not batch == k[:-2] == v[:-2]:
        try:
            batch = torch.broadcast_shapes(batch, k[:-2])  # type: ignore[no-untyped-call]
            torch.broadcast_shapes(batch, v[:-2])  # type: ignore[no-untyped-call]
        except RuntimeError:
            refuse("the dimensions before the last two were expected to be equal, 1 or left out")
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        refuse(f"the mask is of {mask.dtype}, and torch.bool was expected, True where a key may be looked at")
    shape = (*batch, q[-2], k[-2])
    placed = mask[:, None, :] if mask.dim() == 2 and len(shape) == 3 else mask
    if placed.dim() > len(shape) or any(
            own not in (1, size) for own, size in zip(placed.shape[::-1], shape[::-1], strict=False)):
        hint = "; of two dimensions beside a batch it is (B, S): write mask[None] for (T, S)"
        refuse(f"a mask that broadcasts to {shape}, (…, T, S), was expected" + hint * (placed is not mask))
    return placed
