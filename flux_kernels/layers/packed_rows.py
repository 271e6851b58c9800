"""What every layer of packed rows does alike.

A lazy `weight`, a descriptor in state dicts, bytes that no cast reaches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import ACTIVATION_DTYPES
from ..compute import Branch
from ..errors import FormatError
from ..formats import FORMATS, BlockFormat, Packed, types_by_number
from .lazy_weight import LazyWeight, decode_whole


class PackedRows(nn.Module):
    """Hold rows of a ggml block format in `qweight`, with a stand-in for the weight that they are.

    Attributes:
        qweight: uint8 [N, row bytes], not trainable.
        format: ggml type name.
        planes: whether rows are stored field by field (`Layout.to_planes`).
        backend: "auto", "triton" or "torch".
        compute_dtype: dtype of `weight`; `.to(dtype)` changes it.
    """

    qweight: nn.Parameter
    format: str
    planes: bool
    backend: str
    compute_dtype: torch.dtype

    @property
    def packed(self) -> Packed:
        """The rows as a weight [N, K], for kernels."""
        return Packed(self.qweight, FORMATS[self.format], self.planes)

    @property
    def weight(self) -> Tensor:
        """Stand in for the decoded weight [N, K]: metadata is free, computing decodes, writing raises."""
        # Compilers cannot trace the stand-in, and drop a decode of which nothing is used.
        if torch.compiler.is_compiling():
            return self._decode(self.compute_dtype)
        return LazyWeight(self.packed, self.compute_dtype, self.backend, self._branch())

    def _decode(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [N, K], branch included, in `dtype`."""
        return decode_whole(self.packed, dtype, self.backend, self._branch())

    def _branch(self) -> Branch | None:
        """Return the low-rank factors that are part of the weight, None in a layer that has none."""
        return None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; refuse the name `weight`, which is computed from `qweight`."""
        if name == "weight":
            raise FormatError(
                f"The weight of a {type(self).__name__} is packed {self.format} and cannot be assigned. Replace the layer by "
                "layer.dequantize(), or make a new layer of packed rows."
            )
        super().register_parameter(name, param)

    def _apply(self, fn, recurse: bool = True):
        """Move or cast; `qweight` keeps its dtype, and `compute_dtype` follows where kernels compute in it."""
        if fn(torch.empty(1, dtype=torch.uint8)).dtype != torch.uint8:
            raise FormatError(
                f"The packed bytes of a {type(self).__name__} stay uint8: .to(dtype) leaves them, .type(dtype) does not."
            )
        followed = fn(torch.empty(1, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)
        if followed in ACTIVATION_DTYPES:
            self.compute_dtype = followed
        return self

    def _descriptor(self) -> Tensor:
        """Describe the packed rows for a state dict: int64 [ggml type, N, K, planes]."""
        weight = self.packed
        return torch.tensor([weight.fmt.ggml_type, weight.n, weight.k, int(weight.planes)], dtype=torch.int64)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save parameters, and the descriptor as `weight`, the key that LoRA loaders look for."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._descriptor()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Check the descriptor, take over format and arrangement where this layer is still empty, and load."""
        if prefix + "weight" not in state_dict:
            missing_keys.append(prefix + "weight")
        problem = self._make_room(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _make_room(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Make this layer fit what a state dict holds; return what is wrong with that as a sentence, or None."""
        descriptor = state_dict.pop(prefix + "weight", None)
        problem = None if descriptor is None else self._take_descriptor(descriptor, state_dict, prefix)
        return None if problem is None else f'"{prefix}weight": {problem}'

    def _take_descriptor(self, descriptor: Tensor, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Make this layer fit a saved descriptor; return what is wrong with it as a sentence, or None."""
        if descriptor.dtype != torch.int64 or descriptor.shape != (4,):
            return (
                f"expected the int64 [ggml type, N, K, planes] of a packed layer, got {descriptor.dtype} "
                f"{list(descriptor.shape)}. Load 16-bit weights before swap_linear, not after."
            )
        number, *shape, planes = descriptor.tolist()
        row, here = types_by_number().get(number), self.packed
        if not isinstance(row, BlockFormat):
            known = ", ".join(f"{fmt.ggml_type} {name}" for name, fmt in FORMATS.items())
            return f"unknown ggml type {number}. Known: {known}."
        if shape != [here.n, here.k]:
            return f"the saved weight is {shape}, this layer is {[here.n, here.k]}."
        if self.qweight.device.type == "meta":
            self._adopt(row, bool(planes))
        elif row is not here.fmt:
            return (
                f"the saved weight is {row.name}, this layer holds {self.format}. Load into a model swapped with the "
                "same formats, or into a model on the meta device with assign=True."
            )
        elif bool(planes) != self.planes and prefix + "qweight" in state_dict:
            saved = Packed(state_dict[prefix + "qweight"], row, bool(planes))
            state_dict[prefix + "qweight"] = saved.arranged(self.planes).data
        return None

    def _adopt(self, fmt: BlockFormat, planes: bool) -> None:
        """Become an empty layer of another format (on the meta device, before loading)."""
        empty = self.qweight.new_empty(self.qweight.shape[0], fmt.row_bytes(self.packed.k))
        self.format, self.planes = fmt.name, planes
        self.qweight = nn.Parameter(empty, requires_grad=False)

    def file_bytes(self) -> Tensor:
        """Return the rows as a GGUF file stores them: uint8 [N, row bytes].

        `qweight` itself unless planes.
        """
        return self.packed._replace(data=self.qweight.detach()).arranged(planes=False).data
