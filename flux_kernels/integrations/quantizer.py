"""The quantizer that diffusers' loaders call: empty packed layers, filled as weights come in.

Three sources fill the same empty layers: rows that save_pretrained wrote, rows of a GGUF file as diffusers' own reader hands
them over, and 16-bit weights, which are quantized one at a time on the device they go to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from torch import Tensor, nn

from ..backends import check_activation_dtype, check_runnable
from ..compute import dtype_name
from ..errors import FormatError, GGUFError
from ..formats import BlockFormat, get_format
from ..gguf.check import listed
from ..layers.fuse import offer_fusing
from ..layers.linear import GGUFLinear
from ..layers.takeover import decode_stored, packed_type, plain_bytes, quantize_layer
from ..packing import quantize, quantizer
from ..swap.model_quantizer import decode_layers
from .config import FluxKernelsConfig, Method
from .layer_table import check_writable
from .mapped_pages import page_out
from .parameter_count import count_logical_weights
from .stored_rows import expected_descriptor, holds_rows, in_file_order, without_descriptors

logger = logging.get_logger(__name__)


class FluxKernelsQuantizer(DiffusersQuantizer):
    """Load, save and dequantize diffusers models with packed layers."""

    use_keep_in_fp32_modules = True
    quantization_config: FluxKernelsConfig

    def __init__(self, quantization_config: FluxKernelsConfig, **kwargs):
        """Take a copy of the config, which from then on follows the model.

        Args:
            quantization_config: as the user or config.json has it.
            kwargs: `pre_quantized`: whether the checkpoint has packed rows.
        """
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.stored = self.pre_quantized
        # diffusers lets only such a checkpoint have other shapes than the model.
        self.pre_quantized = True
        self.modules_to_not_convert = quantization_config.modules_to_not_convert or []
        self._dtype = torch.float32
        self._progress: Any = None
        self._total: int | None = None
        count_logical_weights()

    def validate_environment(self, *args, device_map: Any = None, **kwargs) -> None:
        """Refuse what cannot work before any file is read."""
        if not self.stored and self.quantization_config.format is None:
            raise FormatError(_NO_FORMAT)
        if not self.stored and isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ValueError(
                "Layers cannot be quantized on their way to the disk. Load without a disk in device_map, call save_pretrained, "
                "and load what it wrote with this device_map."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype asked for, or the one the model was saved in, or float32 as elsewhere in diffusers."""
        self._dtype = torch_dtype or self.quantization_config.torch_dtype or torch.float32
        check_activation_dtype(self._dtype, "torch_dtype")
        return self._dtype

    def update_missing_keys(self, model, missing_keys: list[str], prefix: str) -> list[str]:
        """Leave out the half of a packed layer's (rows, descriptor) that a checkpoint of the other kind lacks."""
        missing = set(missing_keys)
        twins = {f"{name}.{a}": f"{name}.{b}" for name in _packed(model) for a, b in (_ROWS_AND_WEIGHT, _ROWS_AND_WEIGHT[::-1])}
        return [key for key in missing_keys if key not in twins or twins[key] in missing]

    @property
    def supports_parallel_loading(self) -> bool:
        """Quantizing uses all cores already."""
        return self.stored

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Leave out the descriptors.

        Raises:
            GGUFError: for rows where there is no model to put them in, as in from_single_file.
        """
        if not holds_rows(state_dict):
            return state_dict
        if self._total is None:
            raise GGUFError("This file was written by save_pretrained. Load its folder with from_pretrained instead.")
        return without_descriptors(state_dict)

    def _process_model_before_weight_loading(
        self, model, device_map=None, keep_in_fp32_modules: Iterable[str] = (), state_dict=None, **kwargs
    ) -> None:
        """Put empty packed layers where the config or the GGUF file says so.

        Every layer is checked before the first is touched.
        """
        self.keep_in_fp32 = set(filter(None, keep_in_fp32_modules))
        from_table = self.stored and state_dict is None
        excluded = [] if from_table else [*self.modules_to_not_convert, *self.keep_in_fp32]
        plans, unfit = {}, {}
        for name, module in model.named_modules(remove_duplicate=False):
            format = None if type(module) is not nn.Linear else self._format_of(name, state_dict or {})
            if format is None or any(stands_for(entry, name) for entry in excluded):
                continue
            if module.in_features % format.block_size:
                unfit[name] = f"{name} (K={module.in_features}, {format.name} needs K % {format.block_size} == 0)"
                continue
            plans[name] = (module, format)
        if unfit and from_table:
            raise FormatError(f"config.json does not fit the model: {', '.join(unfit.values())}.")
        if not plans and self.quantization_config.format is None:
            raise FormatError(_NO_FORMAT)
        self._check(plans)
        self._total = len(plans)
        self._put(model, plans)
        self._add_extra_parameters(model)
        if unfit:
            logger.warning(f"Left in {dtype_name(self._dtype)}: {', '.join(unfit.values())}.")

    def _format_of(self, name: str, state_dict: Mapping[str, Any]) -> BlockFormat | None:
        """Return the type of a layer: that of its rows in a GGUF file, or what the config says."""
        weight = state_dict.get(f"{name}.weight")
        if weight is not None and hasattr(weight, "quant_type"):
            row = packed_type(weight, name)
            if isinstance(row, BlockFormat):
                return row
        format = self.quantization_config.format_of(name)
        return None if format is None else get_format(format)

    def _check(self, plans: Mapping[str, tuple[nn.Linear, BlockFormat]]) -> None:
        config = self.quantization_config
        for name, (module, format) in plans.items():
            backend, compute = config.backend_of(name), config.compute_of(name)
            check_runnable(backend, compute, torch.device("cpu"), format, module.in_features)
            if not self.stored:
                quantizer(format)

    def _put(self, model: nn.Module, plans: Mapping[str, tuple[nn.Linear, BlockFormat]]) -> None:
        config = self.quantization_config
        # By the old layer: one that has two places in the model stays one.
        layers: dict[nn.Module, nn.Module] = {}
        for name, (module, format) in plans.items():
            if module not in layers:
                layer = quantize_layer(module, format.name, config.backend_of(name), config.compute_of(name))
                layer.compute_dtype = self._dtype
                layers[module] = layer
            model.set_submodule(name, layers[module])

    def _add_extra_parameters(self, model: nn.Module) -> None:
        """Make room for what packed layers were saved with, such as a low-rank branch."""
        for name, (dtype, *shape) in (self.quantization_config.extra_parameters or {}).items():
            layer, _, kind = name.rpartition(".")
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            setattr(model.get_submodule(layer), kind, nn.Parameter(empty, requires_grad=False))

    def check_if_quantized_param(self, model, param_value, param_name: str, state_dict, **kwargs) -> bool:
        """Tell whether a parameter is rows, weight or descriptor of a packed layer, or packed in a GGUF file."""
        module, kind = _owner(model, param_name)
        return hasattr(param_value, "quant_type") or (isinstance(module, GGUFLinear) and kind in _ROWS_AND_WEIGHT)

    def check_quantized_param_shape(self, *args, **kwargs) -> bool:
        """Leave the check to create_quantized_param, which knows the model."""
        return True

    def create_quantized_param(  # type: ignore[override]
        self, model, param_value: Tensor, param_name: str, target_device, state_dict=None, unexpected_keys=None, **kwargs
    ) -> None:
        """Fill one parameter of a packed layer, or a plain one that is packed in a GGUF file."""
        module, kind = _owner(model, param_name)
        if not isinstance(module, GGUFLinear) or kind not in _ROWS_AND_WEIGHT:
            wide = self.keep_in_fp32 & set(param_name.split("."))
            value = decode_stored(param_value, param_name, torch.float32 if wide else self._dtype).to(target_device)
            shape = getattr(module, kind).shape
            if value.shape != shape:
                raise GGUFError(f"{param_name} has shape {list(value.shape)}, the model needs {list(shape)}.")
            setattr(module, kind, nn.Parameter(value, requires_grad=getattr(module, kind).requires_grad))
        elif kind == "qweight":
            self._fill(module, param_name, param_value, target_device)
        elif hasattr(param_value, "quant_type") and packed_type(param_value, param_name).name == module.format:
            self._fill(module, param_name, plain_bytes(param_value), target_device)
        elif hasattr(param_value, "quant_type"):
            self._quantize(module, param_name, decode_stored(param_value, param_name, self._dtype), target_device)
        elif param_value.dtype == torch.int64:
            self._check_descriptor(module, param_name, param_value)
        else:
            self._quantize(module, param_name, param_value, target_device)
            # So that the 16-bit model is never in memory as a whole.
            page_out((state_dict or {}).get(param_name, param_value))

    def _fill(self, layer: GGUFLinear, name: str, rows: Tensor, device) -> None:
        if rows.dtype != torch.uint8 or rows.shape != layer.qweight.shape:
            raise GGUFError(
                f"{name} is {rows.dtype} {list(rows.shape)}; {layer.format} rows of this layer are uint8 "
                f"{list(layer.qweight.shape)}. The file does not belong to the model or its config.json."
            )
        layer.qweight = nn.Parameter(rows.to(device), requires_grad=False)
        layer.arrange()

    def _check_descriptor(self, layer: GGUFLinear, name: str, descriptor: Tensor) -> None:
        if descriptor.tolist() != expected_descriptor(layer):
            raise GGUFError(
                f"{name} describes [ggml type, N, K, planes] {descriptor.tolist()}, config.json {expected_descriptor(layer)}. "
                "Both are written by save_pretrained; get them from one place."
            )

    def _quantize(self, layer: GGUFLinear, name: str, weight: Tensor, device) -> None:
        if weight.shape != layer.weight.shape:
            raise GGUFError(f"{name} has shape {list(weight.shape)}, the model needs {list(layer.weight.shape)}.")
        if self._progress is None:
            self._progress = logging.tqdm(total=self._total, desc="Quantizing", unit="layer")
        self._fill(layer, name, quantize(weight.to(device), layer.format, name=name), device)
        self._progress.update()

    def _process_model_after_weight_loading(self, model, **kwargs):
        """Check that every packed layer was filled, and let the config describe the model."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        empty = [name for name, layer in _packed(model).items() if layer.qweight.is_meta and not hasattr(layer, "_hf_hook")]
        if empty:
            raise GGUFError(f"The checkpoint holds no weight for {listed(empty, 3)}. It is incomplete; get it again.")
        offer_fusing(model)
        self.quantization_config.follow(model)
        model.register_to_config(quantization_config=self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, state_dict: dict[str, Any], safe_serialization: bool = False):
        """Return the state dict with all rows in the order of GGUF files, and no metadata."""
        config = self.quantization_config
        return in_file_order(state_dict, config.format_of, config.extra_parameters or ()), {}

    def _dequantize(self, model):
        """Decode every packed layer, and forget the config."""
        decode_layers(model)
        model._internal_dict = type(model._internal_dict)(
            {key: value for key, value in model._internal_dict.items() if key != "quantization_config"}
        )
        vars(model).pop("quantization_method", None)
        return model

    @property
    def is_serializable(self) -> bool:
        """Yes; raise ValueError where adapters or fused projections are in the way."""
        if self.quantization_config.model is not None:
            check_writable(self.quantization_config.model)
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed layers can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed layers are one custom op."""
        return True


_ROWS_AND_WEIGHT = ("qweight", "weight")
_NO_FORMAT = (
    'FluxKernelsConfig needs a type to quantize 16-bit weights to, such as FluxKernelsConfig(format="Q4_K") or a map of '
    "fnmatch pattern -> type. Only GGUF files bring their own."
)


def stands_for(entry: str, name: str) -> bool:
    """Tell whether an entry of modules_to_not_convert stands for a layer.

    It is a name that the layer's ends in, one of a module that holds the layer, or a pattern.
    """
    return f"{entry}." in f"{name}." or fnmatchcase(name, entry)


def attach_diffusers_quantizer(model: nn.Module) -> bool:
    """Give a diffusers model that no loader packed its quantizer; return whether it is one of diffusers'."""
    from diffusers import ModelMixin

    if not isinstance(model, ModelMixin):
        return False
    # Its attributes come from several mixins.
    mixin: Any = model
    if not isinstance(getattr(model, "hf_quantizer", None), FluxKernelsQuantizer):
        mixin.hf_quantizer = FluxKernelsQuantizer(FluxKernelsConfig())
        # .to(dtype) is safe: packed bytes stay uint8.
        mixin.is_quantized = False
        mixin.quantization_method = Method.FLUX_KERNELS
    config = mixin.hf_quantizer.quantization_config
    config.follow(model)
    mixin.register_to_config(quantization_config=config)
    return True


def _packed(model: nn.Module) -> dict[str, GGUFLinear]:
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, GGUFLinear)}


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    module, _, kind = parameter.rpartition(".")
    return model.get_submodule(module), kind
