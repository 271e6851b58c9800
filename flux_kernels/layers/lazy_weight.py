"""The `.weight` of a packed layer: it decodes only when it is computed with.

Its shape, dtype and device are free to ask (loading a LoRA asks seven times a layer). It is made on access and never
stored: the parameter of the layer is the plain uint8 `qweight`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..compute import Branch
from ..errors import FormatError
from ..formats import Packed

_VIEWS_OF_ALL = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def decode_whole(packed: Packed, dtype: torch.dtype, backend: str, branch: Branch | None = None) -> Tensor:
    """Decode packed rows and add the branch (down [r, K], up [N, r]) where the layer has it.

    The sum is rounded to `dtype` once.
    """
    decoded_to = dtype if branch is None else torch.float32
    weight = torch.ops.flux_kernels.dequantize(packed.data, packed.fmt.name, decoded_to, backend, packed.planes)
    return weight if branch is None else torch.addmm(weight, branch[1].float(), branch[0].float()).to(dtype)


class LazyWeight(torch.Tensor):
    """Stand in for the decoded weight [N, K] of a packed layer.

    Any computation decodes first; a write raises FormatError, because it could not reach the packed bytes.
    """

    packed: Packed
    backend: str
    # Down [r, K], up [N, r]: the weight includes up @ down.
    branch: Branch | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype, backend: str = "auto", branch: Branch | None = None):
        shape = (packed.n, packed.k)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.data.device)
        self.packed, self.backend, self.branch = packed, backend, branch
        return self

    def decode(self) -> Tensor:
        """Return the weight as an ordinary tensor."""
        return decode_whole(self.packed, self.dtype, self.backend, self.branch)

    @property
    def data(self) -> LazyWeight:
        """Return the stand-in itself: there is no autograd history to leave behind."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise FormatError(_read_only(self))

    def __setitem__(self, index, value) -> None:
        """Refuse the write, which dispatch would send to a decoded copy."""
        raise FormatError(_read_only(self))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _VIEWS_OF_ALL:
            source = args[0]
            return cls(source.packed, source.dtype, source.backend, source.branch)
        _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.decode, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight({self.packed.fmt.name}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo) -> Tensor:
        return self.decode()

    def __reduce_ex__(self, protocol):
        return self.decode().__reduce_ex__(protocol)


def _refuse_writes(func, args, kwargs) -> None:
    """Raise FormatError where `func` would write into a stand-in."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, LazyWeight):
            raise FormatError(_read_only(value))


def _read_only(weight: LazyWeight) -> str:
    return (
        f"The weight of this layer is packed {weight.packed.fmt.name} and cannot be written: the change would be lost. To merge a LoRA, call "
        "flux_kernels.fuse_lora(model); to edit the weight, replace the layer by layer.dequantize() first."
    )
