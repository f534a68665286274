"""stop_strings of a call: transformers makes no criterion of them for a loop that is not its own.

It looks for the tokenizer among the arguments of its own loops only. So the call is prepared
without stop strings, and their criterion is put where transformers would have put it.
"""

from __future__ import annotations

import copy
from typing import Any

from .support import chosen


def take_stop_strings(model: Any, arguments: dict[str, Any]) -> Any:
    """The criterion of the call's stop strings, which are taken out of `arguments`; None without.

    Without a tokenizer they stay there, for transformers to raise its error.
    """
    from transformers import StopStringCriteria

    wanted, tokenizer = chosen(model, arguments, "stop_strings"), arguments.get("tokenizer")
    if wanted is None or tokenizer is None:
        return None
    given = arguments.get("generation_config")
    own = getattr(model.generation_config, "stop_strings", None)
    if "stop_strings" in arguments or given is None or own is not None:
        arguments["stop_strings"] = None
    if given is not None and given.stop_strings is not None:
        arguments["generation_config"] = given = copy.copy(given)
        given.stop_strings = None
    return StopStringCriteria(stop_strings=wanted, tokenizer=tokenizer)


def with_stop_strings(criteria: Any, stop_strings: Any, generation_config: Any) -> Any:
    """The criteria with that of the stop strings in transformers' order: after length and time.

    One of the caller's own takes its place, as transformers has it.
    """
    if stop_strings is None:
        return criteria
    own = [item for item in criteria if type(item) is type(stop_strings)]
    merged = [item for item in criteria if type(item) is not type(stop_strings)]
    place = sum(getattr(generation_config, name) is not None for name in ("max_length", "max_time"))
    merged[place:place] = own[:1] or [stop_strings]
    return type(criteria)([*merged, *own[1:]])
