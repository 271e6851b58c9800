"""`flux-kernels generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn

from ..generation.memory_plan import OFFLOADS
from ..report.amounts import counted
from ._options import DTYPES, one_of
from ._progress import progress

_FILES, _PICTURE, _IMAGES, _RUN, _OUTPUT = "Files", "The picture", "Pictures to start from", "How it runs", "Output"


def generate(
    gguf: Annotated[
        Path, typer.Option(help="The transformer, a GGUF file: FLUX.1, Qwen-Image, Z-Image and others.", rich_help_panel=_FILES)
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.", rich_help_panel=_PICTURE)],
    base: Annotated[
        Path | None,
        typer.Option(
            help="The file's own model as a folder in the diffusers layout: text encoders, tokenizers, VAE and scheduler; its "
            "transformer is not read. The embedded model's own by default, which fits files made by `demo`.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    t5: Annotated[
        Path | None,
        typer.Option(
            "--t5",
            help="The T5 encoder of FLUX.1, Chroma or SD3, a GGUF file; --base then needs no folder of it.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE or FILE:SCALE, .safetensors; give it several times.", rich_help_panel=_FILES),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What not to draw; doubles the time. FLUX.2 takes none.", rich_help_panel=_PICTURE)
    ] = None,
    true_cfg: Annotated[
        float | None,
        typer.Option(
            help="Strength of FLUX.1's negative prompt, 4 by default; with other models --guidance is.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=16, help="Pixels, rounded down to 16; 1024 or as the input picture by default.", rich_help_panel=_PICTURE
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels, as --width.", rich_help_panel=_PICTURE)] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps; the model's own by default: 28 for FLUX.1-dev, 4 for schnell, 50 for Qwen-Image.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance; the model's own by default: 3.5 for FLUX.1-dev, 2.5 Kontext, 30 Fill and Canny, 10 Depth, none for "
            "schnell, 4 Qwen-Image, none for Z-Image-Turbo. Z-Image and Krea 2 guide from 0 upwards, others from 1.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**64 - 1,
            help="Seed of the noise; it is drawn on the CPU, the same everywhere.",
            rich_help_panel=_PICTURE,
        ),
    ] = 0,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Picture to edit (Kontext), repaint (Fill) or redraw (dev, with --strength).", rich_help_panel=_IMAGES
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where Fill shall repaint --image, black where not.", rich_help_panel=_IMAGES)
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(help="Edges or a depth map to draw along (Canny, Depth).", rich_help_panel=_IMAGES)
    ] = None,
    kontext: Annotated[
        bool,
        typer.Option(
            "--kontext", help="The file is a Kontext; needed where its name does not say so.", rich_help_panel=_IMAGES
        ),
    ] = False,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="How much a dev file changes --image: 0.3 little, 0.9 much.", rich_help_panel=_IMAGES
        ),
    ] = None,
    offload: Annotated[
        str,
        one_of(
            OFFLOADS,
            "What stays on the GPU: none offloads nothing, model keeps one model at a time there, group and sequential one "
            "layer; auto takes the first that fits the free memory and says why.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    pin: Annotated[
        bool,
        typer.Option(
            "--pin",
            help="Pin host memory for group and sequential offload: faster copies, but all weights must fit in RAM.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    backend: Annotated[str, typer.Option(help="auto, triton or torch.", rich_help_panel=_RUN)] = "auto",
    compute: Annotated[
        str,
        typer.Option(
            help="exact, fp16_accumulate or int8: less exact, meant to be faster on GeForce cards (not measured there); on an "
            "H200 int8 is slower than exact.",
            rich_help_panel=_RUN,
        ),
    ] = "exact",
    dtype: Annotated[str, one_of(DTYPES, "Of activations, text encoders and VAE: {}.", rich_help_panel=_RUN)] = "bfloat16",
    out: Annotated[
        Path, typer.Option(help="PNG to write; the parameters are stored inside it.", rich_help_panel=_OUTPUT)
    ] = Path("out.png"),
    force: Annotated[bool, typer.Option("--force", help="Replace a picture that exists.", rich_help_panel=_OUTPUT)] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Show what was done with each layer.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was done as JSON, for machines.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Draw an image with your own GGUF file. Everything is local: nothing is downloaded.

    The file decides what can be done: every model but Wan, which makes videos, draws from text. Of FLUX.1, Fill repaints, Canny
    and Depth draw along lines, Kontext edits.

    [bold]Examples[/]

      flux-kernels generate --gguf flux1-dev-Q4_K_S.gguf --base FLUX.1-dev -p "a lighthouse in a storm"
      flux-kernels generate --gguf flux1-schnell-Q8_0.gguf --base FLUX.1-schnell -p "a fox" --width 768 --seed 7
      flux-kernels generate --gguf qwen-image-Q4_K_S.gguf --base Qwen-Image -p "a fox" --negative "rain" --steps 30
      flux-kernels generate --gguf dev-Q4_K_S.gguf --t5 t5-v1_1-xxl-encoder-Q8_0.gguf --base FLUX.1-dev -p "a fox"
      flux-kernels generate --gguf dev-Q6_K.gguf --base FLUX.1-dev -p "a fox" --lora style.safetensors:0.8 --offload model
      flux-kernels generate --gguf flux1-kontext-Q4_K_S.gguf --base FLUX.1-dev -p "make it night" --image day.png
      flux-kernels generate --gguf flux1-fill-Q6_K.gguf --base FLUX.1-dev -p "a hat" --image man.png --mask head.png
      flux-kernels generate --gguf flux1-depth-Q6_K.gguf --base FLUX.1-dev -p "a robot" --control-image depth.png
      flux-kernels generate --gguf demo-Q4_K.gguf -p "a red seven"
    """
    console = Console(stderr=as_json)
    with console.status("loading torch and diffusers"):
        from ..generation import generate as work
        from ..generation.embedded import embedded_model_path, words_note
        from ..generation.request import Lora, Request
    request = Request(
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
        t5=t5,
        image=image,
        mask=mask,
        control_image=control_image,
        kontext=kontext,
        strength=strength,
        offload=offload,
        pin=pin,
        loras=[Lora.parse(text) for text in lora or ()],
        backend=backend,
        compute=compute,
        dtype=DTYPES[dtype],
    )
    work.check_out(out, request, force)
    with progress(console, MofNCompleteColumn()) as bar:
        task = bar.add_task("checking files", total=None)
        drawing = work.generate(
            request,
            status=lambda text: bar.update(task, description=text),
            step=lambda done, total: bar.update(task, completed=done, total=total),
        )
    work.save_png(drawing, out)
    if request.embedded and (note := words_note(prompt, negative or "")):
        console.print(f"[yellow]Note:[/] {escape(note)} --base names the folder of another model.", soft_wrap=True)
    for line in drawing.notes:
        console.print(f"[yellow]Note:[/] {escape(line)}", soft_wrap=True)
    if as_json:
        done = {
            "notes": drawing.notes,
            "offload": drawing.plan.offload,
            "offload_reason": drawing.plan.sentence,
            "load_seconds": drawing.load_seconds,
            "draw_seconds": drawing.draw_seconds,
        }
        typer.echo(json.dumps({"out": str(out), **drawing.parameters, **done}))
        return
    lines = str(drawing.report).splitlines()
    console.print("\n".join(lines if report else lines[-1:]), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{out}[/]: {drawing.image.width} x {drawing.image.height}, "
        f"{counted(drawing.parameters['num_inference_steps'], 'step')} in {drawing.draw_seconds:.1f} s after "
        f"{drawing.load_seconds:.1f} s of loading; {drawing.task}, seed {seed}",
        soft_wrap=True,
    )
    console.print(f"[dim]{drawing.plan.sentence[0].upper()}{drawing.plan.sentence[1:]}[/]", highlight=False, soft_wrap=True)
