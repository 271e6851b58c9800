"""`flux-kernels quantize`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn
from rich.table import Table

from ..report.amounts import counted, megabytes, size_text
from ._progress import progress

if TYPE_CHECKING:
    from ..convert.convert import Conversion


def quantize(
    source: Annotated[Path, typer.Argument(help="Safetensors file, index of shards, folder, or GGUF.", show_default=False)],
    output: Annotated[Path | None, typer.Argument(help="The GGUF file to write.", show_default=False)] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="File type: Q4_K_S, Q4_K_M, Q5_K_S, Q6_K, Q8_0, Q3_K_L, IQ4_XS, ... With --plan: of the matrices that it does "
            "not name.",
        ),
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help='Layout of what stays plain: "new", "old" or "legacy".', show_default="new")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Types by tensor, as `flux-kernels plan` writes them.")] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix: .dat or GGUF.")] = None,
    covariance: Annotated[
        Path | None, typer.Option(help="Covariances that measure wrote, for a plan's low-rank corrections.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None, typer.Option(help='PATTERN=TYPE for tensors by name, such as "*.img_attn.*=Q6_K". Repeatable.')
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="Pattern of matrices that get the type, for models other than FLUX. Repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="config.json, where it cannot be inferred.")] = None,
    architecture: Annotated[str | None, typer.Option(help="general.architecture, for other models.")] = None,
    device: Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')] = "auto",
    engine: Annotated[str, typer.Option(help='"auto", "torch" or "libggml" (faster for some types on a CPU).')] = "auto",
    workers: Annotated[int | None, typer.Option(help="Threads; as many as torch uses.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, types and bits per weight; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="Leave out where the file comes from, as published files do.")] = False,
    full_hash: Annotated[bool, typer.Option("--full-hash", help="Hash the whole source: reads it twice.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, for machines.")] = False,
) -> None:
    """Make a GGUF file of one type, of a known layout, or of a plan, from a 16-bit model.

    The source is safetensors in 32, 16 or 8 bit (fp8), one file or shards, under BFL's names or diffusers', or a GGUF file. The
    layouts are those of published files: "new" (community files), "old" and "legacy" (city96, August 2024); sizes agree to the
    byte, but for some hundred bytes that say what the file was made from, which --bare leaves out.

    Tensors are streamed, so memory does not grow with the model: at most the largest tensor of the file and about 75 MB a
    thread on top of torch's 0.5 GB (on a GPU an estimate of 2.5 GB a thread there, not measured). The file appears when it is
    complete; --dry-run is quick.

    The key flux_kernels.source.hashes holds the sha256 of each source file's size and of 64 pieces of 64 KiB, the first at its
    start and the last at its end; with --full-hash that of all bytes.

    [bold]Examples[/]

      flux-kernels quantize flux1-dev.safetensors flux1-dev-Q4_K_S.gguf --type Q4_K_S
      flux-kernels quantize FLUX.1-dev/ flux1-dev-Q5_K_M.gguf --type Q5_K_M --imatrix flux1-dev.imatrix.gguf
      flux-kernels quantize flux1-dev.safetensors flux1-dev_mx5_1.gguf --plan plan.json
      flux-kernels quantize flux1-dev.safetensors --type Q6_K --rule old --dry-run
    """
    if output is None and not dry_run:
        raise typer.BadParameter("name the file to write, or give --dry-run", param_hint="OUTPUT")
    overrides = [_override(text) for text in tensor_type or ()]
    from ..convert.choose_types import Request
    from ..convert.convert import check_target, prepare
    from ..mixed.plan_file import Plan

    console = Console(highlight=False, stderr=as_json)
    conversion = prepare(
        source,
        Request(type_name, rule, Plan.load(plan) if plan else None, overrides, tuple(block or ())),
        imatrix=imatrix,
        covariance=covariance,
        plan_path=str(plan) if plan else None,
        config=str(config) if config else None,
        architecture=architecture,
        device=device,
        # Checked where it is used.
        engine=engine,  # type: ignore[arg-type]
        workers=workers,
        provenance=not bare,
        whole_hash=full_hash,
    )
    if output is not None and not dry_run:
        check_target(conversion.source, output, conversion.nbytes, force)
    _print_plan(console, conversion)
    if not dry_run and output is not None:
        with progress(console, DownloadColumn(), TransferSpeedColumn()) as bar:
            task = bar.add_task("quantizing", total=None)
            conversion.write(
                output,
                force=force,
                progress=lambda name, done, total: bar.update(task, completed=done, total=total, description=name),
            )
        _print_done(console, conversion, output)
    if as_json:
        typer.echo(json.dumps(_as_dict(conversion, None if dry_run else output)))


def _override(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise typer.BadParameter(f'{text!r} is not PATTERN=TYPE, such as "*.img_attn.*=Q6_K"', param_hint="--tensor-type")
    return pattern, kind


def _print_plan(console: Console, conversion: Conversion) -> None:
    model = conversion.source
    console.print(
        f"[bold]{model.model}[/], {counted(len(model.tensors), 'tensor')}, {size_text(conversion.source_bytes)}", soft_wrap=True
    )
    for note in conversion.notes:
        console.print(f"[yellow]Note:[/] {note}", soft_wrap=True)
    table = Table()
    table.add_column("type")
    for heading in ("tensors", "weights", "MB"):
        table.add_column(heading, justify="right")
    for share in conversion.shares():
        table.add_row(share.type, str(share.tensors), f"{share.weights:,}", megabytes(share.nbytes))
    console.print(table)
    without = conversion.nbytes - conversion.bare_nbytes
    bare = f" ({conversion.bare_nbytes:,} without the {without} that say what it was made from)" if without else ""
    console.print(f"File: {conversion.nbytes:,} bytes{bare}", soft_wrap=True)
    console.print(
        f"{conversion.bits_per_weight:.2f} bits per weight, {conversion.block_bits_per_weight:.2f} inside the blocks; "
        f"at most {size_text(conversion.peak_bytes, 0)} of memory on top of torch's, on {conversion.device}",
        soft_wrap=True,
    )


def _print_done(console: Console, conversion: Conversion, output: Path) -> None:
    speed = conversion.source_bytes / max(conversion.seconds, 1e-9)
    console.print(
        f"Wrote [bold]{output}[/] in {conversion.seconds:,.1f} s, {size_text(speed, 0)} of the source a second. "
        f"[bold]flux-kernels inspect[/] shows what it needs.",
        soft_wrap=True,
    )


def _as_dict(conversion: Conversion, output: Path | None) -> dict:
    return {
        "output": str(output) if output else None,
        "model": conversion.source.model,
        "bytes": conversion.nbytes,
        "bare_bytes": conversion.bare_nbytes,
        "bits_per_weight": conversion.bits_per_weight,
        "block_bits_per_weight": conversion.block_bits_per_weight,
        "peak_bytes": conversion.peak_bytes,
        "source_bytes": conversion.source_bytes,
        "seconds": conversion.seconds,
        "device": str(conversion.device),
        "shares": [asdict(share) for share in conversion.shares()],
        "types": conversion.choice.types,
        "metadata": {key: value for key, (_, value) in conversion.metadata.items()},
        "notes": conversion.notes,
    }
