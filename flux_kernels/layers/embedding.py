"""GGUFEmbedding: an nn.Embedding whose table stays packed.

Only the rows that are looked up are decoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends import check_activation_dtype, check_names
from ..errors import FormatError
from ..formats import BlockFormat, get_format
from .lazy_weight import decode_whole
from .packed_rows import PackedRows


class GGUFEmbedding(PackedRows, nn.Embedding):  # type: ignore[override]
    """Look rows up in a table packed in a ggml block format.

    A table of 32,128 x 4,096 as the T5 of FLUX.1 has it takes 139 MB in Q8_0 and 263 MB in 16 bit; a prompt looks up at
    most 512 of its rows. The rows keep the order of the file on every device, unless a saved table arranged in planes is loaded.

    Attributes:
        qweight: uint8 [num_embeddings, row bytes], not trainable.
        format: ggml type name.
        backend: "auto", "triton" or "torch".
        compute_dtype: dtype of the rows that come out; `.to(dtype)` changes it.
        weight: [num_embeddings, embedding_dim], a stand-in that decodes when computed with (see `LazyWeight`).
    """

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
        table = ops.check_data(qweight, get_format(format).name)
        if qweight.dim() != 2:
            raise FormatError(f"A packed table must have shape [rows, row bytes], got {list(qweight.shape)}.")
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.n, table.k
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.format, self.planes, self.backend, self.compute_dtype = table.fmt.name, False, backend, compute_dtype
        self.qweight = nn.Parameter(qweight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of `input`: integers [...] -> [..., embedding_dim] of `compute_dtype`."""
        rows = self.packed._replace(data=F.embedding(input, self.qweight))
        return decode_whole(rows, self.compute_dtype, self.backend)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return an ordinary nn.Embedding with the decoded table, in `compute_dtype` by default."""
        return nn.Embedding.from_pretrained(self._decode(dtype or self.compute_dtype), freeze=True).train(self.training)

    def extra_repr(self) -> str:
        """Show shape and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}, backend={self.backend}"
