"""What a swapped model answers where diffusers or transformers ask for its quantizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import GGUFError
from ..layers.embedding import GGUFEmbedding
from ..layers.fuse import unfuse_projections
from ..layers.linear import GGUFLinear
from ..layers.takeover import carry_over

AttachHook = Callable[[nn.Module], bool]
_library_hook: AttachHook | None = None


class _UnwritableConfig:
    """Refuse save_pretrained: it asks for `quant_method` when it meets a model that it cannot write."""

    @property
    def quant_method(self):
        """Raise GGUFError."""
        raise GGUFError(
            "A model with packed GGUF layers cannot be written with save_pretrained yet. Write a FLUX.1 transformer with "
            "flux_kernels.save_gguf(model, path), a T5 encoder with flux_kernels.save_t5(model, path), any model's state dict with "
            "torch.save(model.state_dict(), path), or call model.dequantize() first."
        )


class SwappedModelQuantizer:
    """Stand in for `model.hf_quantizer`: refuse save_pretrained with a sentence, and dequantize.

    diffusers and transformers write a model without a quantizer as if its state dict could be loaded again, which a
    packed model cannot yet. transformers' `generate` and `Trainer` ask any quantizer the other questions, as attributes.
    """

    is_serializable = False
    # The op has a fake, so a forward compiles without a graph break.
    is_compileable = True
    # Adapters train through packed layers; the packed weights themselves do not.
    is_trainable = True
    is_qat_trainable = False
    requires_calibration = False
    quantization_config = _UnwritableConfig()

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace every packed layer by the plain layer it stands for, in place, and forget the quantizer.

        Args:
            model: the model that this stands in for.
            dtype: of the decoded weights, each layer's own by default (transformers passes it).
        """
        decode_layers(model, dtype)
        del model.hf_quantizer
        return model


def decode_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every packed layer by its plain layer, in place; fused layers come apart first."""
    unfuse_projections(model)
    # The token table has two places in a text encoder.
    plain: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GGUFLinear | GGUFEmbedding):
                if child not in plain:
                    plain[child] = carry_over(child, child.dequantize(dtype))
                setattr(parent, name, plain[child])


def set_attach_hook(hook: AttachHook) -> None:
    """Let a library's own quantizer go before the stand-in; the hook that was set before is forgotten.

    Args:
        hook: gives a model with packed layers its quantizer and returns True; returns False for a model that is not its library's,
            which then gets `SwappedModelQuantizer`.
    """
    global _library_hook
    _library_hook = hook


def attach_quantizer(model: nn.Module) -> None:
    """Give a model that has save_pretrained and packed layers its library's quantizer, or the stand-in."""
    if not hasattr(model, "save_pretrained") or not any(isinstance(module, GGUFLinear) for module in model.modules()):
        return
    if _library_hook is None or not _library_hook(model):
        model.hf_quantizer = SwappedModelQuantizer()  # type: ignore[assignment]
        # .to(dtype) is safe: packed bytes stay uint8.
        model.is_quantized = False  # type: ignore[assignment]
