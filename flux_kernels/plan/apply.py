"""Apply a plan to a 16-bit model on the fly: the plan's tensors as layers of diffusers' model."""

from __future__ import annotations

from torch import nn

from ..errors import FormatError
from ..formats import FORMATS
from ..mixed.plan_file import Plan, check_tensors
from ..models.model_class import architecture_of_model, parameter_shapes
from ..models.names import sources


def for_diffusers(plan: Plan, model: nn.Module) -> dict[str, str]:
    """Map a plan's tensors to layers, as `swap_linear(model, format=...)` takes it.

        fk.swap_linear(model, format=for_diffusers(Plan.load("plan.json"), model))

    Layers that are rows of one tensor of the file (q, k, v; a single block's MLP input) get its type, so that they hold the
    bytes that `flux-kernels quantize --plan` writes. Tensors that the plan leaves plain are left out.

    Args:
        plan: a plan.
        model: the transformer it is for, with plain layers.

    Returns:
        Layer name -> ggml type name.

    Raises:
        FormatError: where the plan names tensors that the model does not have, or low-rank corrections.
    """
    if plan.low_rank:
        raise FormatError(
            f"The plan gives {len(plan.low_rank)} tensors a low-rank correction, which only a file has. Write it with "
            "`flux-kernels quantize --plan` and use load_transformer."
        )
    architecture = architecture_of_model(model)
    if architecture is None:
        raise FormatError(f"A plan is for a transformer that flux_kernels knows, got {type(model).__name__}.")
    shapes = parameter_shapes(model)
    located = sources(architecture, shapes, architecture.main_naming)
    check_tensors(plan.types, {source.tensor for source in located.values()}, "the model")
    return {
        parameter.removesuffix(".weight"): plan.types[source.tensor]
        for parameter, source in located.items()
        if plan.types.get(source.tensor) in FORMATS and len(shapes[parameter]) == 2
    }
