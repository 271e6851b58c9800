"""What `doctor` finds: packages that are missing, devices, and the backend that `auto` really takes."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from flux_kernels import FORMATS
from flux_kernels.backends import resolve
from flux_kernels.install_hints import install_command
from flux_kernels.machine import doctor


def test_versions_are_those_of_the_imported_packages():
    import diffusers

    versions = {package.name: package.version for package in doctor.diagnose().packages}
    assert versions["torch"] == torch.__version__ and versions["diffusers"] == diffusers.__version__


def test_every_type_is_said_to_run_where_it_runs():
    diagnosis = doctor.diagnose()
    assert diagnosis.devices[0].device == "cpu"
    for device in diagnosis.devices:
        backends = {name: backend for backend, names in device.runs.items() for name in names}
        assert backends == {
            name: resolve("auto", "exact", torch.device(device.device), fmt).name for name, fmt in FORMATS.items()
        }


def test_a_missing_package_comes_with_its_command(monkeypatch):
    real = doctor.installed_version

    def without_peft(name):
        if name in ("peft", "gguf"):
            return None
        return real(name)

    monkeypatch.setattr(doctor, "installed_version", without_peft)
    diagnosis = doctor.diagnose()
    missing = {package.name: package.command for package in diagnosis.packages if package.version is None}
    assert missing.items() >= {"peft": install_command(), "gguf": install_command("bench")}.items()
    assert f"peft is missing (LoRAs): {install_command()}" in diagnosis.advice
    # Not needed, so no advice.
    assert not any(line.startswith("gguf") for line in diagnosis.advice)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is seen here")
@pytest.mark.parametrize(("cuda", "reason"), [(None, "this torch is a CPU build"), ("13.0", "the driver is missing, too old")])
def test_no_gpu_says_why(monkeypatch, cuda, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (line,) = [line for line in doctor.diagnose().advice if line.startswith("No GPU is seen")]
    assert reason in line


def test_diagnosis_is_plain_data():
    assert json.loads(json.dumps(asdict(doctor.diagnose())))["python"]


@pytest.mark.parametrize(
    ("capability", "triton", "warned"),
    [
        ((9, 0), "3.6.0", True),
        ((9, 0), "3.7.1", False),
        ((9, 0), "3.10.0", False),
        ((8, 9), "3.6.0", False),
        ((9, 0), None, False),
    ],
)
def test_a_triton_that_leaves_out_hoppers_fence_is_named(monkeypatch, capability, triton, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(doctor, "installed_version", lambda name: triton)
    assert bool(doctor._compiler_advice()) == warned
    assert all(f"Triton {triton}" in line and "3.7.1" in line for line in doctor._compiler_advice())
