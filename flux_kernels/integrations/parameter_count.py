"""Let diffusers' `num_parameters` count weights, not packed bytes."""

from __future__ import annotations

from functools import wraps

from ..layers.linear import GGUFLinear


def count_logical_weights() -> None:
    """Extend ModelMixin.num_parameters, once.

    It sums `numel` over all parameters, and has no hook but one for bitsandbytes. A method of the instance would make a
    reference cycle that keeps a deleted model in memory; so the class gets it. Models without packed layers are not affected.
    """
    from diffusers.models.modeling_utils import ModelMixin

    counted = ModelMixin.num_parameters
    if getattr(counted, "counts_packed", False):
        return

    @wraps(counted)
    def num_parameters(self: ModelMixin, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = counted(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return count
        packed = [module for module in self.modules() if isinstance(module, GGUFLinear)]
        # Parts of fused layers have no rows of their own.
        rows = {id(module.qweight): module for module in packed if "qweight" in module._parameters}
        return count + sum(module.weight.numel() - module.qweight.numel() for module in rows.values())

    num_parameters.counts_packed = True  # type: ignore[attr-defined]
    ModelMixin.num_parameters = num_parameters  # type: ignore[method-assign]
