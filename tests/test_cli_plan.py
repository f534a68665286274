"""`fastgen plan` and `fastgen bench --profile`, as main() runs them."""

import json

import pytest

from fastgen.bench import profile
from fastgen.cli.main import main
from fastgen.cli.plan import parse_size

LIMITS = ("--bandwidth-gb-s", "30", "--tflops", "2.5")


def test_plan_prints_text_and_json(capsys):
    assert main(["plan", "--model", "demo", "--memory", "64MiB", "--batch", "4", *LIMITS]) == 0
    text = capsys.readouterr().out
    for needed in (
        "LlamaForCausalLM, bfloat16",
        "memory        64.0 MiB",
        "TTFT",
        "as given: 30.0",
    ):
        assert needed in text
    assert main(["plan", "--model", "demo", "--dtype", "float32", "--json", *LIMITS]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kv_cache"]["bytes_per_token"] == 2 * 1536
    assert data["floors"]["read_gb_per_s"] == 30


def test_plan_takes_a_known_device(capsys):
    arguments = [
        "plan",
        "--model",
        "demo",
        "--device",
        "h100",
        "--bandwidth-gb-s",
        "1000",
        "--json",
    ]
    assert main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["floors"]["device"] == "H100"
    assert (data["floors"]["read_gb_per_s"], data["floors"]["tflop_per_s"]) == (1000, 989)
    assert data["weights"]["packed_bytes"] == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GiB", 16 << 30), ("1.5 MB", 1_500_000), ("123", 123), ("2KiB", 2048), ("3TB", 3 * 10**12)],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "16 gigs", "-1GiB", "GiB", "1e9"])
def test_bad_sizes_are_one_line(text, capsys):
    assert main(["plan", "--model", "demo", f"--memory={text}", *LIMITS]) == 1
    assert "a size must look like" in capsys.readouterr().err


def test_profile_prints_tables_and_draws(capsys, monkeypatch, tmp_path):
    machine = {"read_gb_per_s": 10.0, "gemm_tflop_per_s": 1.0}
    monkeypatch.setattr(profile, "measure_machine", lambda device, dtype: machine)
    picture = tmp_path / "profile.png"
    command = ["bench", "--model", "demo", "--workload", "prefix", "--profile", "--rounds", "1"]
    assert main([*command, "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    for needed in ("GEMM", "attention", "host: scheduling", "sampling", "decode steps", "GFLOP/s"):
        assert needed in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["setting"]["workload"] == "prefix"
    assert set(data["workload"]["parts"]) == {*profile.PARTS, "outside steps"}


def test_profile_of_startup_is_refused(capsys):
    assert main(["bench", "--model", "demo", "--workload", "startup", "--profile"]) == 1
    assert "--profile needs a workload of requests" in capsys.readouterr().err
