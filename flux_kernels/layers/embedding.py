"""GGUFEmbedding: an nn.Embedding whose table stays packed; only the rows that are looked up are decoded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends import ACTIVATION_DTYPES, check_activation_dtype, check_names
from ..errors import FormatError
from ..formats import BlockFormat, get_format
from .lazy_weight import LazyWeight


class GGUFEmbedding(nn.Embedding):
    """Look rows up in a table packed in a ggml block format.

    A table of 32,128 x 4,096 as the T5 of FLUX.1 has it takes 139 MB in Q8_0 and 263 MB in 16 bit; a prompt looks up at
    most 512 of its rows. The rows keep the order of the file on every device.

    Attributes:
        qweight: uint8 [num_embeddings, row bytes], not trainable.
        format: ggml type name.
        backend: "auto", "triton" or "torch".
        compute_dtype: dtype of the rows that come out; `.to(dtype)` changes it.
        weight: [num_embeddings, embedding_dim], a stand-in that decodes when computed with (see `LazyWeight`).
    """

    qweight: nn.Parameter

    def __init__(
        self,
        qweight: Tensor,
        format: str | BlockFormat,
        *,
        backend: str = "auto",
        compute_dtype: torch.dtype = torch.bfloat16,
    ):
        """Wrap packed rows without copying them.

        Args:
            qweight: uint8 [num_embeddings, row bytes].
            format: ggml type name of the rows.
            backend: "auto", "triton" or "torch".
            compute_dtype: float16, bfloat16 or float32.

        Raises:
            FormatError: on bytes that are not whole rows of `format`, or another dtype.
            BackendUnavailable: where `backend` is no known name.
        """
        check_names(backend)
        check_activation_dtype(compute_dtype, "compute_dtype")
        fmt, embedding_dim = ops.check_data(qweight, get_format(format).name)
        if qweight.dim() != 2:
            raise FormatError(f"A packed table must have shape [rows, row bytes], got {list(qweight.shape)}.")
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = qweight.shape[0], embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.format, self.backend, self.compute_dtype = fmt.name, backend, compute_dtype
        self.qweight = nn.Parameter(qweight, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Stand in for the decoded table [num_embeddings, embedding_dim]: metadata is free, computing decodes, writing raises."""
        return LazyWeight(self.qweight, self.format, self.compute_dtype, self.backend, False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; refuse one named `weight`, which is computed from `qweight`."""
        if name == "weight":
            raise FormatError(
                f"The table of a GGUFEmbedding is packed {self.format} and cannot be assigned. Replace the layer by "
                "layer.dequantize() first."
            )
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of `input`: integers [...] -> [..., embedding_dim] of `compute_dtype`."""
        rows = F.embedding(input, self.qweight)
        return ops.dequantize(rows, self.format, self.compute_dtype, backend=self.backend)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return an ordinary nn.Embedding with the decoded table, in `compute_dtype` by default."""
        table = ops.dequantize(self.qweight, self.format, dtype or self.compute_dtype, backend=self.backend)
        return nn.Embedding.from_pretrained(table, freeze=True).train(self.training)

    def _apply(self, fn, recurse: bool = True):
        """Move or cast; `qweight` keeps its dtype, and `compute_dtype` follows."""
        if fn(torch.empty(1, dtype=torch.uint8)).dtype != torch.uint8:
            raise FormatError("The packed bytes of a GGUFEmbedding stay uint8: .to(dtype) leaves them, .type(dtype) does not.")
        followed = fn(torch.empty(1, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)
        if followed in ACTIVATION_DTYPES:
            self.compute_dtype = followed
        return self

    def _descriptor(self) -> Tensor:
        """Describe the packed rows for a state dict, as GGUFLinear does: int64 [ggml type, rows, K, planes]."""
        number = get_format(self.format).ggml_type
        return torch.tensor([number, self.num_embeddings, self.embedding_dim, 0], dtype=torch.int64)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save `qweight`, and the descriptor as `weight`."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._descriptor()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Check the descriptor and load."""
        descriptor = state_dict.pop(prefix + "weight", None)
        if descriptor is None:
            missing_keys.append(prefix + "weight")
        elif not torch.equal(descriptor.cpu(), self._descriptor()):
            error_msgs.append(
                f'"{prefix}weight": expected the descriptor {self._descriptor().tolist()} of a packed {self.format} table, got '
                f"{descriptor.dtype} {descriptor.tolist() if descriptor.numel() < 9 else list(descriptor.shape)}."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        """Show shape and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}, backend={self.backend}"
