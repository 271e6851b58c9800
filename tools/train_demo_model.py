"""Train the embedded model and write it as a diffusers pipeline directory.

    pip install -c constraints.txt -e ".[train]"
    python tools/train_demo_model.py --work out/demo_model

The result replaces flux_kernels/demo_model (README.md there stays). About one hour on two CPU cores.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo_model import autoencoder, export, flow, pictures, reader, text

from flux_kernels.compute import dtype_name
from flux_kernels.files import written_whole
from flux_kernels.generation.embedded import PIPELINE_KWARGS

_HOME = Path(__file__).resolve().parent.parent / "flux_kernels" / "demo_model"
_READER_SHARE = 0.8
console = Console()


def _keep(path: Path, make: Callable[[], Any]) -> Any:
    """Return what `path` holds, or make it and write it whole, so that a stage is done once."""
    if not path.exists():
        stage = make()
        with written_whole(path) as part:
            torch.save(stage, part)
    return torch.load(path, weights_only=False)


class _Stages:
    """Runs the stages in turn, each with a progress bar, each kept in the work folder."""

    def __init__(self, work: Path, seed: int, progress: Progress) -> None:
        self.work, self.seed, self.progress = work, seed, progress
        work.mkdir(parents=True, exist_ok=True)

    def bar(self, title: str, total: int) -> Callable[..., None]:
        task = self.progress.add_task(title, total=total, note="")

        def report(step: int, value: float | None = None) -> None:
            note = "" if value is None else f"loss {value:.4f}"
            self.progress.update(task, completed=step, note=note)

        return report

    def digits(self) -> pictures.Digits:
        kept = _keep(self.work / "digits.pt", lambda: tuple(pictures.keep_legible(pictures.load_digits())))
        return pictures.Digits(*kept)

    def trained_vae(self, digits: pictures.Digits, steps: int) -> autoencoder.AutoencoderKL:
        torch.manual_seed(self.seed)
        vae = autoencoder.build()

        def make() -> dict[str, torch.Tensor]:
            autoencoder.train(vae, digits, steps=steps, batch=32, seed=self.seed, report=self.bar("autoencoder", steps))
            return vae.state_dict()

        vae.load_state_dict(_keep(self.work / "vae.pt", make))
        return vae

    def latents(self, vae: autoencoder.AutoencoderKL, digits: pictures.Digits, copies: int) -> autoencoder.Latents:
        report, done = self.bar("latents", copies * len(digits.labels)), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done)

        def make() -> tuple:
            encoded = autoencoder.encode(vae, digits, copies=copies, seed=self.seed, report=advance)
            return (*encoded, vae.config.scaling_factor, vae.config.shift_factor)

        *encoded, scale, shift = _keep(self.work / "latents.pt", make)
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        return autoencoder.Latents(*encoded)

    def text_side(self, steps: int) -> text.TextSide:
        side = text.build(self.seed)

        def make() -> list[dict[str, torch.Tensor]]:
            text.train(side, steps=steps, seed=self.seed, report=self.bar("text encoders", steps))
            return [side.text_encoder.state_dict(), side.text_encoder_2.state_dict()]

        clip, t5 = _keep(self.work / "text.pt", make)
        side.text_encoder.load_state_dict(clip)
        side.text_encoder_2.load_state_dict(t5)
        return side

    def digit_reader(self, steps: int) -> tuple[dict, float]:
        """Train the reader on 80 % of all digits; return weights and the share read right of the rest."""

        def make() -> tuple[dict, float]:
            every = pictures.load_digits()
            order = torch.randperm(len(every.labels), generator=torch.Generator().manual_seed(self.seed))
            cut = int(_READER_SHARE * len(order))
            seen, unseen = (pictures.Digits(every.pixels[i], every.labels[i]) for i in (order[:cut], order[cut:]))
            weights = reader.train(seen, steps=steps, seed=self.seed, report=self.bar("digit reader", steps))
            generator = torch.Generator().manual_seed(self.seed + 1)
            drawn = pictures.draw(unseen.pixels, unseen.labels % 9, generator)
            return weights, (reader.read(weights, drawn) == unseen.labels).float().mean().item()

        return _keep(self.work / "reader.pt", make)


def _write(stages: _Stages, pipeline: export.FluxPipeline, weights: dict, out: Path) -> dict[str, Any]:
    """Save the pipeline in the 16-bit type that loses less, load it and measure it; return the facts."""
    losses = {dtype: export.rounding_loss(pipeline.transformer, dtype) for dtype in (torch.float16, torch.bfloat16)}
    stored = min(losses, key=losses.__getitem__)
    settings = dict(PIPELINE_KWARGS)
    facts: dict[str, Any] = {"rounding_loss": {str(k): v for k, v in losses.items()}, "stored": str(stored)}
    facts["trained"] = export.score(pipeline, weights, rounds=2, seed=1, settings=settings)._asdict()
    export.save(pipeline, weights, stored, out)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = export.FluxPipeline.from_pretrained(out, torch_dtype=dtype, local_files_only=True)
        loaded.set_progress_bar_config(disable=True)
        facts[f"computed in {dtype}"] = export.score(loaded, weights, rounds=2, seed=1, settings=settings)._asdict()
        export.contact_sheet(loaded, seed=7, settings=settings).save(stages.work / f"sheet_{dtype_name(dtype)}.png")
    facts["bytes"] = export.size(out)
    return facts


def main(
    work: Annotated[Path, typer.Option(help="Folder for checkpoints; run again with the same folder to go on.")],
    out: Annotated[Path, typer.Option(help="Pipeline directory to replace.")] = _HOME,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    vae_steps: Annotated[int, typer.Option(help="Autoencoder steps of 32 pictures.")] = 1200,
    text_steps: Annotated[int, typer.Option(help="Text encoder steps of 128 prompts.")] = 200,
    reader_steps: Annotated[int, typer.Option(help="Digit reader steps of 128 pictures.")] = 1500,
    copies: Annotated[int, typer.Option(help="How often each digit is drawn, in other colours and placements.")] = 5,
    steps: Annotated[int, typer.Option(help="Flow-matching steps.")] = 1500,
    distil_steps: Annotated[int, typer.Option(help="Guidance distillation steps, after the flow-matching steps.")] = 250,
    batch: Annotated[int, typer.Option(help="Pictures in a transformer step.")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads; as many as cores are free.")] = 2,
) -> None:
    """Train the embedded model: a FluxPipeline of 5 M parameters that draws neon digits.

    Stages: pick legible MNIST digits, train the autoencoder, encode, train the text encoders, train the transformer
    with flow matching, distill classifier-free guidance into its guidance input, train the digit reader that judges
    the result, save in 16 bit. Each stage is kept in WORK and not repeated. The transformer saves a checkpoint every
    50 steps. To train one stage anew, delete its file; to see the whole chain in a minute, give every --*steps 20.
    """
    torch.set_num_threads(threads)
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        stages = _Stages(work, seed, progress)
        began = time.monotonic()
        digits = stages.digits()
        vae = stages.trained_vae(digits, vae_steps)
        latents = stages.latents(vae, digits, copies)
        side = stages.text_side(text_steps)
        weights, unseen = stages.digit_reader(reader_steps)
        plan = flow.Plan(steps, distil_steps, batch, seed)
        report = stages.bar("transformer", steps + distil_steps)
        model, loss, seconds = flow.train(plan, latents, text.embed(side), work / "flow.pt", report)
    facts = _write(stages, export.assemble(model, vae, side), weights, out)
    facts |= {"flow_loss": loss, "flow_seconds": seconds, "reader_on_unseen_handwriting": unseen}
    facts |= {"psnr_db": autoencoder.peak_signal_to_noise(vae.float(), digits, seed=1), "plan": plan._asdict()}
    facts["seconds_this_run"] = time.monotonic() - began
    (work / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    console.print_json(data=facts)


if __name__ == "__main__":
    typer.run(main)
