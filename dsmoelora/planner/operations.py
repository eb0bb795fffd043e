"""Operations that code asks torch for, on tensors without memory too: how much each computes and moves.

An operation is taken for one kernel that reads its inputs and writes its outputs once; views are none. What a kernel
does beside that (workspaces, several passes) is not seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_MAKES_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}
_READS_ROWS = {"embedding", "index", "index_select", "gather"}  # of a table, as many as come out


@dataclass(frozen=True)
class Operation:
    """One kernel.

    Args:
        in_backward: when it is asked for
        flops: of products
        num_bytes: read and written
    """

    in_backward: bool
    flops: int
    num_bytes: int


Operations = Counter[Operation]


class CountOperations(TorchDispatchMode):
    """Counts the operations inside the block.

    Attributes:
        found: how often each was asked for
        is_backward: what comes now belongs to the backward pass
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Operations = Counter()
        self.is_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        name = func.overloadpacket.__name__
        if made and name not in _MAKES_ROOM and (func._schema.is_mutable or not _is_view(given, made)):
            read = made if name in _READS_ROWS else given
            num_bytes = sum(map(_num_bytes, read)) + sum(map(_num_bytes, made))
            self.found[Operation(self.is_backward, _flops(func, args, kwargs or {}, out), num_bytes)] += 1
        return out


def _is_view(given: list[Tensor], made: list[Tensor]) -> bool:
    known = {one.untyped_storage()._cdata for one in given}
    return all(one.untyped_storage()._cdata in known for one in made)


def _num_bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func.overloadpacket
    aten = ops.aten
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # which torch's registry does not know
        return _attention_flops(args[0], args[1])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _attention_flops(args[1], args[2]) * 5 // 2
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _attention_flops(query: Tensor, key: Tensor) -> int:
    """Scores and their product with the values: 4 B H S^2 d."""
    return 4 * query.numel() * key.shape[-2]
