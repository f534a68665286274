"""fastgen plan: what a model will take and how fast it can be at best, before it is loaded."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..bench.machine import measure_machine
from ..config import Config
from ..planning import DEVICES, Device, plan, read_config, weight_dtype
from .models import DTYPES, SHAPES, demo_model_dir, shape_config

_UNITS = {"": 1, **{f"{u}B": 1000**i for i, u in enumerate("KMGT", 1)}}
_UNITS |= {f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan", help="memory and floors of TTFT and TPOT from a config alone", description=__doc__
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=SHAPES, help="a known shape")
    source.add_argument(
        "--model", metavar="PATH", type=Path, help="a model folder, its config.json, or 'demo'"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's; bfloat16 of shapes")
    parser.add_argument("--memory", metavar="SIZE", help="what all may take together, e.g. 16GiB")
    parser.add_argument("--max-model-len", type=int, help="default: the model's")
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        default = getattr(Config, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=default, help=f"default: {default}")
    parser.add_argument("--no-pack", action="store_true", help="no packed copies of weights")
    parser.add_argument("--prompt", type=int, help="tokens for TTFT; default: at most 512")
    parser.add_argument("--batch", type=int, default=1, help="sequences for TPOT; default: 1")
    parser.add_argument("--context", type=int, help="tokens in each of them; default: --prompt")
    parser.add_argument(
        "--device",
        choices=("this", *DEVICES),
        default="this",
        help="whose limits: this CPU's, measured, or a data sheet's; default: this",
    )
    parser.add_argument("--bandwidth-gb-s", type=float, help="in place of the device's")
    parser.add_argument("--tflops", type=float, help="in place of the device's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.shape:
        config, default = shape_config(arguments.shape), torch.bfloat16
    else:
        folder = demo_model_dir() if str(arguments.model) == "demo" else arguments.model
        config, default = read_config(folder), None
    dtype = DTYPES[arguments.dtype] if arguments.dtype else weight_dtype(config, default)
    result = plan(
        config,
        dtype=dtype,
        memory_bytes=None if arguments.memory is None else parse_size(arguments.memory),
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        block_size=arguments.block_size,
        pack=False if arguments.no_pack else Config.pack,
        device=_device(arguments, dtype),
        prompt_tokens=arguments.prompt,
        batch=arguments.batch,
        context_tokens=arguments.context,
    )
    print(result.to_json() if arguments.json else result)
    return 0


def _device(arguments: argparse.Namespace, dtype: torch.dtype) -> Device:
    bandwidth, tflops = arguments.bandwidth_gb_s, arguments.tflops
    if arguments.device == "this":
        measured: dict[str, Any] = {}
        if bandwidth is None or tflops is None:
            measured = measure_machine(torch.device("cpu"), dtype)
        return Device(
            "this CPU" if measured else "as given",
            bandwidth if bandwidth is not None else measured["read_gb_per_s"],
            tflops if tflops is not None else measured["gemm_tflop_per_s"],
            packs=True,
        )
    device = DEVICES[arguments.device]
    if bandwidth is not None:
        device = replace(device, read_gb_per_s=bandwidth)
    if tflops is not None:
        device = replace(device, tflop_per_s=tflops, itemsize=None)
    return device


def parse_size(text: str) -> int:
    """Bytes of "16GiB", "500MB" or "1000000". Raises: ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)?", text)
    if match is None:
        raise ValueError(f"a size must look like 16GiB, 500MB or 1000000, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])
