"""One architecture's files as the tests see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Published:
    """A model that its makers published: the file's tensors at their true sizes, and what they say.

    Attributes:
        shapes: original name -> shape in torch order.
        config: the arguments of diffusers' class that are expected, those of `Case.untold` left out.
        tensors: how many there are, and
        parameters: how many weights they hold, both from another source than the shapes.
        title: what a file is called that holds this model and no other of the same tensors.
    """

    shapes: Shapes
    config: Mapping[str, Any]
    tensors: int
    parameters: int
    title: str = "true"


@dataclass(frozen=True, eq=False)
class Case:
    """Describe an architecture for the tests that loop over all of them.

    Attributes:
        name: as errors and `inspect` say it.
        gguf_name: `general.architecture` of files that ComfyUI-GGUF's tools write.
        shapes: of a small file, original name -> shape; the blocks' matrices have whole K-quant blocks.
        config: all arguments of diffusers' class for the small file.
        convert: diffusers' own conversion, from a state dict in original names to one in diffusers'.
        inputs: keyword arguments of the small model's forward, in float32; even numbers of tokens where processes share them.
        published: name of a variant -> its true sizes.
        plain: original names of matrices that published files never quantize.
        extra: original name -> shape of tensors that files carry and the model has no use for.
    """

    name: str
    gguf_name: str
    model_class: str
    shapes: Shapes
    config: Mapping[str, Any]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    published: Mapping[str, Published]
    plain: frozenset[str]
    extra: Shapes = field(default_factory=dict)

    def random_model(self, **config: Any) -> nn.Module:
        """Build the small model with random weights, in float32; `config` goes before the case's own."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.model_class)(**{**self.config, **config}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Some classes begin with zeros, which would hide every error.
                parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1))
                if parameter.dim() == 1:
                    parameter.add_(1)
        return model

    @property
    def quantized(self) -> list[str]:
        """The matrices of the small file that get the file's type."""
        return [name for name, shape in self.shapes.items() if len(shape) == 2 and name not in self.plain]
