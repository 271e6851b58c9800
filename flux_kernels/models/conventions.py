"""What files of FLUX.1 have by convention: an architecture, a file type, a matrix that is never BF16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from .types import BLOCK, file_type, tensor_kind

# Also of Chroma and FLUX.2 files; readers go by the tensors.
ARCHITECTURE = "flux"
# In BF16, diffusers takes its bytes for columns, and the file for FLUX.1-Depth.
IMAGE_INPUT = "img_in.weight"


def main_file_type(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return llama.cpp's number of the type that most weights of the block matrices have, or None.

    Args:
        types: tensor name (either naming, without prefix) -> ggml type name.
        shapes: tensor name -> shape in torch order.
    """
    weights: Counter[str] = Counter()
    for name, type_name in types.items():
        if tensor_kind(name, shapes[name]) == BLOCK:
            weights[type_name] += prod(shapes[name])
    return file_type(weights.most_common(1)[0][0]) if weights else None
