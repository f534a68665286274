"""vLLM on the CPU, one engine in this process, speaking the protocol of serving.py.

vLLM's default is one process for the engine and one for the worker, with a core kept free for the
first; in one process the worker has every core that was asked for.
"""

import os
import sys
from pathlib import Path

from serving import serve, timed


def settings(threads):
    """What vLLM and OpenMP read from the environment."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    bind = ",".join(map(str, cores))
    found = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_NO_USAGE_STATS": "1",
    }
    libraries = Path(sys.prefix, "lib")
    openmp = libraries / "libiomp5.so"  # vLLM asks for it, and for its binding and short waits
    if openmp.is_file():
        found["LD_PRELOAD"] = str(openmp)
        found["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{bind}]"
        found["KMP_BLOCKTIME"] = "5"
        found["KMP_TPAUSE"] = "0"
    return found


def load(command):
    vllm, import_s = timed(__import__, "vllm")
    arguments = {
        "model": command["model"],
        "skip_tokenizer_init": True,
        "dtype": command["dtype"],
        "max_model_len": command["max_len"],
        "enable_prefix_caching": command["prefix_cache"],
        "generation_config": "vllm",
        "disable_log_stats": False,  # the times of each request
        "seed": 0,
    }
    engine, prepare_s = timed(lambda: vllm.LLM(**arguments))
    import torch

    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    return engine, {"versions": versions, "import_s": import_s, "prepare_s": prepare_s}


def run(engine, requests, sequential):
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        for _, length in requests
    ]

    def generate():
        if sequential:
            pairs = zip(prompts, params, strict=True)
            return [engine.generate([prompt], own, use_tqdm=False)[0] for prompt, own in pairs]
        return engine.generate(prompts, params, use_tqdm=False)

    outputs, seconds = timed(generate)
    answer = {"seconds": seconds, "tokens": [list(each.outputs[0].token_ids) for each in outputs]}
    if all(each.metrics is not None for each in outputs):
        answer["ttft_ms"] = [each.metrics.first_token_latency * 1e3 for each in outputs]
        answer["tpot_ms"] = [
            (each.metrics.last_token_ts - each.metrics.first_token_ts) * 1e3 / (length - 1)
            for each, (_, length) in zip(outputs, requests, strict=True)
            if length > 1
        ]
    return answer


if __name__ == "__main__":
    wanted = settings(int(sys.argv[1]))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)  # LD_PRELOAD is read when a program starts
        os.execv(sys.executable, [sys.executable, *sys.argv])
    serve(load, run)
