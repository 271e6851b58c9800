"""`flux-kernels generate`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Offload(str, Enum):
    """Name the ways to spread a pipeline over GPU and CPU memory."""

    none = "none"
    model = "model"
    sequential = "sequential"
    auto = "auto"


class Dtype(str, Enum):
    """Name the dtypes to compute in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def generate(
    gguf: Annotated[Path, typer.Option(help="The FLUX.1 transformer, a GGUF file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder in the diffusers layout with text encoders, tokenizers, VAE and scheduler; its transformer is not "
            "read. The embedded model's own by default, which fits files made by `demo`."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG to write; the parameters are stored inside it.")] = Path("out.png"),
    negative: Annotated[str | None, typer.Option(help="What not to draw; doubles the time.")] = None,
    true_cfg: Annotated[float, typer.Option(help="Strength of the negative prompt.")] = 4.0,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels; 1024 by default, rounded down to 16.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels; 1024 by default, rounded down to 16.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; 28 by default, 4 for schnell.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance; 3.5 by default, none for schnell.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; it is drawn on the CPU, the same everywhere.")] = 0,
    offload: Annotated[
        Offload, typer.Option(help="none, model or sequential; auto takes the first that fits the GPU's free memory.")
    ] = Offload.auto,
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:SCALE, .safetensors; give it several times.")] = None,
    backend: Annotated[str, typer.Option(help="auto, triton or torch.")] = "auto",
    compute: Annotated[str, typer.Option(help="exact, fp16_accumulate or int8: less exact, meant to be faster.")] = "exact",
    dtype: Annotated[Dtype, typer.Option(help="Of activations, text encoders and VAE.")] = Dtype.bfloat16,
    report: Annotated[bool, typer.Option("--report", help="Show what was done with each layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON, for machines.")] = False,
) -> None:
    """Draw an image with your own GGUF file. Everything is local: nothing is downloaded.

    [bold]Examples[/]

      flux-kernels generate --gguf flux1-dev-Q4_K_S.gguf --base FLUX.1-dev -p "a lighthouse in a storm"
      flux-kernels generate --gguf flux1-schnell-Q8_0.gguf --base FLUX.1-schnell -p "a fox" --width 768 --seed 7
      flux-kernels generate --gguf dev-Q6_K.gguf --base FLUX.1-dev -p "a fox" --lora style.safetensors:0.8 --offload model
      flux-kernels generate --gguf demo-Q4_K.gguf -p "a red seven"
    """
    from ..base_pipeline import go_offline_quietly

    console = Console(stderr=as_json)
    with console.status("loading torch and diffusers"):
        go_offline_quietly()
        import torch

        from .. import generate as work
        from ..embedded import embedded_model_path
    request = work.Request(
        gguf=gguf,
        base=base or embedded_model_path(),
        prompt=prompt,
        negative=negative,
        true_cfg=true_cfg,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        seed=seed,
        offload=offload.value,
        loras=[work.Lora.parse(text) for text in lora or ()],
        backend=backend,
        compute=compute,
        dtype=getattr(torch, dtype.value),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking files", total=None)
        made = work.generate(
            request,
            status=lambda text: progress.update(task, description=text),
            step=lambda done, total: progress.update(task, completed=done, total=total),
        )
    work.save_png(made, out)
    if as_json:
        done = {"offload": made.offload, "load_seconds": made.load_seconds, "draw_seconds": made.draw_seconds}
        typer.echo(json.dumps({"out": str(out), **made.parameters, **done}))
        return
    lines = str(made.report).splitlines()
    console.print("\n".join(lines if report else lines[-1:]), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{out}[/]: {made.image.width} x {made.image.height}, {made.parameters['num_inference_steps']} steps in "
        f"{made.draw_seconds:.1f} s after {made.load_seconds:.1f} s of loading; offload {made.offload}, seed {seed}",
        soft_wrap=True,
    )
