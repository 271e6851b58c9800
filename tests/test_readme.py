"""Lines of README.md that people copy work as they stand there, in their order."""

from __future__ import annotations

import re
from pathlib import Path

import flux_kernels as fk
from flux_kernels.generation.embedded import embedded_transformer

README = (Path(fk.__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_a_model_swapped_with_the_map_of_types_can_be_saved(tmp_path, monkeypatch):
    """Parts that a GGUF file holds as one tensor get one type by that map."""
    lines = [line.strip() for line in README.splitlines()]
    swap = next(index for index, line in enumerate(lines) if re.match(r"fk\.swap_linear\(model, format=\{", line))
    save = lines[swap + 1]
    assert save.startswith("fk.save_gguf(model,"), save
    monkeypatch.chdir(tmp_path)
    names = {"fk": fk, "model": embedded_transformer()}
    for line in (lines[swap].replace("Q4_K", "Q4_0"), save):  # of as many bits, and made in a fraction of the time
        exec(line, names)  # noqa: S102 - of our own README
    (file,) = tmp_path.iterdir()
    assert {tensor.format for tensor in fk.read_gguf(file).tensors.values()} >= {"Q8_0", "Q4_0"}
