"""`flux-kernels measure`."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskProgressColumn
from rich.table import Table

from ..report.amounts import counted
from ._options import DTYPES, comma_separated, one_of
from ._own_command import own_command
from ._progress import progress

# Tensors in the table on the screen.
_SHOWN = 10
# With fewer, a correction fits the states themselves: 6 states and rank 8 cost 9 times as much on others.
_STATES_A_RANK = 4


def measure(
    out: Annotated[Path, typer.Option(help="Cost table to write (CSV); logs, states and importance go to its folder.")] = Path(
        "costs.csv"
    ),
    model: Annotated[
        Path | None,
        typer.Option(help="16-bit transformer: safetensors file or diffusers folder. Without it the embedded model."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="16-bit transformer as a GGUF file (F16 or BF16).")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Diffusers folder with text encoders and VAE, to capture states with.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line: what the model is used for.")] = None,
    states: Annotated[
        int | None, typer.Option(min=1, help="States to capture: one random step of one picture each; 64 by default.")
    ] = None,
    states_file: Annotated[
        Path | None, typer.Option(help="Captured states; made if it is not there. Default: in the folder of --out.")
    ] = None,
    sizes: Annotated[str, typer.Option(help="Picture sizes to choose from: 1024x1024,832x1216. Default: the model's.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the runs; the model's own number by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the choices and the first picture's noise; 0 by default.")] = None,
    types: Annotated[
        str,
        typer.Option(help="ggml types, comma-separated; Q4_K+r16 has a low-rank correction. Default: Q8_0 to Q2_K, 13 types."),
    ] = "",
    imatrix: Annotated[
        Path | None, typer.Option(help="Ready importance matrices; collected from the states by default.")
    ] = None,
    weighted: Annotated[
        bool, typer.Option("--importance/--no-importance", help="Weigh the quantizers' errors by importance.")
    ] = True,
    plan: Annotated[
        Path | None, typer.Option(help="Measure this plan as a whole, instead of single tensors; costs do not add.")
    ] = None,
    dtype: Annotated[
        str | None,
        one_of(
            DTYPES,
            "{} to compute in. Default: float32 on a CPU, bfloat16 on a GPU, whose own rounding hides costs below about 1e-5.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... Default: this process's GPU, or the CPU.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")] = False,
) -> None:
    """Measure what every type costs for every tensor of your 16-bit model, for `plan` to choose from.

    Pictures are drawn from your prompts, each up to a random step. Then one tensor at a time is quantized, and the error of
    the model's velocity on those states is its cost. Importance matrices are collected on the way. Every result is logged:
    the same command goes on where it was stopped.

    [bold]Examples[/]

      flux-kernels measure                                   # the embedded model, a minute or two
      flux-kernels measure --model flux1-dev.safetensors --base FLUX.1-dev --prompts prompts.txt
      torchrun --nproc-per-node 4 -m flux_kernels measure --model FLUX.1-dev --prompts prompts.txt
      flux-kernels measure --plan plan.json                  # what the plan costs as a whole

    FLUX.1-dev's 304 matrices in 13 types are 4,000 measurements of half a forward pass on every state: fewer states, types or
    smaller pictures take less.

    FLUX.1-dev needs about 35 GB of GPU memory, or 69 GB of RAM in float32; with --dtype bfloat16 on a CPU its weights stay in
    the file, and 5 GB of RAM are enough, slow where the file is larger than the free memory. What does not fit is refused
    at once.

    Several processes (torchrun, accelerate launch, or RANK and WORLD_SIZE set by hand) share the work; each needs as much.
    """
    from ..backends import usable_device
    from ..files import check_writable
    from ..generation.base_pipeline import one_thread

    check_writable(out, "--out")
    if states_file is not None and not states_file.exists():
        check_writable(states_file, "--states-file")
    console = Console(stderr=as_json, highlight=False)
    with console.status("loading diffusers"):
        from ..measure import run as work
        from ..measure.measured_model import find_source
        from ..mixed.option import Option
        from ..mixed.plan_file import Plan
    request = work.Request(
        out=out,
        source=find_source(gguf, model, base),
        types=tuple(map(Option.parse, comma_separated(types))) if types else work.TYPES,
        plan=None if plan is None else Plan.load(plan).by_tensor(),
        prompts=None if prompts is None else _prompts(prompts),
        states_file=states_file,
        count=states,
        sizes=_sizes(sizes),
        steps=steps,
        seed=seed,
        imatrix=imatrix,
        weighted=weighted,
        device=usable_device(device) if device else None,
        dtype=DTYPES[dtype] if dtype else None,
    )
    if plan is not None and out.exists() and imatrix is None:
        request = request.as_table()
    world = work.World.from_environment()
    with (
        one_thread() if request.source.embedded else nullcontext(),
        progress(console, TaskProgressColumn(), shown=world.rank == 0) as bar,
    ):
        show = _show(bar)
        opened = work.open_measurement(request, world, show)
        if plan is None:
            table = work.measure(opened, world, show)
        elif world.rank == 0:
            show("measuring the plan", 0, 0)
            row = work.measure_plan(opened)
    if plan is None:
        _report_table(console, table, request, as_json)
    elif world.rank == 0:
        _report_plan(console, row, out, as_json)


def _show(bar: Progress) -> Any:
    """Return what draws progress: a new bar whenever another stage begins."""
    tasks: dict[float, Any] = {}

    def show(what: str, done: float, total: float) -> None:
        if total not in tasks:
            for task in tasks.values():
                bar.remove_task(task)
            tasks.clear()
            tasks[total] = bar.add_task(what, total=total or None)
        bar.update(tasks[total], completed=done, description=what)

    return show


def _report_plan(console: Console, row: Any, out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(row.record()))
        return
    console.print(
        f"The plan as a whole costs {row.cost:.3e} (95 % of resampled states: {row.cost_low:.3e} to {row.cost_high:.3e}); "
        f"by MixedQuantFlux's metric {row.mfq_cost:.4g}, not to be compared with it: not normalized, and with the text tokens "
        "of the last block, which no picture sees and which often dominate it.",
        soft_wrap=True,
    )
    if out.exists():
        console.print(f"Kept in [bold]{out}.json[/].", soft_wrap=True)


def _report_table(console: Console, table: Any, request: Any, as_json: bool) -> None:
    if as_json:
        facts = dict(table=str(request.out), complete=table is not None, rows=0 if table is None else len(table.rows))
        typer.echo(json.dumps({**facts, "states": str(request.states_path)}))
        return
    if table is None:
        console.print("This process's share is measured. The table is written when the others have finished theirs.")
        return
    console.print(_cost_table(table, request.types))
    rank = max((option.rank for option in request.types), default=0)
    if table.states["count"] < _STATES_A_RANK * rank:
        console.print(
            f"[yellow]Note:[/] rank {rank} is fitted to {counted(table.states['count'], 'state')} and judged on the same; "
            f"modulation sees one vector a state, so its cost comes out too low. Take --states {_STATES_A_RANK * rank} or more.",
            soft_wrap=True,
        )
    console.print(
        f"{counted(len(table.rows), 'cost')}, on {counted(table.states['count'], 'state')}, in [bold]{request.out}[/]. "
        f"Next: {own_command()} plan {request.out} --bpw 5",
        soft_wrap=True,
    )


def _cost_table(table: Any, types: tuple[Any, ...]) -> Table:
    """List the tensors that cost most in the middle type, with a few types on both sides of it."""
    from ..mixed.option import Option

    usual = map(Option, ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"))
    shown = [option for option in usual if option in types] or list(types)[:6]
    by_tensor = table.by_tensor()
    middle = shown[len(shown) // 2]
    ranked = sorted(by_tensor, key=lambda name: -by_tensor[name][middle].cost if middle in by_tensor[name] else 0)
    drawn = Table(title=f"Cost (squared error of the velocity, fraction): the {min(_SHOWN, len(ranked))} dearest tensors")
    drawn.add_column("tensor", overflow="fold")
    for option in shown:
        drawn.add_column(str(option), justify="right", overflow="fold")
    for tensor in ranked[:_SHOWN]:
        costs = (by_tensor[tensor].get(option) for option in shown)
        drawn.add_row(tensor.removesuffix(".weight"), *("" if row is None else f"{row.cost:.1e}" for row in costs))
    return drawn


def _prompts(path: Path) -> list[str]:
    from ..errors import FormatError
    from ..measure.capture import read_prompts

    if not path.is_file():
        raise FormatError(f"--prompts {path} is no file. It is a text file, a prompt a line.")
    try:
        return read_prompts(path)
    except UnicodeDecodeError:
        raise FormatError(f"--prompts {path} is not text in UTF-8. It is a text file, a prompt a line.") from None
    except FormatError as error:
        raise FormatError(f"--prompts {error}") from None


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    from ..errors import FormatError

    sizes = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([0-9]+)x([0-9]+)\s*", part)
        if match is None or any(int(side) % 16 or not int(side) for side in match.groups()):
            raise FormatError(
                f"--sizes has {part!r}; sizes are WIDTHxHEIGHT in multiples of 16 pixels, such as 1024x1024,832x1216."
            )
        sizes.append((int(match[1]), int(match[2])))
    return tuple(sizes)
