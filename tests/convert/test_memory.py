"""Memory of a conversion: a source above the allowed address space is converted within the peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# 50 MB in 16 bit, one of FLUX.1's sizes, times 16: 805 MB.
ROWS, COLUMNS, TENSORS = 8192, 3072, 16

# Thread stacks and heaps of glibc (64 MB of address space a thread each) are no memory in use, but count as address space.
CONVERT = """
import json, resource, sys
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

source, warm, out, kind, engine, workers = sys.argv[1:]
prepare(warm, Request(kind), engine=engine, workers=int(workers)).write(out)  # what torch loads and keeps at first use
before, address_space = status("VmRSS"), status("VmSize")
conversion = prepare(source, Request(kind), engine=engine, workers=int(workers))
limit = conversion.peak_bytes + int(workers) * 2**27
resource.setrlimit(resource.RLIMIT_AS, (address_space + limit, address_space + limit))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
conversion.write(out, force=True)
print(json.dumps({"peak": status("VmHWM") - before, "stated": conversion.peak_bytes, "limit": limit,
                  "source": conversion.source_bytes, "written": conversion.nbytes}))
"""


def write_source(path, tensors):
    """Write a safetensors file of BF16 zeros as a hole."""
    size = 2 * ROWS * COLUMNS
    header = {
        f"double_blocks.{i}.w.weight": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + tensors * size)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and RLIMIT_AS are Linux's")
@pytest.mark.parametrize(("kind", "engine", "tensors"), [("Q8_0", "libggml", TENSORS), ("Q4_K", "torch", 1)])
def test_memory_stays_below_what_is_stated(tmp_path, kind, engine, tensors):
    source = write_source(tmp_path / "big.safetensors", tensors)
    warm = write_source(tmp_path / "warm.safetensors", 1) if engine == "libggml" else source
    command = [sys.executable, "-c", CONVERT, source, warm, tmp_path / "out.gguf", kind, engine, "2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["peak"] < facts["stated"]
    if tensors == TENSORS:
        assert facts["source"] > 1.5 * facts["limit"], facts
