"""The patched generate(): native where the engine can do all of a call, else transformers' loop.

The patch sits on the class and looks the instance up, so that a copy of an optimised model, a
pickle of it, or another model of its class is simply not found and runs as it always did.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..capture import takes_positions
from ..engine.engine import EngineCore
from ..errors import CapacityError, UnsupportedModelError
from ..passes import PLAIN, Variant
from .beam_loop import run_beam_loop
from .free_running import may_run_free, run_free
from .prepared import PreparedCall, TransformersLoop
from .returned_cache import check_kinds
from .rows import columns, requests_of
from .sample_loop import run_sample_loop
from .stop_strings import take_stop_strings, with_stop_strings
from .support import check_call, check_variant

_PATCH_MARK = "_fastgen_original"


class Optimized(Protocol):
    """What generate() needs to know of an optimised model."""

    def ready(self, model: Any, variant: Variant = PLAIN) -> EngineCore:
        """The model's engine; raises TransformersLoop if it cannot run the model as it is.

        variant: What the requests will need.
        """
        ...

    def count_fallback(self, reason: str) -> None: ...


def patch(cls: type, lookup: Callable[[Any], Optimized | None]) -> None:
    """Make `cls.generate` ask `lookup` first. A class is patched once.

    Raises: UnsupportedModelError if the class has a generate() of its own.
    """
    from transformers import GenerationMixin

    current = cls.generate  # pyright: ignore
    if getattr(current, _PATCH_MARK, None) is not None:
        return
    if current is not GenerationMixin.generate:  # pyright: ignore
        raise UnsupportedModelError(f"{cls.__name__} has a generate() of its own")

    @functools.wraps(current)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimized = lookup(self)
        if optimized is None:
            return current(self, *args, **kwargs)
        try:
            return _generate_native(current, optimized, self, args, kwargs)
        except TransformersLoop as reason:
            optimized.count_fallback(str(reason))
            return current(self, *args, **kwargs)

    setattr(generate, _PATCH_MARK, current)
    cls.generate = generate  # pyright: ignore


def unpatch(cls: type) -> None:
    """Take the patch away from a class."""
    if getattr(vars(cls).get("generate"), _PATCH_MARK, None) is not None:
        del cls.generate  # pyright: ignore


def _generate_native(
    original: Callable[..., Any],
    optimized: Optimized,
    model: Any,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    arguments = _bind(original, model, args, kwargs)
    check_call(model, arguments)
    engine = optimized.ready(model)
    streamer = arguments.pop("streamer", None)
    arguments.pop("custom_generate", None)  # None, if it is there
    stop_strings = take_stop_strings(model, arguments)

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        if generation_config.return_dict_in_generate and "past_key_values" in model_kwargs:
            check_kinds(model, engine)
        attention_mask = model_kwargs.get("attention_mask")
        position_ids = model_kwargs.get("position_ids")
        if position_ids is None and not takes_positions(model):
            position_ids = columns(input_ids, attention_mask)
        call = PreparedCall(
            model,
            engine,
            input_ids,
            logits_processor,
            with_stop_strings(stopping_criteria, stop_strings, generation_config),
            generation_config,
            streamer,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=model_kwargs.get("past_key_values"),
            inputs_embeds=model_kwargs.get("inputs_embeds"),
        )
        if call.variant != PLAIN:
            check_variant(call)
            call.engine = optimized.ready(model, call.variant)
        return _decode(call)

    return original(model, **arguments, custom_generate=decode)


def _bind(original: Callable, model: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All that was passed by name, those of **kwargs among them, without self.

    None stays: for a field of GenerationConfig it is a value, which overrides the model's own.
    """
    try:
        bound = inspect.signature(original).bind(model, *args, **kwargs)
    except TypeError as error:
        raise TransformersLoop(str(error)) from None
    arguments = dict(bound.arguments)
    arguments.pop("self")
    return arguments | arguments.pop("kwargs", {})


def _decode(call: PreparedCall) -> Any:
    """The loop itself, if the engine can run these rows."""
    requests = requests_of(call)
    try:
        for request in requests:
            call.engine.check(request)
    except (CapacityError, ValueError) as error:
        raise TransformersLoop(str(error)) from None
    free = may_run_free(call)
    if not free:
        together = len(requests) <= call.engine.config.max_num_seqs
        if not (together and call.engine.fits(requests)):
            raise TransformersLoop(
                f"{len(requests)} rows of this length do not fit the engine together"
            )
    if call.streamer is not None:
        call.streamer.put(call.input_ids.cpu())
    if free:
        return run_free(call, requests)
    return (run_beam_loop if call.num_beams > 1 else run_sample_loop)(call, requests)
