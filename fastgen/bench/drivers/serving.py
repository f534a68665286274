"""What every driver does: commands as JSON lines on stdin, one JSON line of answer to each.

A driver is started with the number of threads as its argument.
load: {model, dtype, max_len, prefix_cache} -> {versions, import_s, prepare_s, first_token_s,
second_token_s, and, where there is something to say, convert_s and note}
run: {requests: [[prompt ids, number of tokens], ...], sequential} -> {seconds, tokens, and, if the
peer tells them, ttft_ms (an item per request) and tpot_ms (per request of two tokens or more)}
stop: no answer. A command that fails is answered with {error}.
"""

import json
import os
import sys
import time

PROMPT = list(range(1, 33))  # of the first token and, each id 50 higher, of the second


def serve(load, run):
    """Answer commands until `stop` or the end of stdin.

    Args:
        load: command -> (state, answer), `state` being what `run` gets.
        run: (state, requests, sequential) -> answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries and their processes print is no answer
    state = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            return
        try:
            if command["do"] == "load":
                state, answer = load(command)
                for name, shift in (("first_token_s", 0), ("second_token_s", 50)):
                    prompt = [token + shift for token in PROMPT]
                    answer[name] = run(state, [[prompt, 1]], True)["seconds"]
            else:
                answer = run(state, command["requests"], command["sequential"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(function, *arguments):
    """What a call returns, and the seconds it took."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start
