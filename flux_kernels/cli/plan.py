"""`flux-kernels plan`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import FormatError
from ..generation.memory_plan import GIB
from ..report.amounts import size_text
from ._options import comma_separated
from ._own_command import own_command

if TYPE_CHECKING:
    from ..mixed.file_layout import FileLayout
    from ..mixed.plan_file import Plan
    from ..plan.problem import Problem


def plan(
    costs: Annotated[
        Path,
        typer.Argument(
            help="Cost table of `flux-kernels measure`, or MixedQuantFlux's casting_cost table.", show_default=False
        ),
    ],
    size: Annotated[
        str | None, typer.Option(help="Size of the file: 8GB, 7.5GiB, bytes, or a type (Q4_K: as large as that file).")
    ] = None,
    bpw: Annotated[float | None, typer.Option(help="Bits per weight of all tensors together.", min=0.1, max=32)] = None,
    fits: Annotated[str | None, typer.Option(help="What fits a card of so much memory: 12GB.")] = None,
    at: Annotated[str, typer.Option(help="With --fits: the pictures' width x height.")] = "1024x1024",
    offload: Annotated[
        str, typer.Option(help="With --fits: model (text encoders and VAE off the card meanwhile) or none.")
    ] = "model",
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan to write (JSON).")] = Path("plan.json"),
    report: Annotated[
        Path | None, typer.Option(help="HTML page to write, with its figures as PNG files in the same folder.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="An image to show in the report: pictures side by side.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The measured model: flux1-dev, flux1-schnell, embedded, or its file or folder (headers are read)."),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help='PATTERN=TYPE, exactly: "*.img_mod.*=Q8_0". Repeatable.')] = None,
    at_least: Annotated[list[str] | None, typer.Option(help="PATTERN=TYPE, or more bits. Repeatable.")] = None,
    only_types: Annotated[str, typer.Option(help="Types to choose from, comma-separated.")] = "",
    same: Annotated[list[str] | None, typer.Option(help="PATTERN of tensors that get one type together. Repeatable.")] = None,
    per_block: Annotated[bool, typer.Option("--per-block", help="One type for all matrices of a block.")] = False,
    rule: Annotated[str, typer.Option(help="How tensors outside the plan are stored: new, old or legacy.")] = "new",
    metric: Annotated[str, typer.Option(help="Cost to minimise: cost, or mfq_cost (MixedQuantFlux's).")] = "cost",
    refine: Annotated[
        int,
        typer.Option(min=0, help="Rounds of measuring the plan as a whole on the captured states and correcting the costs."),
    ] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver.", min=1)] = 120.0,
    export: Annotated[
        Path | None, typer.Option("--export-casting-cost", help="Also write the costs as a casting_cost table (CSV).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, for machines.")] = False,
) -> None:
    """Choose a type for every tensor: the least error in a file of at most the size you name.

    Say the size with exactly one of --size, --bpw and --fits. The result is provably the best for the costs in the table;
    errors of single tensors do not quite add up, so --refine measures the plan as a whole and plans again.

    [bold]Examples[/]

      flux-kernels plan costs.csv --size 8GB --report plan.html
      flux-kernels plan costs.csv --fits 12GB --at 1280x1280
      flux-kernels plan costs.csv --size Q4_K --keep "*.img_mod.*=Q8_0" --at-least "single_blocks.37.*=Q6_K"
      flux-kernels quantize flux1-dev.safetensors flux1-dev_mx5_4.gguf --plan plan.json
    """
    from ..files import check_writable

    for path, option in ((out, "--out"), (report, "--report"), (export, "--export-casting-cost")):
        if path is not None:
            check_writable(path, option)
    console = Console(stderr=as_json, highlight=False)
    with console.status("reading the costs"):
        from ..mixed.option import Option
        from ..plan.constraints import Constraints, parse_pair

        constraints = Constraints(
            keep=tuple(parse_pair(text, "--keep") for text in keep or ()),
            at_least=tuple(parse_pair(text, "--at-least") for text in at_least or ()),
            only_types=tuple(map(Option.parse, comma_separated(only_types))) if only_types else (),
            same=tuple(same or ()),
            per_block=per_block,
        )
        table, problem = _read(costs, model, rule, constraints, metric)
        # After what was given, whose mistakes need no package to be seen, and before anything is written.
        _need("scipy", *(["matplotlib"] if report else []))
    budget, asked = _budget(console, problem, size, bpw, fits, at, offload)
    asked["rule"] = rule
    with console.status("planning"):
        chosen = _plan(problem, budget, asked, time_limit, refine, costs, model, console)
    chosen.save(out)
    if export is not None:
        from ..mixed.casting_cost import write_casting_cost

        write_casting_cost(table, problem.layout, export)
    written = _report(report, problem, chosen, table, metric, pictures) if report is not None else []
    if as_json:
        typer.echo(chosen.to_json())
        return
    _print(console, problem, chosen, table, metric)
    _print_written(console, [out, *([export] if export else []), *written])
    _print_next(console, out, chosen, costs, _source_of(table, model))


def _need(*packages: str) -> None:
    """Raise ImportError where a package is missing, which the command line says in one sentence."""
    from importlib import import_module

    for package in packages:
        import_module(package)


def _read(costs: Path, model: str | None, rule: str, constraints: Any, metric: str) -> tuple[Any, Problem]:
    from ..files import file_sha256
    from ..mixed.casting_cost import is_casting_cost, read_casting_cost
    from ..mixed.cost import CostTable
    from ..plan.problem import find_layout, make_problem

    try:
        if is_casting_cost(costs):
            layout = find_layout(CostTable([]), model or "flux1-dev", rule)
            table = read_casting_cost(costs, layout)
        else:
            table = CostTable.load(costs)
            layout = find_layout(table, model, rule)
    except UnicodeDecodeError:
        raise FormatError(f"{costs} is not text, so it is no cost table. `flux-kernels measure` makes a cost table.") from None
    return table, make_problem(table, layout, constraints, metric=metric, costs_sha256=file_sha256(costs))


def _budget(
    console: Console, problem: Problem, size: str | None, bpw: float | None, fits: str | None, at: str, offload: str
) -> tuple[int, dict[str, Any]]:
    """Return the bytes of the file and what was asked for."""
    from ..plan.budget import parse_card, parse_resolution, parse_size, room_on_card, room_table

    if sum(value is not None for value in (size, bpw, fits)) != 1:
        raise FormatError("Say the size with exactly one of --size 8GB, --bpw 5.1 and --fits 12GB.")
    if size is not None:
        return parse_size(size, problem.layout, problem.costs), {"size": size}
    if bpw is not None:
        return problem.layout.budget_of_bits(bpw), {"bpw": bpw}
    card = parse_card(fits or "")
    _print_room(console, room_table(problem.layout, card, offload), card, offload)
    width, height = parse_resolution(at)
    room = room_on_card(problem.layout, card, width, height, offload)
    if room.file <= 0:
        raise FormatError(
            f"A {card:g} GiB card has no room for the transformer at {width} x {height}: {-room.file / GIB:.2f} GiB are "
            "missing even without it. Take smaller pictures with --at, or --offload model."
        )
    return room.file, {"fits": fits, "at": f"{width}x{height}", "offload": offload}


def _plan(
    problem: Problem, budget: int, asked: dict, time_limit: float, rounds: int, costs: Path, model: str | None, console: Console
) -> Plan:
    from ..plan.problem import plan_within

    if not rounds:
        return plan_within(problem, budget, time_limit=time_limit, about=asked)
    from dataclasses import replace

    from ..measure.joint import joint_measure
    from ..plan.refine import refine

    measure = joint_measure(costs, model)
    done = refine(
        problem,
        budget,
        measure,
        rounds,
        time_limit=time_limit,
        on_measured=lambda what, cost: console.print(f"[dim]measured {what}: {cost:.4e}[/]"),
    )
    return replace(done.plan, options={**asked, **done.plan.options})


def _report(path: Path, problem: Problem, chosen: Plan, table: Any, metric: str, pictures: Path | None) -> list[Path]:
    from PIL import Image

    from ..plan.report import write_report
    from ..plan.report_data import gather

    joint = table.joint if metric == "cost" else ()
    shown = Image.open(pictures) if pictures else None
    return write_report(gather(problem, chosen, table.costs(metric), joint, shown), path)


def _print_room(console: Console, rooms: list, card: float, offload: str) -> None:
    from ..plan.budget import ROOM

    table = Table(title=f"What a {card:g} GiB card leaves for the file, offload {offload} (GiB)")
    for heading in ("pictures", "activations", "VAE decoding", "other parts", "the file"):
        table.add_column(heading, justify="right")
    for room in rooms:
        sizes = (room.activations, room.vae, room.beside, room.file)
        table.add_row(f"{room.width} x {room.height}", *(f"{value / GIB:.2f}" for value in sizes))
    console.print(table)
    console.print(f"[dim]{ROOM}.[/]", soft_wrap=True)


def _print(console: Console, problem: Problem, chosen: Plan, table: Any, metric: str) -> None:
    from ..mixed.file_layout import KEY_VALUE_BYTES
    from ..plan.report_data import uniform_files

    layout, budget = problem.layout, chosen.options["budget"]
    console.print(
        f"[bold]{size_text(chosen.bytes, 3)}[/] of {size_text(budget, 3)} asked for ({budget - chosen.bytes:,} bytes are left, "
        f"{KEY_VALUE_BYTES:,} of them for what quantize writes about the file's origin), "
        f"{chosen.options['bits_per_weight']:.2f} bits per weight "
        f"({chosen.options['block_bits_per_weight']:.2f} inside the blocks)",
        soft_wrap=True,
    )
    gap = chosen.options.get("gap", 0.0)
    proof = "the least there is" if not gap else f"at most {gap:.2%} above the least there is: the time was up"
    joint = "" if chosen.joint_cost is None else f"; measured as a whole {chosen.joint_cost:.4g}"
    console.print(f"Predicted error {chosen.cost:.4g}, {proof}{joint}")
    console.print(_types_table(layout, chosen, problem))
    shown = Table(title="For comparison: files with one type")
    for heading in ("type", "size", "predicted error", "of this plan's"):
        shown.add_column(heading, justify="right")
    for option, size, cost in uniform_files(layout, table.costs(metric)):
        shown.add_row(str(option), size_text(size, 3), f"{cost:.4g}", f"{cost / chosen.cost:.2f} times" if chosen.cost else "")
    console.print(shown)


def _types_table(layout: FileLayout, chosen: Plan, problem: Problem) -> Table:
    """Give each class of matrices a row, with how many tensors got each type."""
    from ..models.names import tensor_class

    options = chosen.by_tensor()
    kinds = sorted({options[name] for name in problem.costs}, key=lambda option: (option.bits, option))
    counts: dict[str, dict[Any, int]] = {}
    for name in problem.costs:
        row = counts.setdefault(tensor_class(name).removesuffix(".weight"), {})
        row[options[name]] = row.get(options[name], 0) + 1
    table = Table(title="Tensors by type")
    table.add_column("tensors", overflow="fold")
    for kind in kinds:
        table.add_column(str(kind), justify="right")
    for title, row in counts.items():
        table.add_row(title, *(str(row.get(kind, "")) for kind in kinds))
    return table


def _print_written(console: Console, written: list[Path]) -> None:
    for path in written:
        console.print(f"Wrote {path}", soft_wrap=True)


def _source_of(table: Any, model: str | None) -> Path | None:
    """Return the measured model's file or folder, None where it is not known."""
    from ..generation.embedded import embedded_model_path
    from ..measure.measured_model import find_source
    from ..mixed.file_layout import NAMED_MODELS

    given = table.source if model is None or model in NAMED_MODELS else model
    if given:
        return Path(given) if Path(given).exists() else None
    embedded, here = embedded_model_path(), Path.cwd()
    if model != "embedded" and table.source_sha256 != find_source().sha256():
        return None
    return embedded.relative_to(here) if embedded.is_relative_to(here) else embedded


def _print_next(console: Console, out: Path, chosen: Plan, costs: Path, source: Path | None) -> None:
    """Print the command that makes the file."""
    from ..mixed.covariance import covariance_path
    from ..mixed.imatrix import imatrix_path

    statistics = {"--imatrix": imatrix_path(costs)} | ({"--covariance": covariance_path(costs)} if chosen.low_rank else {})
    measured_with = "".join(f" {option} {path}" for option, path in statistics.items() if path.exists())
    named = "SOURCE" if source is None else shlex.quote(str(source))
    command = f"{own_command()} quantize {named} {chosen.options['file_name']} --plan {out}{measured_with}"
    console.print(f"Next: {command}", soft_wrap=True, markup=False)
    if source is None:
        console.print(f"SOURCE is the 16-bit file or folder that was measured ({chosen.options['model']}).", soft_wrap=True)
