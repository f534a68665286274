"""Check fastgen on this machine's GPU: tokens against transformers', and tokens per second.

    python examples/gpu_check.py --out results/gpu            # on a machine with a CUDA device
    python examples/gpu_check.py --out DIR --device cpu       # a dry run of the same code

Sections run in order, each within its time box; each writes its JSON when it ends, so that a run
that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fastgen

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}


def prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def transformers_tokens(model, rows: list[list[int]], num_tokens: int) -> list[list[int]]:
    out = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        out.append(model.generate(ids, max_new_tokens=num_tokens, do_sample=False)[0, len(row) :])
    return [tokens.tolist() for tokens in out]


def equality(device: str) -> dict:
    """fp32 greedy tokens of tiny random models, alone and batched, against transformers'."""
    results = {}
    for name, (model_class, config_class) in FAMILIES.items():
        torch.manual_seed(0)
        model = model_class(config_class(**TINY)).to(device).eval()
        rows = prompts([1, 16, 33, 70], TINY["vocab_size"])
        expected = transformers_tokens(model, rows, 32)
        fastgen.optimize(model, max_num_batched_tokens=64)
        with fastgen.Engine(model) as engine:
            params = fastgen.SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
            found = [output.token_ids for output in engine.generate(rows, params)]
        results[name] = {
            "equal": found == expected,
            "kernels": fastgen.explain(model).report.kernels,
        }
    return results


def speed(device: str, small: bool) -> dict:
    """bf16 tokens/s of a 0.5B shape with random weights: 32 requests, and transformers on 4."""
    scale = {"num_hidden_layers": 2, "vocab_size": 1024} if small else {}
    shape = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = Qwen2Config(**{**shape, **scale})
    model = Qwen2ForCausalLM(config).to(device, torch.bfloat16).eval()
    num_tokens = 8 if small else 64
    rows = prompts([16 + 15 * i for i in range(32)], config.vocab_size)
    start = time.perf_counter()
    transformers_tokens(model, rows[::8], num_tokens)
    one_by_one = 4 * num_tokens / (time.perf_counter() - start)
    start = time.perf_counter()
    fastgen.optimize(model)
    seconds_to_optimize = time.perf_counter() - start
    params = fastgen.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    with fastgen.Engine(model) as engine:
        engine.generate(rows[:2], params)
        start = time.perf_counter()
        engine.generate(rows, params)
        rate = 32 * num_tokens / (time.perf_counter() - start)
    return {
        "fastgen_tokens_per_s": rate,
        "transformers_one_by_one_tokens_per_s": one_by_one,
        "ratio": rate / one_by_one,
        "optimize_s": seconds_to_optimize,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=480, help="time for all sections")
    arguments = parser.parse_args()
    device, small = arguments.device, arguments.device == "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; use --device cpu for a dry run")
    # Each section with the share of the budget it needs; one that would come too late is skipped.
    sections = {
        "equality": (0.4, lambda: equality(device)),
        "speed": (0.6, lambda: speed(device, small)),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastgen": fastgen.__version__,
    }
    begin, failed = time.perf_counter(), False
    for name, (share, section) in sections.items():
        start = time.perf_counter()
        left = arguments.budget_s - (start - begin)
        record = {"section": name, "machine": machine, "device": device}
        if left < share * arguments.budget_s:
            record["skipped"] = f"{left:.0f} s left, {share * arguments.budget_s:.0f} s needed"
        else:
            try:
                record["result"] = section()
            except Exception as error:  # the next section must still run
                record["error"], failed = f"{type(error).__name__}: {error}", True
        record["seconds"] = time.perf_counter() - start
        (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        print(name, json.dumps(record, indent=2))
        if name == "equality" and not all(r["equal"] for r in record.get("result", {}).values()):
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
