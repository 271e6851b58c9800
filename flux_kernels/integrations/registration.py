"""Make diffusers know the quantizer; it has no register call, so its two tables are extended."""

from __future__ import annotations


def register() -> None:
    """Enter the quantizer in diffusers' tables and answer for diffusers' models that get packed layers."""
    from diffusers.quantizers import auto

    from ..swap.model_quantizer import set_attach_hook
    from .config import FluxKernelsConfig, Method
    from .quantizer import FluxKernelsQuantizer, attach_diffusers_quantizer

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.FLUX_KERNELS.value] = FluxKernelsConfig
    auto.AUTO_QUANTIZER_MAPPING[Method.FLUX_KERNELS.value] = FluxKernelsQuantizer
    set_attach_hook(attach_diffusers_quantizer)
