"""GGUFLinear: an nn.Linear whose weight stays packed as a plain uint8 parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import ACTIVATION_DTYPES, check_names, resolve, wants_planes
from ..errors import BackendUnavailable, FormatError
from ..formats import BlockFormat, get_format
from ..packing import quantize
from . import eager
from .lazy_weight import decode_whole
from .low_rank import LowRankLayer, check_outliers
from .row_scale import KeepsRowScale


class GGUFLinear(LowRankLayer, KeepsRowScale, nn.Linear):  # type: ignore[override]
    """Compute x @ W.T + bias with W packed in a ggml block format.

    Attributes:
        qweight: uint8 [out_features, row bytes], not trainable.
        bias: [out_features] of a floating dtype, or None.
        format: ggml type name.
        planes: whether the rows of `qweight` are stored field by field (`Layout.to_planes`); `file_bytes` undoes it.
        backend: "auto", "triton" or "torch".
        compute: "exact", "fp16_accumulate" or "int8".
        compute_dtype: dtype of `weight` and of adapters put on the layer; the product is computed in the dtype of x.
        weight: [out_features, in_features], a stand-in that decodes when computed with (see `LazyWeight`).
        low_rank_down, low_rank_up: an optional branch added to W, part of `weight` (see `LowRankLayer`).
        outlier_index, outlier_weight: input channels that "int8" computes in x's dtype, or None.
        row_scale: what "int8" keeps of the rows on some cards (see `KeepsRowScale`), or None; no part of the state dict.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "Q8_0",
        *,
        planes: bool = False,
        backend: str = "auto",
        compute: str = "exact",
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        """Make a layer of empty bytes; use `from_linear` or `from_packed` for a filled layer."""
        row_bytes = get_format(format).row_bytes(in_features)
        qweight = torch.empty(out_features, row_bytes, dtype=torch.uint8, device=device)
        made_bias = torch.zeros(out_features, dtype=compute_dtype, device=device) if bias else None
        self._set_up(qweight, format, made_bias, planes, backend, compute, compute_dtype)

    def _set_up(self, qweight, format, bias, planes, backend, compute, compute_dtype) -> None:
        check_names(backend, compute)
        weight = ops.check_data(qweight, format)
        if qweight.dim() != 2:
            raise FormatError(f"Packed weights must have shape [N, row bytes], got {list(qweight.shape)}.")
        if bias is not None and bias.shape != (qweight.shape[0],):
            raise FormatError(f"The bias must have shape [{qweight.shape[0]}], got {list(bias.shape)}.")
        nn.Module.__init__(self)
        self.in_features, self.out_features = weight.k, weight.n
        self.format = weight.fmt.name
        self.planes = bool(planes)
        self.backend = backend
        self.compute = compute
        self.compute_dtype = compute_dtype
        # The bias comes first: several models of diffusers (Wan) take the dtype of a module's first parameter for its own.
        if bias is None or isinstance(bias, nn.Parameter):
            self.bias = bias  # type: ignore[assignment]
        else:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.qweight = nn.Parameter(qweight, requires_grad=False)
        _upload_table(weight.fmt, qweight)
        self._no_branch()

    @classmethod
    def from_packed(
        cls,
        qweight: Tensor,
        format: str | BlockFormat,
        bias: Tensor | None = None,
        *,
        planes: bool = False,
        backend: str = "auto",
        compute: str = "exact",
        compute_dtype: torch.dtype | None = None,
    ) -> GGUFLinear:
        """Wrap packed rows without copying them.

        Args:
            qweight: uint8 [N, row bytes].
            format: ggml type name of the rows.
            bias: [N] of a floating dtype, or None.
            planes: whether the rows were rearranged with `Layout.to_planes`.
            backend: "auto", "triton" or "torch".
            compute: "exact", "fp16_accumulate" or "int8".
            compute_dtype: dtype of `.weight`; by default the bias's dtype where the kernels compute in it, else bfloat16.

        Raises:
            FormatError: on shapes or dtypes that do not fit.
        """
        if compute_dtype is None:
            compute_dtype = bias.dtype if bias is not None and bias.dtype in ACTIVATION_DTYPES else torch.bfloat16
        self = cls.__new__(cls)
        self._set_up(qweight, get_format(format).name, bias, planes, backend, compute, compute_dtype)
        return self

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str | BlockFormat,
        importance: Tensor | None = None,
        *,
        backend: str = "auto",
        compute: str = "exact",
    ) -> GGUFLinear:
        """Quantize an nn.Linear on its own device; the bias is shared with it.

        Args:
            linear: weight [N, K] of a floating dtype.
            format: ggml type name to quantize to.
            importance: [K] or [N, K], non-negative, or None.

        Raises:
            FormatError: where K is not whole blocks, or the format has no quantizer here.
        """
        weight = linear.weight.detach()
        qweight = quantize(weight, format, importance)
        compute_dtype = weight.dtype if weight.dtype in ACTIVATION_DTYPES else None
        return cls.from_packed(
            qweight, format, linear.bias, backend=backend, compute=compute, compute_dtype=compute_dtype
        ).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Compute x @ W.T + bias + branch.

        It maps [..., K] of float16, bfloat16 or float32 to [..., N] of the same dtype.
        """
        weight = self._packed_with_scale()
        if self.low_rank_down is None and self.outlier_index is None:
            return eager.linear(input, weight, self.bias, self.backend, self.compute)
        hidden = self._hidden(input)
        up = None if self.low_rank_up is None or hidden is None else self.low_rank_up.to(hidden.dtype)
        outliers = self.outlier_index, self.outlier_weight
        return eager.dispatched(input, weight, self.bias, self.backend, self.compute, (hidden, up), outliers)

    def keep_outliers(self, index: Tensor | None) -> None:
        """Let compute="int8" compute some input channels in x's dtype.

        None undoes it; other modes ignore it.

        Args:
            index: the channels, integers [k] without repetition in 0..K-1; kernels pad k to a multiple of 16.

        Raises:
            FormatError: on an index that does not fit.
        """
        if index is None or index.numel() == 0:
            self.outlier_index = self.outlier_weight = None
            return
        channels = check_outliers(index, self.in_features).to(self.qweight.device)
        decoded = decode_whole(self.packed, self.compute_dtype, self.backend)
        self.outlier_index = nn.Parameter(channels, requires_grad=False)
        self.outlier_weight = nn.Parameter(decoded[:, channels].contiguous(), requires_grad=False)

    def arrange(self) -> GGUFLinear:
        """Rearrange the packed rows, in place, as the backend wants them where the layer is now.

        That is in file order or as field planes. It is called when a layer is swapped in, loaded or moved; offloading hooks
        that move parameters themselves leave rows as they are.
        """
        weight = self.packed
        wanted = wants_planes(self.backend, weight.data.device, weight.fmt)
        _upload_table(weight.fmt, weight.data)
        if wanted != self.planes and weight.data.device.type != "meta":
            self.qweight = nn.Parameter(weight.arranged(wanted).data.detach(), requires_grad=False)
            self.planes = wanted
        # Now, so that a graph or a compiled model finds it there.
        self._kept_row_scale()
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an ordinary nn.Linear with the decoded weight.

        Args:
            dtype: of the weight, `compute_dtype` by default; the bias is shared and keeps its own where it is None.
        """
        weight = self._decode(dtype or self.compute_dtype).detach()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias if dtype is None else nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear.train(self.training)

    def _apply(self, fn, recurse: bool = True):
        """Move or cast, and arrange the rows for where they are now."""
        super()._apply(fn, recurse)
        return self.arrange()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Load, and find the scales of the new rows.

        Compiled models and captured graphs do not look whether rows changed.
        """
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._kept_row_scale()

    def extra_repr(self) -> str:
        """Show shape, format, what runs it, and where."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        branch = f", rank={self.rank}" if self.rank else ""
        outliers = "" if self.outlier_index is None else f", outliers={self.outlier_index.shape[0]}"
        chosen = f"backend={self.backend}{self._chosen()}, compute={self.compute}"
        return f"{shape}, format={self.format}, {chosen}{branch}{outliers}"

    def _chosen(self) -> str:
        """Tell what "auto" stands for on the device that the layer runs on."""
        device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        device = self.qweight.device if device is None else torch.device(device)
        if self.backend != "auto" or device.type == "meta":
            return ""
        try:
            return f" ({resolve(self.backend, self.compute, device, get_format(self.format)).name} on {device})"
        except BackendUnavailable:
            return f" (none on {device})"


def _upload_table(fmt: BlockFormat, qweight: Tensor) -> None:
    """Put a format's lookup table where the rows are.

    A first call may be inside a CUDA graph's private pool: too late.
    """
    if fmt.table is not None and qweight.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        fmt.table_on(qweight.device)
