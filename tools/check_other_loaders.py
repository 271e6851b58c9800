"""Open files written here with ComfyUI-GGUF and stable-diffusion.cpp: say what each makes of them.

    python -m tools.check_other_loaders --comfyui CHECKOUT --comfyui-gguf CHECKOUT [--sd-cpp path/to/sd-cli]

A small random model of every architecture is written three times: quantized from diffusers' names and from the original ones,
and with `save_gguf`. ComfyUI's own model runs beside ours, in float32 on the CPU, at the smallest widths that it takes: for
Chroma, Qwen-Image and Z-Image the published ones, so that 12 GB of memory and of disk are needed. ComfyUI's packages for
loading (einops, sentencepiece, torchsde, scipy, aiohttp, pydantic-settings) are installed by hand; mocks stand for others.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

from flux_kernels import load_transformer, save_gguf
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare
from flux_kernels.gguf.file import read_gguf
from flux_kernels.models.architectures import ARCHITECTURES
from flux_kernels.packing import Engine
from flux_kernels.torch_backend import libggml

from .small_models import SMALL, calls, random_model

# Packages that ComfyUI imports at the top and needs for no model here.
STOOD_IN = ("torchvision", "torchaudio", "kornia", "spandrel", "av", "comfy_aimdo", "comfy_kitchen", "blake3", "simpleeval")
# Both compute in float32 from the same weights, in another order of sums: some hundred roundings of 2^-24 each on the way from
# input to output, 5e-6 at the most as measured. A wrong scale, order of rows or position is 1e-2 and more.
CLOSE = 1e-4
# Chroma's class in ComfyUI counts the modulation vectors of the published depth: 3 a single block, 12 a double, 2 at the end.
CHROMA_VECTORS, SMALL_CHROMA_VECTORS = 344, 3 + 12 + 2


def write_files(row: Any, folder: Path) -> list[Path]:
    """Write the small model in each way that flux_kernels writes files."""
    model = random_model(row)
    source = folder / "transformer"
    source.mkdir()
    state = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(state, source / "diffusion_pytorch_model.safetensors")
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    (source / "config.json").write_text(json.dumps({"_class_name": row.model_class, **config}))
    save_gguf(model, folder / "plain.gguf", names=row.main_naming)
    del model, state
    engine: Engine = "libggml" if libggml.available() else "torch"
    paths = [folder / f"{name}.gguf" for name in ("quantized-diffusers-Q8_0", "quantized-original-Q4_K_S", "saved")]
    for path, origin, kind in ((paths[0], source, "Q8_0"), (paths[1], folder / "plain.gguf", "Q4_K_S")):
        prepare(origin, Request(type=kind), provenance=False, device="cpu", engine=engine).write(path)
    save_gguf(load_transformer(paths[0], backend="torch"), paths[2])
    return paths


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a mock in place of a package that loading has no use for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        ours = fullname.split(".")[0] in STOOD_IN
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__, module.__version__ = spec, [], spec.name, "0"
        return module

    def exec_module(self, module: Any) -> None:
        """Leave the mock as it is."""


class ComfyUI:
    """ComfyUI with its GGUF loader, on the CPU."""

    def __init__(self, comfyui: Path, comfyui_gguf: Path) -> None:
        sys.path.insert(0, str(comfyui))
        sys.meta_path.append(StandIn())
        importlib.import_module("comfy.options").enable_args_parsing(True)
        own, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
        self._sd = importlib.import_module("comfy.sd")
        sys.argv = own
        package = types.ModuleType("comfyui_gguf")
        package.__path__ = [str(comfyui_gguf)]
        sys.modules["comfyui_gguf"] = package
        self._loader, self._ops = (importlib.import_module(f"comfyui_gguf.{name}") for name in ("loader", "ops"))
        # The default decodes in 16 bit; the advanced node of ComfyUI-GGUF offers this.
        self._ops.GGMLLayer.dequant_dtype = torch.float32
        forward = importlib.import_module("comfy.ldm.chroma.model").Chroma.forward_orig
        constants = forward.__code__.co_consts
        small = tuple(SMALL_CHROMA_VECTORS if value == CHROMA_VECTORS else value for value in constants)
        forward.__code__ = forward.__code__.replace(co_consts=small)
        self.complaints: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.complaints.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)

    def check(self, name: str, path: Path) -> str:
        """Load a file and run it beside ours; return what came of it."""
        arguments, call = calls(name)
        self.complaints.clear()
        with torch.inference_mode():
            try:
                options = {"custom_operations": self._ops.GGMLOps(), "dtype": torch.float32}
                loaded = self._sd.load_diffusion_model_state_dict(self._loader.gguf_sd_loader(str(path)), model_options=options)
            except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                return f"refused: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if loaded is None or self.complaints:
                return "not recognised" if loaded is None else f"complains: {self.complaints[0]}"
            theirs, kind = call(loaded.model.diffusion_model.eval()), type(loaded.model.model_config).__name__
            del loaded
            ours = load_transformer(path, dtype=torch.float32, backend="torch")(**arguments, return_dict=False)[0]
        ours = ours[0].transpose(0, 1) if isinstance(ours, list) else ours
        difference = ((ours - theirs).norm() / ours.norm()).item()
        return f"{kind}, same to {difference:.1e}" if difference < CLOSE else f"{kind}, DIFFERS by {difference:.1e}"


def stable_diffusion_cpp(program: Path, path: Path) -> str:
    """Let sd-cli name the model and rewrite the file unconverted; compare every tensor's type and bytes."""
    # It stops where the text encoder is missing, after it has named the model.
    named = _run(program, "--diffusion-model", path, "-p", "a")
    version = next((line.rpartition("Version:")[2].strip() for line in named.splitlines() if "Version:" in line), "")
    again = path.with_name("again.gguf")
    again.unlink(missing_ok=True)
    said = _run(program, "-M", "convert", "-m", path, "-o", again)
    if not version or not again.exists():
        return f"refused: {(said if version else named).strip().splitlines()[-1:]}"
    before, after = read_gguf(path).tensors, read_gguf(again).tensors
    kept = [name for name in before.keys() & after.keys() if before[name].data.flatten().equal(after[name].data.flatten())]
    wrong = sorted((before.keys() | after.keys()) - {name for name in kept if before[name].format == after[name].format})
    return f"{version}, DIFFERS in {wrong[:3]}" if wrong else f"{version}, all {len(after)} tensors unchanged"


def _run(*command: Any) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace", check=False)
    return result.stdout + result.stderr


def main() -> int:
    """Print a line a file; return how many files another loader did not take as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--comfyui-gguf", type=Path, required=True, help="a checkout of ComfyUI-GGUF")
    parser.add_argument("--sd-cpp", type=Path, help="stable-diffusion.cpp's sd-cli")
    parser.add_argument("--only", choices=SMALL, action="append", help="an architecture; may be repeated")
    options = parser.parse_args()
    needed = [options.comfyui / "comfy/model_detection.py", options.comfyui_gguf / "loader.py", options.sd_cpp]
    for path in needed:
        if path is not None and not path.is_file():
            parser.error(f"{path} is no file. Name a checkout of ComfyUI, one of ComfyUI-GGUF, and the program sd-cli.")
    comfyui, bad = ComfyUI(options.comfyui, options.comfyui_gguf), 0
    for row in ARCHITECTURES:
        if options.only and row.name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for path in write_files(row, Path(folder)):
                said = [comfyui.check(row.name, path)]
                said += [stable_diffusion_cpp(options.sd_cpp, path)] if options.sd_cpp else []
                bad += any(words.startswith(("refused", "not", "complains")) or "DIFFERS" in words for words in said)
                print(f"{row.name:20}{path.stem:28}{'; '.join(said)}", flush=True)
                gc.collect()
    return bad


if __name__ == "__main__":
    sys.exit(main())
