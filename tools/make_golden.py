"""Make the golden vectors of a block type with ggml's own library, never with this library.

    python tools/make_golden.py Q8_0            # writes tests/golden/Q8_0.npz and its line in manifest.json

A type that the installed libggml does not know needs a newer libggml, or vectors made by its author in the same layout
(tests/golden/README.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

from flux_kernels.files import file_sha256, write_whole
from tests import libggml_oracle as ggml

_ROWS, _K, _RANDOM_ROWS = 12, 512, 8


def sample_rows(seed: int) -> np.ndarray:
    """Return float32 [12, 512]: rows of gaussian, Student-t, zero, sparse, positive, outlier weights.

    Some are tiny and huge; the others are gaussian.
    """
    random = np.random.default_rng(seed)
    x = random.standard_normal((_ROWS, _K)).astype(np.float32)
    x[1] = random.standard_t(3, _K)
    x[2] = 0
    x[3, ::2] = 0
    x[4] = np.abs(x[4])
    x[5, ::37] *= 30
    x[6] *= 1e-6
    x[7] *= 1e4
    return x


def make(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a type's .npz file."""
    seed = zlib.crc32(name.encode())
    random = np.random.default_rng(seed + 1)
    _, type_size = ggml.geometry(name)
    x = sample_rows(seed)
    importance = (random.random(_K) ** 2 + 1e-3).astype(np.float32)
    weighted = ggml.quantize(name, x, importance)
    q = weighted if ggml.requires_importance(name) else ggml.quantize(name, x)
    block_size, _ = ggml.geometry(name)
    random_q = random.integers(0, 256, (_RANDOM_ROWS, _K // block_size * type_size), dtype=np.uint8)
    return dict(
        x=x,
        q=q,
        y=ggml.dequantize(name, q, _K),
        importance=importance,
        q_importance=weighted,
        y_importance=ggml.dequantize(name, weighted, _K),
        random_q=random_q,
        random_y=ggml.dequantize(name, random_q, _K),
    )


def describe(name: str, arrays: dict[str, np.ndarray], path: Path) -> dict:
    """Return the type's entry in manifest.json."""
    block_size, type_size = ggml.geometry(name)
    x, y = arrays["x"][0].astype(np.float64), arrays["y"][0].astype(np.float64)
    return dict(
        ggml_type=ggml.type_ids()[name],
        block_size=block_size,
        type_size=type_size,
        file=path.name,
        sha256=file_sha256(path),
        finite_fraction_random=round(float(np.isfinite(arrays["random_y"]).mean()), 4),
        rel_rms=round(float(np.linalg.norm(y - x) / np.linalg.norm(x)), 5),
    )


def main() -> None:
    """Parse the command line, write the vectors and the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="ggml's type name, such as Q4_K")
    parser.add_argument("--out", type=Path, default=GOLDEN, help="folder of the .npz files and manifest.json")
    arguments = parser.parse_args()
    if arguments.name not in ggml.type_ids():
        sys.exit(f"The installed libggml has no type {arguments.name!r}; it has {', '.join(ggml.type_ids())}.")
    arrays, path = make(arguments.name), arguments.out / f"{arguments.name}.npz"
    np.savez_compressed(path, **arrays)
    manifest_path = arguments.out / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    manifest[arguments.name] = describe(arguments.name, arrays, path)
    write_whole(manifest_path, (json.dumps(manifest, indent=1) + "\n").encode())
    print(f"Wrote {path} ({path.stat().st_size} bytes).")


if __name__ == "__main__":
    main()
