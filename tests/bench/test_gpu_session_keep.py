"""What a GPU session brings back becomes the rows of bench/results."""

from __future__ import annotations

import csv
import json

from bench.gpu_session.keep import main
from bench.gpu_session.sections import racing_kernels

ORIGIN = {"device": "NVIDIA H200", "capability": "9.0", "commit": "abc", "date": "2026-11-28"}
JUNIT = """<testsuites><testsuite>
<testcase classname="t" name="test_a[Q4_K]" time="2.5" /><testcase classname="t" name="test_b" time="0.1"><skipped message="two GPUs" /></testcase>
<testcase classname="t" name="test_c" time="1.0"><failure message="no">trace</failure></testcase></testsuite></testsuites>"""
COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
    '"Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"'
)


def counter(number: int, kernel: str, metric: str, value: str) -> str:
    return f'"{number}","1","python3","127.0.0.1","{kernel}","1","7","(384, 1, 1)","(2, 66, 1)","0","9.0","Occupancy","{metric}","%","{value}",""'


NCU = "\n".join(
    [
        "==PROF== Connected",
        "launched: cuBLAS, small M Q4_K, 8, int8 unpack rows",
        COLUMNS,
        counter(0, "nvjet", "pct", "12.5"),
        counter(1, "small_m_codes_kernel", "requests", "4,295,213"),
        counter(1, "small_m_codes_kernel", "requests.max_rate", "1"),
        counter(2, "row_scale_kernel", "pct", "1"),
        counter(3, "unpack_int8_kernel", "pct", "2"),
        counter(3, "unpack_int8_kernel", "", ""),
    ]
)
PROFILE = """------  -----
Name  Self CPU %  Self CPU  CPU total %  CPU total  CPU time avg  Self CUDA  Self CUDA %  CUDA total  CUDA time avg  # of Calls
------  -----
aten::addmm  9.62%  14.717ms  13.08%  20.014ms  39.710us  76.196ms  45.09%  76.196ms  151.182us  504
void at::native::kernel<128, 4>  0.00%  0.000us  0.00%  0.000us  0.000us  10.567us  6.25%  10.567us  24.181us  437
Self CPU time total: 153.016ms
"""


def test_reports_become_rows_with_the_origin_of_the_session(tmp_path):
    session, folder = tmp_path / "session", tmp_path / "results"
    session.mkdir()
    files = {"origin.json": json.dumps(ORIGIN), "junit.xml": JUNIT, "ncu.csv": NCU, "host.csv": "case,m\nnn.Linear,1\n"}
    for name, text in (files | {"Q4_K_ours_exact_512x512.profile.txt": PROFILE}).items():
        (session / name).write_text(text)
    main([str(session), str(folder)])
    rows = {path.stem: list(csv.DictReader(path.open())) for path in folder.glob("*.csv")}
    assert all(ORIGIN.items() <= row.items() for name in ("correctness", "ncu", "profile") for row in rows[name])
    assert [(row["test"], row["outcome"]) for row in rows["correctness"]] == [
        ("test_a[Q4_K]", "passed"),
        ("test_b", "skipped"),
        ("test_c", "failure"),
    ]
    assert [(row["what"], row["metric"], row["value"]) for row in rows["ncu"]] == [
        ("cuBLAS", "pct", "12.5"),
        ("small M Q4_K, 8", "requests", "4295213"),
        ("row_scale_kernel", "pct", "1"),
        ("int8 unpack rows", "pct", "2"),
    ]
    addmm, kernel = rows["profile"]
    assert (addmm["format"], addmm["provider"], addmm["size"], addmm["calls"]) == ("Q4_K", "ours exact", "512x512", "504")
    assert (addmm["self_device_ms"], addmm["self_host_ms"]) == ("76.196", "14.717")
    assert (kernel["name"], kernel["self_device_ms"]) == ("void at::native::kernel<128, 4>", "0.011")
    assert rows["host"] == [{"case": "nn.Linear", "m": "1"}]


def test_races_in_cublas_are_not_ours():
    text = "Race reported between Read access at {}+0xb30\n=========     and Write access at {}+0x2f60 [32 hazards]"
    cublas, ours = (text.format(name, name) for name in ("nvjet_sm90_tst_64x8", "fused_gemm_kernel"))
    assert racing_kernels(cublas) == []
    assert racing_kernels(f"{cublas}\n{ours}") == ["fused_gemm_kernel"]
