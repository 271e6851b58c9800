"""`flux-kernels doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..doctor import DeviceFact, Diagnosis


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, for machines.")] = False) -> None:
    """Show versions, GPU, which backend would run and why, what is missing and the command that gets it.

    [bold]Examples[/]

      flux-kernels doctor
      flux-kernels doctor --json > doctor.json    (to attach to a bug report)
    """
    from ..doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(diagnosis)))
        return
    console = Console(highlight=False)
    build = f"CUDA/ROCm {diagnosis.cuda_build}" if diagnosis.cuda_build else "CPU build"
    driver = f", driver for CUDA {diagnosis.driver}" if diagnosis.driver else ""
    console.print(f"flux_kernels {diagnosis.flux_kernels}, Python {diagnosis.python}, {diagnosis.system}")
    console.print(f"torch: {build}{driver}")
    console.print(_packages(diagnosis))
    for device in diagnosis.devices:
        _print_device(console, device)
    for line in diagnosis.advice:
        console.print(f"[yellow]![/] {line}", soft_wrap=True)
    if not diagnosis.advice:
        console.print("[green]Nothing is missing.[/]")


def _packages(diagnosis: Diagnosis) -> Table:
    table = Table()
    for heading in ("package", "version", "for"):
        table.add_column(heading)
    for package in diagnosis.packages:
        missing = f"[{'red' if package.needed else 'dim'}]missing[/]: {package.command}"
        table.add_row(package.name, package.version or missing, package.purpose)
    return table


def _print_device(console: Console, device: DeviceFact) -> None:
    facts = [device.name]
    if device.capability:
        facts.append(f"capability {device.capability[0]}.{device.capability[1]}")
    if device.memory_bytes:
        facts.append(f"{device.memory_bytes / 2**30:.1f} GiB")
    console.print(f"[bold]{device.device}[/]: {', '.join(facts)}")
    for backend, formats in device.runs.items():
        console.print(f"  backend auto runs [bold]{backend}[/] for {', '.join(formats)}", soft_wrap=True)
    for backend, reasons in device.reasons.items():
        for reason in reasons:
            console.print(f"  {backend} does not run: {reason}", soft_wrap=True)
