"""The int8 scale of each row of a packed layer, computed once and kept.

It follows from the packed rows alone.

Finding it takes two launches and a read of the whole weight, at every call of compute="int8" on cards that give a row one scale.
A layer is where it can be kept safely: it sees its rows replaced, loaded and moved. A cache inside the kernels, keyed by the
tensor, would not (see docs/decisions/compute-modes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import BackendUnavailable
from ..formats import FORMATS, Packed
from .packed_rows import PackedRows


class KeepsRowScale(PackedRows):
    """Give a packed layer a buffer for the scales of its rows, no part of its state dict.

    Attributes:
        row_scale: float32 [N], the largest magnitude of each row / 127, NaN where a row holds NaN or Inf; None where the device
            or the compute mode needs none, or before the first call.
    """

    compute: str
    # The state of the rows that the scales belong to.
    _row_scale_of: tuple[int, int] | None = None

    @property
    def row_scale(self) -> Tensor | None:
        """The scales that are kept now."""
        return self._buffers.get("row_scale")

    def _set_row_scale(self, scale: Tensor | None) -> None:
        """Register the buffer, or none at all.

        accelerate's hooks cannot move a buffer that is None and not persistent.
        """
        if scale is None:
            self._buffers.pop("row_scale", None)
            self._non_persistent_buffers_set.discard("row_scale")
            return
        self._buffers["row_scale"] = scale
        self._non_persistent_buffers_set.add("row_scale")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; new rows have other scales."""
        super().register_parameter(name, param)
        if name == "qweight":
            self._set_row_scale(None)
            self._row_scale_of = None

    def _apply(self, fn, recurse: bool = True):
        """Move or cast; the scales move with the rows and stay float32, whatever the model is cast to."""
        kept = self.row_scale
        self._set_row_scale(None)
        try:
            super()._apply(fn, recurse)
        finally:
            # Also where the move was refused or failed: the rows are what they were.
            if kept is not None and kept.device == self.qweight.device:
                self._set_row_scale(kept)
        return self

    def _packed_with_scale(self) -> Packed:
        """Return the rows with the scales that are kept of them, for a call."""
        qweight = self.qweight
        return Packed(qweight, FORMATS[self.format], self.planes, self._kept_row_scale(qweight))

    def _kept_row_scale(self, qweight: Tensor | None = None) -> Tensor | None:
        """Return the scales of the rows as they are now; None where the kernel computes them.

        They are computed anew where the rows changed. `qweight` are this layer's rows, where a caller has looked them up already.

        Compilers see the buffer, which loading and moving keep right. Inside a CUDA graph's capture nothing is kept that would
        lie in the graph's own pool, and an exported program, whose rows can be replaced, computes with these alone.
        """
        if self.compute != "int8":
            return None
        if torch.compiler.is_compiling():
            return None if torch.compiler.is_exporting() else self.row_scale
        qweight = self.qweight if qweight is None else qweight
        state = _state(qweight)
        if state is None:
            return None
        if state != self._row_scale_of:
            if _capturing(qweight.device):
                return None
            self._find_row_scale()
            self._row_scale_of = state
        return self.row_scale

    def _find_row_scale(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            try:
                scale = ops.row_scale(self.packed._replace(data=self.qweight.detach()), self.backend, self.compute)
            except BackendUnavailable:  # the call that needs them says so
                scale = None
            held = self.row_scale
            if scale is not None and held is not None and held.device == scale.device and held.shape == scale.shape:
                held.copy_(scale)  # where CUDA graphs captured before read it
            else:
                self._set_row_scale(scale)
            if scale is not None and scale.device.type == "cuda":
                # The next call may be on a stream that does not wait for this stream.
                torch.cuda.current_stream(scale.device).synchronize()


def _state(qweight: Tensor) -> tuple[int, int] | None:
    """Return what changes when the rows are replaced, moved or written to; None where torch does not tell."""
    if type(qweight) not in (nn.Parameter, Tensor) or qweight.is_meta or qweight.is_inference():
        return None
    return qweight.data_ptr(), qweight._version


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
