"""A peer of the tests: speaks the protocol of fastgen/bench/drivers, and misbehaves as it is told.

The dtype of `load` says what it is to do.
"""

import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "fastgen" / "bench" / "drivers"))
from serving import serve, timed


def spin():
    while True:
        pass


def load(command):
    how = command["dtype"]
    if how == "raises":
        raise MemoryError("no room for\nthe weights")
    if how == "dies":
        sys.stderr.write("the last words\n")
        sys.stderr.flush()
        sys.exit(3)
    if how == "hangs":
        time.sleep(60)
    if how == "spins":
        threading.Thread(target=spin, daemon=True).start()
    if how == "prints":
        sys.stdout.write("libraries say much\n")
        sys.stdout.flush()
    versions = {"stub": "1.0", "threads": sys.argv[1]}
    return command, {"versions": versions, "import_s": 0.5, "prepare_s": 1.5}


def run(command, requests, sequential):
    if command["dtype"] == "takes 64 MiB" and len(requests) > 1:
        bytearray(b"x") * (64 << 20)
    short = command["dtype"] == "stops early" and len(requests) > 1
    tokens = [[prompt[-1]] * (length - short) for prompt, length in requests]
    seconds = timed(time.sleep, 0.01)[1]
    answer = {"seconds": seconds, "tokens": tokens}
    if command["dtype"] != "tells no times":
        answer["ttft_ms"] = [10.0 * (place + 1) for place in range(len(requests))]
        answer["tpot_ms"] = [2.0 for _, length in requests if length > 1]
    return answer


if __name__ == "__main__":
    serve(load, run)
