"""`flux-kernels doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..generation.memory_plan import GIB

if TYPE_CHECKING:
    from ..machine.doctor import CallFact, DeviceFact, Diagnosis


def doctor(
    format: Annotated[str, typer.Option("--format", help="ggml type of the calls to show.")] = "Q4_K",
    compute: Annotated[str, typer.Option(help="Compute mode of the calls to show.")] = "exact",
    capability: Annotated[
        str | None,
        typer.Option(help="Show the calls for a card that is not here, such as 8.6 (RTX 30), 8.9 (RTX 40), 12.0 (RTX 50)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, for machines.")] = False,
) -> None:
    """Show versions, GPU, the backend and kernels that would run, and what is missing.

    Each choice comes with its reason, and what is missing with the command that gets it.

    [bold]Examples[/]

      flux-kernels doctor
      flux-kernels doctor --format Q8_0 --compute int8
      flux-kernels doctor --capability 8.9
      flux-kernels doctor --json > doctor.json    (to attach to a bug report)
    """
    from ..backends import check_names
    from ..formats import get_format
    from ..machine.doctor import diagnose

    check_names("auto", compute)
    get_format(format)
    diagnosis = diagnose()
    calls = _calls(diagnosis, format, compute, capability)
    if as_json:
        by_place = {place: [asdict(call) for call in facts] for place, facts in calls.items()}
        typer.echo(json.dumps({**asdict(diagnosis), "calls": by_place}))
        return
    console = Console(highlight=False)
    build = f"CUDA/ROCm {diagnosis.cuda_build}" if diagnosis.cuda_build else "CPU build"
    driver = f", driver for CUDA {diagnosis.driver}" if diagnosis.driver else ""
    console.print(f"flux_kernels {diagnosis.flux_kernels}, Python {diagnosis.python}, {diagnosis.system}")
    console.print(f"torch: {build}{driver}")
    console.print(_packages(diagnosis))
    for device in diagnosis.devices:
        _print_device(console, device)
    for place, facts in calls.items():
        console.print(_call_table(f"One 1024 x 1024 step of FLUX.1-dev in {format}, compute={compute}, on {place}", facts))
    for line in diagnosis.advice:
        console.print(f"[yellow]![/] {escape(line)}", soft_wrap=True)
    if not diagnosis.advice:
        console.print("[green]Nothing is missing.[/]")


def _calls(diagnosis: Diagnosis, format: str, compute: str, capability: str | None) -> dict[str, list[CallFact]]:
    """List the planned calls for each GPU that is here, or for the capability asked for."""
    import torch

    from ..machine.doctor import planned_calls

    if capability is not None:
        try:
            major, minor = (int(part) for part in capability.split("."))
        except ValueError:
            raise typer.BadParameter(f"{capability!r} is not like 8.6", param_hint="--capability") from None
        return {f"a card of capability {capability}": planned_calls(format, compute, capability=(major, minor))}
    gpus = [device.device for device in diagnosis.devices if "triton" in device.runs]
    return {name: planned_calls(format, compute, torch.device(name)) for name in gpus}


def _call_table(title: str, calls: list[CallFact]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("where", "M x K x N", "calls", "kernel", "why"):
        table.add_column(heading)
    for call in calls:
        table.add_row(call.where, f"{call.m} x {call.k} x {call.n}", str(call.calls), f"{call.algorithm} {call.tile}", call.why)
    return table


def _packages(diagnosis: Diagnosis) -> Table:
    table = Table()
    for heading in ("package", "version", "for"):
        # A command that is cut could not be copied.
        table.add_column(heading, overflow="fold")
    for package in diagnosis.packages:
        missing = f"[{'red' if package.needed else 'dim'}]missing[/]: {escape(package.command)}"
        table.add_row(package.name, package.version or missing, package.purpose)
    return table


def _print_device(console: Console, device: DeviceFact) -> None:
    facts = [device.name]
    if device.capability:
        facts.append(f"capability {device.capability[0]}.{device.capability[1]}")
    if device.memory_bytes:
        facts.append(f"{device.memory_bytes / GIB:.1f} GiB")
    console.print(f"[bold]{device.device}[/]: {', '.join(facts)}")
    for backend, formats in device.runs.items():
        console.print(f"  backend auto runs [bold]{backend}[/] for {', '.join(formats)}", soft_wrap=True)
    if device.capability:
        from ..machine.doctor import tuning_record

        record = tuning_record(device.device)
        console.print(
            f"  tuning record: {record or 'none, the defaults run; `flux-kernels tune` measures this card'}", soft_wrap=True
        )
    for backend, reasons in device.reasons.items():
        for reason in reasons:
            console.print(f"  {backend} does not run: {reason}", soft_wrap=True)
