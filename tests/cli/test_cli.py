"""The command line as a person and a script meet it: help, output, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from flux_kernels import GGUFError
from flux_kernels.cli import app
from flux_kernels.generation.demo import Variant, write_variant
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path
from flux_kernels.install_hints import install_command

PROMPT = "a red seven"
NO_LORA = embedded_model_path() / "vae" / "diffusion_pytorch_model.safetensors"


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def ok(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "Q8_0.gguf"
    write_variant(Variant("Q8_0", "Q8_0"), path)
    return path


def generate(gguf_file, out, *more):
    return json.loads(
        ok(
            "generate",
            "--gguf",
            gguf_file,
            "--prompt",
            PROMPT,
            "--steps",
            2,
            "--dtype",
            "float32",
            "--out",
            out,
            "--force",
            "--json",
            *more,
        )
    )


def test_generate_fuses_q_k_and_v_in_modes_that_scale_activations(gguf_file, tmp_path, monkeypatch):
    from flux_kernels.generation import generate as module

    fused, original = [], module.load_transformer
    monkeypatch.setattr(
        module, "load_transformer", lambda *paths, **options: fused.append(options["fuse"]) or original(*paths, **options)
    )
    for compute in ("exact", "int8"):
        generate(gguf_file, tmp_path / f"{compute}.png", "--compute", compute)
    assert fused == [None, "qkv"] and all((tmp_path / f"{compute}.png").stat().st_size for compute in ("exact", "int8"))


@pytest.mark.parametrize("command", ["demo", "generate", "inspect", "doctor"])
def test_help_teaches_with_examples(command):
    text = ok(command, "--help")
    assert "Examples" in text and f"flux-kernels {command}" in text


@pytest.mark.parametrize("command", ["measure", "quantize", "generate"])
def test_help_flows_with_the_width_of_the_terminal(command):
    """No line of a paragraph ends where the source's line does: each is as full as the next word allows."""
    width = 78
    shown = CliRunner(env={"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}).invoke(app, [command, "--help"]).stdout
    text = [line.strip() for line in shown.partition("Examples")[0].splitlines()][1:]
    pairs = [(line, after) for line, after in pairwise(text) if line and after and "Usage" not in line]
    assert pairs and all(len(line) + 1 + len(after.split()[0]) > width - 4 for line, after in pairs), text


def test_without_a_command_help_is_shown():
    assert all(command in invoke().output for command in ("demo", "generate", "inspect", "doctor"))


def test_help_starts_without_diffusers():
    code = "import sys; from flux_kernels.cli import app; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_demo_writes_the_sheet_and_the_files(tmp_path):
    facts = json.loads(ok("demo", "--out", tmp_path / "new" / "sheet.png", "-p", PROMPT, "--steps", 1, "--json"))
    assert [variant["name"] for variant in facts["variants"]] == ["16 bit", "Q8_0", "Q6_K", "Q4_K", "mixed"]
    assert all((tmp_path / "new" / variant["file"]).is_file() for variant in facts["variants"])
    assert Image.open(tmp_path / "new" / "sheet.png").width > 5 * 64


def test_demo_table_is_for_people(tmp_path):
    text = ok("demo", "--out", tmp_path / "sheet.png", "-p", PROMPT, "--steps", 1)
    assert re.search(r"Q4_K .* 4\.50 ", text) and "1 of 1" in text and "sheet.png" in text
    # The very picture of the sheet.
    assert f'--prompt "{PROMPT}" --seed 2' in text


def test_generate_draws_and_keeps_the_parameters(gguf_file, tmp_path):
    out = tmp_path / "a.png"
    facts = generate(gguf_file, out, "--seed", 5)
    image = Image.open(out)
    assert image.size == (PIPELINE_KWARGS["width"], PIPELINE_KWARGS["height"])
    stored = json.loads(image.text["flux_kernels"])
    expected = {"prompt": PROMPT, "seed": 5, "num_inference_steps": 2, "gguf": gguf_file.name, "bits_per_weight": 8.5}
    assert stored.items() >= expected.items() and facts.items() >= expected.items()


def test_seed_and_size_and_negative_prompt_matter(gguf_file, tmp_path):
    def pixels(name, *more):
        generate(gguf_file, tmp_path / name, *more)
        return Image.open(tmp_path / name)

    first = pixels("a.png", "--seed", 1)
    assert pixels("b.png", "--seed", 1).tobytes() == first.tobytes()
    assert pixels("c.png", "--seed", 2).tobytes() != first.tobytes()
    assert pixels("d.png", "--seed", 1, "--negative", "a blue one").tobytes() != first.tobytes()
    assert pixels("e.png", "--seed", 1, "--width", 96, "--height", 32).size == (96, 32)


def test_lora_scales(gguf_file, tmp_path):
    torch.manual_seed(0)
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    lora = {f"{layer}.lora_A.weight": torch.randn(4, 256), f"{layer}.lora_B.weight": torch.randn(256, 4)}
    save_file(lora, tmp_path / "style.safetensors")

    def pixels(*more):
        generate(gguf_file, tmp_path / "x.png", *more)
        return Image.open(tmp_path / "x.png").tobytes()

    plain = pixels()
    file = tmp_path / "style.safetensors"
    assert pixels("--lora", f"{file}:0") == plain
    full = pixels("--lora", file)
    assert full != plain
    halves = pixels("--lora", f"{file}:0.5", "--lora", f"{file}:0.5")
    # The same sum in another order.
    assert max(abs(a - b) for a, b in zip(halves, full)) <= 1
    stored = json.loads(Image.open(tmp_path / "x.png").text["flux_kernels"])
    assert stored["loras"] == [["style.safetensors", 0.5], ["style.safetensors", 0.5]]


def test_generate_tells_people_what_it_did(gguf_file, tmp_path):
    arguments = ("generate", "--gguf", gguf_file, "--prompt", PROMPT, "--steps", 1, "--out", tmp_path / "a.png", "--force")
    assert re.search(r"26 layers swapped.*64 x 64, 1 step in [\d.]+ s", ok(*arguments), re.DOTALL)
    assert "transformer_blocks.0.norm1.linear" in ok(*arguments, "--report")


def test_a_picture_is_replaced_only_by_force(gguf_file, tmp_path):
    """As a GGUF file is, and before anything is loaded."""
    out = tmp_path / "a.png"
    out.write_bytes(b"mine")
    arguments = ("generate", "--gguf", gguf_file, "--prompt", PROMPT, "--steps", 1, "--out", out)
    refused = invoke(*arguments)
    assert refused.exit_code == 1 and refused.stderr.endswith("exists. Give --force to replace it, or another name.\n")
    assert out.read_bytes() == b"mine"
    ok(*arguments, "--force")
    assert Image.open(out).size == (64, 64)


def test_words_that_the_embedded_model_never_saw_are_noted(gguf_file, tmp_path):
    arguments = ("generate", "--gguf", gguf_file, "--steps", 1, "--force", "--out", tmp_path / "a.png", "--json")
    result = invoke(*arguments, "--prompt", "A Cat on a red sofa, in blue.", "--negative", "a dog")
    assert "it does not know: Cat, on, sofa, dog. --base names the folder of another model." in result.stderr
    assert json.loads(result.stdout)["prompt"] == "A Cat on a red sofa, in blue."
    assert "does not know" not in invoke(*arguments, "--prompt", "The digit 4, in blue!").stderr


@pytest.mark.parametrize(
    "more", [("--guidance", "nan"), ("--true-cfg", "inf"), ("--lora", "style.safetensors:nan")], ids=lambda more: more[0]
)
def test_numbers_that_are_none_are_refused_before_anything_loads(gguf_file, tmp_path, more):
    result = invoke("generate", "--gguf", gguf_file, "--prompt", PROMPT, "--out", tmp_path / "x.png", *more)
    assert result.exit_code == 1 and "give a finite number" in result.stderr
    assert not (tmp_path / "x.png").exists()


def test_inspect_shows_and_lists(gguf_file):
    text = ok("inspect", gguf_file)
    assert "FLUX.1 architecture with 1 double and 2 single blocks, width 256" in text
    assert "8.50 inside the blocks" in text and "6 GB fits" in text
    assert "double_blocks.0.img_mod.lin.weight" not in text
    assert "double_blocks.0.img_mod.lin.weight" in ok("inspect", gguf_file, "--tensors")
    facts = json.loads(ok("inspect", gguf_file, "--json", "--tensors"))
    assert facts["fits"]["6"] is True and facts["nbytes"] == gguf_file.stat().st_size
    assert {"name", "type", "shape", "bytes"} == set(facts["tensors"][0])


def test_inspect_of_a_refused_file(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(20))
    result = invoke("inspect", bad)
    assert result.exit_code == 1 and "Refused:" in result.output
    result = invoke("inspect", bad, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["refused"]


def test_doctor_prints_commands_that_can_be_copied(monkeypatch):
    """The extra in square brackets is no markup, and a narrow terminal folds the command, uncut."""
    from flux_kernels.machine import doctor

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    column = [line.split("│")[2].strip() for line in ok("doctor").splitlines() if line.count("│") == 4]
    # A cell's lines are cut anywhere and padded.
    cells = "".join(column).replace(" ", "")
    assert "missing:" + install_command("bench").replace(" ", "") in cells


def test_doctor_for_people_and_machines():
    assert torch.__version__ in ok("doctor")
    assert json.loads(ok("doctor", "--json"))["packages"][0]["name"] == "torch"


# Arguments after the GGUF file and prompt, exit code, what the line says.
ERRORS = [
    (("--base", "{tmp}"), 1, r"holds no model_index\.json"),
    (("--base", "{tmp}/none"), 1, r"is not a folder"),
    (("--lora", "{tmp}/none.safetensors:0.5"), 1, r"none\.safetensors is no file"),
    (("--lora", "{gguf}"), 1, r"is a GGUF file; diffusers reads LoRAs from safetensors"),
    (("--lora", str(NO_LORA)), 1, r"does not load as a LoRA"),
    (("--backend", "cuda"), 1, r"Unknown backend 'cuda'\. Known: auto, triton, torch"),
    (("--compute", "int7"), 1, r"Unknown compute mode 'int7'"),
    (("--gguf", "{tmp}/none.gguf"), 1, r"none\.gguf is no file"),
    (("--gguf", __file__), 1, r"^Error: [^:]*test_cli\.py: header, byte 0: a GGUF file starts with"),
    (("--lora", f"{NO_LORA}:abc"), 1, r"'abc' is no scale\. Write FILE:SCALE"),
    (("--width", "1000000"), 1, r"1000000 x 64 is too large: positions in bfloat16 are exact up to 4112 pixels"),
    (("--out", "{tmp}/none/x.png"), 1, r"--out .*there is no folder .*none\. Make it"),
    (("--width", "0"), 2, r"Invalid value for '--width'"),
    (("--offload", "disk"), 2, r"Invalid value for '--offload'"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), ERRORS)
def test_errors_are_one_line(gguf_file, tmp_path, arguments, code, message):
    filled = [argument.format(tmp=tmp_path, gguf=gguf_file) for argument in arguments]
    result = invoke("generate", "--gguf", gguf_file, "--prompt", PROMPT, "--out", tmp_path / "x.png", *filled)
    assert result.exit_code == code, result.output
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.output and not (tmp_path / "x.png").exists()
    if code == 1:
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload to")
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload_without_a_gpu_is_refused(gguf_file, tmp_path, offload):
    result = invoke("generate", "--gguf", gguf_file, "--prompt", PROMPT, "--offload", offload, "--out", tmp_path / "x.png")
    assert result.exit_code == 1 and "torch sees none. Use --offload none." in result.stderr


def test_inspect_names_a_refused_file_once(tmp_path):
    text = tmp_path / "README.md"
    text.write_text("# flux_kernels")
    result = invoke("inspect", text)
    assert result.exit_code == 1 and result.stdout.count("README.md") == 1 and "Refused: header, byte 0" in result.stdout


def test_inspect_of_a_missing_file_is_one_line():
    result = invoke("inspect", "nowhere.gguf")
    assert result.exit_code == 1 and result.stderr == "Error: No such file or directory: nowhere.gguf\n"


def test_traceback_lets_the_error_through():
    result = invoke("--traceback", "generate", "--gguf", __file__, "--prompt", PROMPT)
    assert isinstance(result.exception, GGUFError)


def test_missing_package_names_the_command(monkeypatch, gguf_file):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = invoke("inspect", gguf_file)
    assert result.exit_code == 1 and f"diffusers is not installed. Run: {install_command()}" in result.stderr
