"""`model.generate()` on the engine, with transformers' signature, semantics and return classes.

transformers prepares the call itself (validation, masks, positions, processors, criteria) and then
runs what is passed as `custom_generate` in place of its own loop; that is where the engine comes
in. What the engine cannot do exactly is run by transformers' own loop, on the unpatched path.

The patch sits on the class and looks the instance up, so that a copy of an optimised model, a
pickle of it, or another model of its class is simply not found and runs as it always did.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .config import INT32_MAX, SamplingParams
from .engine.engine import EngineCore, failure
from .engine.lockstep import LockstepGroup
from .engine.request import Request, iterate_events
from .errors import CapacityError, UnsupportedModelError

_PATCH_MARK = "_fastgen_original"

# Arguments and generation-config fields that transformers' own loop is left to do, with the value
# that switches each off.
_LOOP_ARGUMENTS = {
    "custom_generate": (None,),
    "assistant_model": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "synced_gpus": (None, False),
}
_LOOP_FIELDS = {
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "guidance_scale": (None, 1.0),
    "cache_implementation": (None, "dynamic"),
    "use_cache": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "is_assistant": (None, False),
    "low_memory": (None, False),
}
# Inputs of the model itself that the engine takes over.
_MODEL_INPUTS = {"input_ids", "attention_mask"}


class Optimized(Protocol):
    """What generate() needs to know of an optimised model."""

    def ready(self, model: Any) -> EngineCore:
        """The model's engine; raises TransformersLoop if it cannot run the model as it is."""
        ...

    def count_fallback(self, reason: str) -> None: ...


class TransformersLoop(Exception):
    """Raised where the engine finds that transformers' own loop must run; str() is the reason."""


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
    _check_call(model, arguments)
    engine = optimized.ready(model)
    streamer = arguments.pop("streamer", None)

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        call = _Call(
            engine,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            model_kwargs,
        )
        return call.run()

    return original(model, **arguments, custom_generate=decode)


def _bind(original: Callable, model: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments by name, those of **kwargs among them, without self and those left None."""
    try:
        bound = inspect.signature(original).bind(model, *args, **kwargs)
    except TypeError as error:
        raise TransformersLoop(str(error)) from None
    arguments = dict(bound.arguments)
    arguments.pop("self")
    arguments.update(arguments.pop("kwargs", {}))
    return {name: value for name, value in arguments.items() if value is not None}


def _check_call(model: Any, arguments: dict[str, Any]) -> None:
    """Raise TransformersLoop if something that was asked for is not the engine's to do."""
    from transformers import GenerationConfig

    for name, off in _LOOP_ARGUMENTS.items():
        if (value := arguments.get(name)) is not None and value not in off:
            raise TransformersLoop(f"{name} is set")
    given = arguments.get("generation_config")
    for name, off in _LOOP_FIELDS.items():
        for value in (
            arguments.get(name),
            getattr(given, name, None),
            getattr(model.generation_config, name, None),
        ):
            if value is not None:  # the first that is set wins, as transformers merges them
                if value not in off:
                    raise TransformersLoop(f"{name}={value!r}")
                break
    known = set(vars(GenerationConfig())) | set(inspect.signature(type(model).generate).parameters)
    for name in arguments:
        if name not in known and name not in _MODEL_INPUTS and name != "tokenizer":
            raise TransformersLoop(f"the model input {name}")
    if torch.is_autocast_enabled(model.device.type):
        raise TransformersLoop("autocast is on")
    if _get_current_dispatch_mode() is not None:
        raise TransformersLoop("a torch dispatch mode is active")
    if dropout := _active_dropout(model):
        raise TransformersLoop(f"the model is in training mode with dropout ({dropout})")


def _active_dropout(model: Any) -> str | None:
    if not model.training:
        return None
    for name, value in vars(model.config).items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0:
            return f"config.{name}={value}"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0 and module.training:
            return f"{name}.p={module.p}"
    return None


class _Call:
    """One decoding loop: transformers has prepared everything, the engine computes the logits."""

    def __init__(
        self,
        engine: EngineCore,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.input_ids = input_ids
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.generation_config = generation_config
        self.streamer = streamer
        self.attention_mask = model_kwargs.get("attention_mask")
        self.position_ids = model_kwargs.get("position_ids")
        self.past_key_values = model_kwargs.get("past_key_values")
        self.max_new_tokens = self._max_new_tokens()
        self.requests = self._requests()

    def run(self) -> Any:
        free_running = self._free_running()
        try:
            for request in self.requests:
                self.engine.check(request)
        except (CapacityError, ValueError) as error:
            raise TransformersLoop(str(error)) from None
        if not free_running:
            together = len(self.requests) <= self.engine.config.max_num_seqs
            if not (together and self.engine.fits(self.requests)):
                raise TransformersLoop(
                    f"{len(self.requests)} rows of this length do not fit the engine together"
                )
        if self.streamer is not None:
            self.streamer.put(self.input_ids.cpu())
        return self._run_free() if free_running else self._run_lockstep()

    def _max_new_tokens(self) -> int:
        """Tokens until every row must stop, by the length criterion transformers has made."""
        from transformers import MaxLengthCriteria

        lengths = [
            criterion.max_length
            for criterion in self.stopping_criteria
            if isinstance(criterion, MaxLengthCriteria)
        ]
        if not lengths:
            raise TransformersLoop("no length limit")
        return min(lengths) - self.input_ids.shape[1]

    def _free_running(self) -> bool:
        """Whether rows may run at their own pace: greedy, and nothing looks at all rows at once."""
        from transformers import EosTokenCriteria, MaxLengthCriteria

        config = self.generation_config
        return (
            not config.do_sample
            and not config.return_dict_in_generate
            and len(self.logits_processor) == 0
            and all(
                type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in self.stopping_criteria
            )
            and (self.streamer is None or len(self.requests) == 1)
        )

    def _eos_token_ids(self) -> frozenset[int]:
        ids: set[int] = set()
        for criterion in self.stopping_criteria:
            if (eos := getattr(criterion, "eos_token_id", None)) is not None:
                ids.update(torch.as_tensor(eos).flatten().tolist())
        return frozenset(ids)

    def _requests(self) -> list[Request]:
        """A request per row: its visible tokens, and the row's last token if that is hidden."""
        if not 0 < self.max_new_tokens <= INT32_MAX:
            raise TransformersLoop(f"{self.max_new_tokens} new tokens are asked for")
        if self.input_ids.dim() != 2 or self.input_ids.is_floating_point():
            raise TransformersLoop("input_ids are not a matrix of integers")
        sampling = SamplingParams(max_tokens=self.max_new_tokens, temperature=0.0)
        stop_token_ids = self._eos_token_ids()
        rows: list[list[int]] = self.input_ids.tolist()
        masks = [[1] * len(row) for row in rows]
        if self.attention_mask is not None:
            if self.attention_mask.shape != self.input_ids.shape:
                raise TransformersLoop("attention_mask and input_ids differ in shape")
            masks = self.attention_mask.tolist()
        positions = self._positions(rows, masks)
        counts = any(layer.counts_places for layer in self.engine.compiled.spec.layers)
        requests = []
        for row, mask, places in zip(rows, masks, positions, strict=True):
            visible = [i for i, seen in enumerate(mask) if seen]
            if not visible:
                raise TransformersLoop("a row is masked completely")
            if [places[i] for i in visible] != list(range(len(visible))):
                raise TransformersLoop("positions do not count a row's tokens")
            if counts and len(mask) - visible[0] > len(visible):
                raise TransformersLoop(
                    "attention counts tokens (a sliding window, chunks, ALiBi), and some within a "
                    "row are masked"
                )
            request = Request(
                [row[i] for i in visible],
                sampling,
                stop_token_ids,
                first_output_position=places[-1] + 1,
                stream=self.streamer is not None,
            )
            if not mask[-1]:
                request.query_token_id, request.query_position = row[-1], places[-1]
            requests.append(request)
        return requests

    def _positions(self, rows: list[list[int]], masks: list[list[int]]) -> list[list[int]]:
        if self.position_ids is None:  # the model takes none: it numbers a row's tokens itself
            if not all(mask[-1] for mask in masks):
                raise TransformersLoop("the model takes no position_ids, and a last slot is masked")
            return [[max(0, seen - 1) for seen in itertools.accumulate(mask)] for mask in masks]
        positions = self.position_ids.expand(len(rows), -1)
        if positions.shape != self.input_ids.shape:
            raise TransformersLoop("position_ids and input_ids differ in shape")
        return positions.tolist()

    def _run_free(self) -> torch.Tensor:
        """Each row ends on its own; short ones are padded, as transformers' loop would have."""
        device = self.input_ids.device
        try:
            self.engine.submit_all(self.requests)
            for request in self.requests:
                for kind, token_id, _ in iterate_events([request]):
                    if kind == "token":
                        self.streamer.put(torch.tensor([token_id]))
                if request.finish_reason in ("error", "cancelled"):
                    raise failure(request)
        finally:
            self.engine.cancel_all(self.requests)
        if self.streamer is not None:
            self.streamer.end()
        longest = max(len(request.output_token_ids) for request in self.requests)
        pad = self.generation_config._pad_token_tensor
        pad_id = 0 if pad is None else int(pad)  # without end tokens all rows are of one length
        padded = [
            request.output_token_ids + [pad_id] * (longest - len(request.output_token_ids))
            for request in self.requests
        ]
        new_tokens = torch.tensor(padded, dtype=torch.long, device=device)
        return torch.cat([self.input_ids, new_tokens], dim=-1)

    def _run_lockstep(self) -> Any:
        """All rows step together, finished ones too: transformers' order of everything."""
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        config, input_ids = self.generation_config, self.input_ids
        as_dict = config.return_dict_in_generate
        scores: Any = () if as_dict and config.output_scores else None
        raw_logits: Any = () if as_dict and config.output_logits else None
        pads_finished = any(hasattr(c, "eos_token_id") for c in self.stopping_criteria)
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        for request in self.requests:
            request.stop_token_ids, request.stream = frozenset(), False
        with LockstepGroup(self.engine, self.requests) as group:
            while True:
                logits = group.next_logits().to(
                    copy=True, dtype=torch.float32, device=input_ids.device
                )
                next_scores = self.logits_processor(input_ids, logits)
                if scores is not None:
                    scores += (next_scores,)
                if raw_logits is not None:
                    raw_logits += (logits,)
                if config.do_sample:
                    probabilities = torch.softmax(next_scores, dim=-1)
                    tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
                else:
                    tokens = torch.argmax(next_scores, dim=-1)
                if pads_finished:
                    pad = config._pad_token_tensor.to(input_ids.device)
                    tokens = tokens * unfinished + pad * (1 - unfinished)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                unfinished = unfinished & ~self.stopping_criteria(input_ids, scores)
                if self.streamer is not None:
                    self.streamer.put(tokens.cpu())
                if unfinished.max() == 0:
                    break
                group.feed(tokens.tolist())
            if as_dict:
                self._fill_cache(input_ids.shape[1] - 1)
        if self.streamer is not None:
            self.streamer.end()
        if not as_dict:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,  # pyright: ignore
            scores=scores,
            logits=raw_logits,
            past_key_values=self.past_key_values,
        )

    def _fill_cache(self, length: int) -> None:
        """Copy the rows' keys and values into the cache object that transformers returns.

        Hidden prompt slots, which nothing ever attends to, are zero.
        """
        if self.past_key_values is None:
            return
        rows = self.engine.read_caches(self.requests)
        num_rows, num_prompt = self.input_ids.shape
        mask = self.attention_mask
        visible = torch.ones(num_rows, length, dtype=torch.bool, device=self.input_ids.device)
        if mask is not None:
            visible[:, :num_prompt] = mask.bool()
        for layer in range(len(rows[0])):
            pair = []
            for role in (0, 1):
                first = rows[0][layer][role]
                full = first.new_zeros((num_rows, first.shape[0], length, first.shape[2]))
                for row, layers in enumerate(rows):
                    full[row, :, visible[row].to(first.device)] = layers[layer][role]
                pair.append(full)
            self.past_key_values.update(*pair, layer)
