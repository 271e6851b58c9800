"""What peft's merge and unmerge do on a packed layer: factors go into its branch and come out.

peft merges with `base_layer.weight.data += delta`, which packed bytes cannot take and which would forget that delta has a low
rank. peft's dispatch is open to other classes only through each adapter's config, which diffusers makes itself, so
`install` wraps the two methods of peft's Linear; on any other base layer they do what they did.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..layers.linear import GGUFLinear

_OFFLOADED = "is offloaded to disk, where no branch can be added: fuse before enabling disk offload"


def install() -> None:
    """Teach peft's LoRA layers to merge into packed ones; once, when peft is imported."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if hasattr(Linear.merge, "_flux_kernels"):
        return
    merge, unmerge, check = Linear.merge, Linear.unmerge, LoraModel._check_merge_allowed

    @functools.wraps(merge)
    def merge_or_fuse(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer(), GGUFLinear):
            fuse_layer(self, adapter_names, safe=safe_merge)
        else:
            merge(self, safe_merge=safe_merge, adapter_names=adapter_names)

    @functools.wraps(unmerge)
    def unmerge_or_unfuse(self) -> None:
        if isinstance(self.get_base_layer(), GGUFLinear) and self.merged:
            unfuse_layer(self)
        else:
            unmerge(self)

    @functools.wraps(check)
    def check_packed_layers_too(self) -> None:
        check(self)
        check_fusable(self.model, None)

    weight = vars(BaseTunerLayer)["weight"]

    def logical_weight(self) -> torch.Tensor:
        """Return the weight in logical shape and dtype.

        peft takes `qweight` for it, to whose dtype T5 casts activations.
        """
        base = self.get_base_layer()
        return base.weight if isinstance(base, GGUFLinear) else weight.__get__(self)

    BaseTunerLayer.weight = property(logical_weight)  # type: ignore[assignment, method-assign]
    merge_or_fuse._flux_kernels = True  # type: ignore[attr-defined]
    Linear.merge, Linear.unmerge = merge_or_fuse, unmerge_or_unfuse  # type: ignore[method-assign]
    LoraModel._check_merge_allowed = check_packed_layers_too  # type: ignore[method-assign]


def install_in_diffusers() -> None:
    """Make the fuse_lora of diffusers' models check every packed layer before it touches the first."""
    from diffusers.loaders.peft import PeftAdapterMixin

    original = PeftAdapterMixin.fuse_lora
    if hasattr(original, "_flux_kernels"):
        return

    @functools.wraps(original)
    def fuse_lora(self, lora_scale=1.0, safe_fusing=False, adapter_names=None):
        check_fusable(self, adapter_names, safe=safe_fusing)
        return original(self, lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    fuse_lora._flux_kernels = True  # type: ignore[attr-defined]
    PeftAdapterMixin.fuse_lora = fuse_lora  # type: ignore[method-assign]


def packed_lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, peft layer) of every LoRA layer around a packed one."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), GGUFLinear):
            yield name, module


def check_fusable(model: nn.Module, adapter_names: Iterable[str] | None, *, safe: bool = False) -> None:
    """Raise before anything is changed where an adapter to be fused cannot be.

    Raises:
        FormatError: for a DoRA or another variant, or a packed layer that cannot take a branch now; it names the layer.
        ValueError: with `safe`, for an adapter that holds NaN or infinity, as peft does.
    """
    for name, layer in packed_lora_layers(model):
        chosen = _adapters(layer, adapter_names)
        problem = _problem(layer, chosen)
        if problem is not None:
            raise FormatError(f"{name} {problem}")
        if safe:
            _check_finite(layer, chosen)


def fuse_layer(layer: Any, adapter_names: list[str] | None = None, *, safe: bool = False) -> None:
    """Put the factors of adapters that are not merged yet into the branch of the packed base layer.

    Ranks add up.
    """
    from peft.tuners.tuners_utils import check_adapters_to_merge

    chosen = _adapters(layer, check_adapters_to_merge(layer, adapter_names))
    if not chosen:
        return
    problem = _problem(layer, chosen)
    if problem is not None:
        raise FormatError(f"This layer {problem}")
    with _on_device(layer):
        if safe:
            _check_finite(layer, chosen)
        base = layer.get_base_layer()
        before, parts = base._branch(), [_factors(layer, adapter) for adapter in chosen]
        dtype = base.compute_dtype if before is None else before[0].dtype
        down = torch.cat([*([] if before is None else [before[0]]), *(part[0].to(dtype) for part in parts)])
        up = torch.cat([*([] if before is None else [before[1]]), *(part[1].to(dtype) for part in parts)], 1)
        base.set_low_rank(down, up, trainable=before is not None and before[0].requires_grad)
        layer._fused_rank = getattr(layer, "_fused_rank", 0) + sum(part[0].shape[0] for part in parts)
        _fuse_bias(layer, base, chosen)
    layer.merged_adapters.extend(chosen)


def unfuse_layer(layer: Any) -> None:
    """Take all fused factors out of the branch again: the layer is bit for bit what it was."""
    base, rank = layer.get_base_layer(), getattr(layer, "_fused_rank", 0)
    if getattr(layer, "_requantized", False):
        raise FormatError(
            "The adapters were re-quantized into the packed weight and cannot be taken out. Load the model again."
        )
    if base.rank < rank:
        raise FormatError(
            f"The branch has rank {base.rank}, but rank {rank} was fused: set_low_rank replaced it. Load it again."
        )
    with _on_device(layer):
        keep = base.rank - rank
        if keep:
            trainable = base.low_rank_down.requires_grad
            base.set_low_rank(base.low_rank_down[:keep], base.low_rank_up[:, :keep].contiguous(), trainable=trainable)
        else:
            base.set_low_rank(None, None)
        before = layer.__dict__.pop("_bias_before", None)
        if before is not None:
            base.bias = nn.Parameter(before[0].to(base.bias), requires_grad=base.bias.requires_grad)
    layer._fused_rank = 0
    layer.merged_adapters.clear()


def _adapters(layer: Any, names: Iterable[str] | None) -> list[str]:
    """Return which of the adapters (None: the active ones) this layer has and has not merged."""
    names = layer.active_adapters if names is None else names
    return [name for name in names if name in layer.lora_A and name not in layer.merged_adapters]


def _problem(layer: Any, adapters: list[str]) -> str | None:
    """Return why adapters cannot be fused into this layer, as the rest of a sentence, or None."""
    base = layer.get_base_layer()
    for adapter in adapters:
        if adapter in getattr(layer, "lora_variant", {}):
            kind = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant") or "variant"
            return (
                f"has the {kind} adapter {adapter!r}, which is no low-rank sum and cannot be fused into packed weights. Use it "
                "without fusing, or call model.dequantize() first."
            )
        if layer.lora_bias.get(adapter) and base.bias is None:
            return f"has no bias, and the adapter {adapter!r} has one (lora_bias=True). Use it without fusing."
    hook = getattr(base, "_hf_hook", None)
    if adapters and base.qweight.is_meta and getattr(hook, "offload", False) and not _in_memory(hook):
        return f"{_OFFLOADED}, or remove the hooks first."
    return None


def _in_memory(hook: Any) -> bool:
    """Tell whether accelerate holds the offloaded weights in host memory."""
    weights = getattr(hook.weights_map, "dataset", hook.weights_map)
    return isinstance(weights, dict) or not getattr(weights, "index", None)


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Return down [r, K] and up [N, r], the scale in it, as the adapter holds them."""
    down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return down, (up.float() * layer.scaling[adapter]).to(up.dtype)


def _check_finite(layer: Any, adapters: list[str]) -> None:
    for adapter in adapters:
        if not all(torch.isfinite(factor).all() for factor in _factors(layer, adapter) if not factor.is_meta):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")


def _fuse_bias(layer: Any, base: GGUFLinear, adapters: list[str]) -> None:
    """Add the biases of adapters that have one.

    The bias before is kept in a list, which torch does not register.
    """
    biased = [adapter for adapter in adapters if layer.lora_bias.get(adapter)]
    if not biased:
        return
    layer.__dict__.setdefault("_bias_before", [base.bias.detach().clone()])
    total = sum((layer.lora_B[adapter].bias.detach() * layer.scaling[adapter] for adapter in biased), base.bias.detach())
    base.bias = nn.Parameter(total.to(base.bias), requires_grad=base.bias.requires_grad)


def _on_device(layer: Any):
    """Bring a layer that accelerate offloaded to its device and back, the branch with it."""
    base = layer.get_base_layer()
    if not base.qweight.is_meta or not hasattr(base, "_hf_hook"):
        return nullcontext()
    return _brought(layer, base)


class _brought:
    """Onload around a change, as peft does, and tell accelerate's hook which parameters there are now."""

    def __init__(self, layer: Any, base: GGUFLinear):
        from peft.tuners.tuners_utils import onload_layer

        self.base, self.context = base, onload_layer(layer)

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, *error) -> None:
        hook: Any = self.base._hf_hook
        devices = hook.original_devices
        present = dict(self.base.named_parameters(recurse=False))
        for name in set(devices) - set(present):
            del devices[name]
        devices.update({name: torch.device("cpu") for name in present if name not in devices})
        self.context.__exit__(*error)
