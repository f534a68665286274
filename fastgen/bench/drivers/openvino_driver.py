"""OpenVINO GenAI's continuous batching on the CPU, speaking the protocol of serving.py.

The model is converted by optimum-intel, in the precision of its weights, before anything is timed.
OpenVINO stores keys and values in 8 bits unless told otherwise; here they have the measured dtype,
as in the other engines. Requests that are added at once do not share a prefix, only with requests
that ran before them (seen with 2026.4).
"""

import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from serving import serve, timed

THREADS = int(sys.argv[1])
PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def convert(model, target):
    """Write the IR in a process of its own: its memory is not the peer's."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", model, "--task", "text-generation-with-past"]
    command += ["--disable-convert-tokenizer", str(target)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def load(command):
    target = Path(command["model"] + "-openvino")
    answer = {}
    if not target.is_dir():
        answer["convert_s"] = timed(convert, command["model"], target)[1]
    genai, answer["import_s"] = timed(__import__, "openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = command["prefix_cache"]
    precision = PRECISIONS[command["dtype"]]
    properties = {
        "INFERENCE_NUM_THREADS": THREADS,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
    }

    def pipeline():
        return genai.ContinuousBatchingPipeline(str(target), scheduler, "CPU", properties)

    made, answer["prepare_s"] = timed(pipeline)
    # A pipeline never forgets the prefixes that it has cached: each run takes a new one.
    state = {"pipeline": made, "again": pipeline if command["prefix_cache"] else None}
    packages = ("openvino-genai", "openvino", "optimum-intel")
    answer["versions"] = {name: version(name) for name in packages}
    return state, answer


def run(state, requests, sequential):
    import numpy as np
    import openvino
    import openvino_genai as genai

    if state["again"] is not None:
        state["pipeline"] = None
        state["pipeline"] = state["again"]()
        _generate(state["pipeline"], [submit_arguments(genai, openvino, np, [1, 2, 3], 2)])
    prepared = [submit_arguments(genai, openvino, np, *request) for request in requests]
    groups = [[one] for one in prepared] if sequential else [prepared]
    results, seconds = timed(lambda: [_generate(state["pipeline"], group) for group in groups])
    items = [item for group in results for item in group]
    return {
        "seconds": seconds,
        "tokens": [tokens for tokens, _, _ in items],
        "ttft_ms": [first * 1e3 for _, first, _ in items],
        "tpot_ms": [
            (last - first) * 1e3 / (len(tokens) - 1)
            for tokens, first, last in items
            if len(tokens) > 1
        ],
    }


def submit_arguments(genai, openvino, np, prompt, length):
    """A tensor [1, len(prompt)] int64, and greedy sampling of `length` tokens."""
    config = genai.GenerationConfig()
    config.set_eos_token_id(0)  # one is demanded, and ignored
    config.ignore_eos = True
    config.do_sample = False
    config.max_new_tokens = length
    return openvino.Tensor(np.array([prompt], dtype=np.int64)), config


def _generate(pipeline, prepared):
    """[(tokens, seconds to the first, seconds to the last), ...] of requests added at once."""
    start = time.perf_counter()
    handles = [pipeline.add_request(number, *item) for number, item in enumerate(prepared)]
    found = [[[], 0.0, 0.0] for _ in handles]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now = time.perf_counter() - start
        for handle, item in zip(handles, found, strict=True):
            if handle.can_read():
                if not item[0]:
                    item[1] = now
                for output in handle.read().values():
                    item[0].extend(output.generated_ids)
                item[2] = now
    return found


if __name__ == "__main__":
    serve(load, run)
