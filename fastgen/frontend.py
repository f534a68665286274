"""`fastgen.Engine`: requests with text, token ids or chat messages, streamed or collected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import api
from .config import Config, SamplingParams
from .engine.engine import EngineCore, failure
from .engine.request import Request
from .errors import EngineClosedError, InvalidRequestError
from .generate import TransformersLoop
from .outputs import EngineMetrics, RequestOutput, TokenEvent
from .text import Detokenizer, Prompt, encode_prompt


class Engine:
    """Continuous batching over one model, request by request.

    Optimises the model if it is not; shares the KV cache pool and the thread with its
    `generate()`. Methods may be called from any thread.

    Args:
        model: A transformers causal LM.
        tokenizer: Needed for text and chat prompts and for text output.
        config, fields: As for `fastgen.optimize`; left out, an optimised model keeps its own.
    Raises: as `fastgen.optimize`.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, config: Config | None = None, **fields: Any
    ) -> None:
        if api.lookup(model) is None or config is not None or fields:
            api.optimize(model, config, **fields)
        self.model, self.tokenizer = model, tokenizer
        self._closed = False

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, stream: bool = True
    ) -> Request:
        """Queue a prompt and return at once.

        Args:
            prompt: str, list of token ids, or list of chat messages.
            params: None takes the model's generation config (sampling, length).
            stream: Whether `stream` will be used; `result` works in both cases.
        Raises: InvalidRequestError, CapacityError, EngineClosedError.
        """
        request = self._request(prompt, params, stream)
        self._core().submit(request)
        return request

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """The request's tokens as they come; leaving the loop early cancels the request.

        Raises: RequestFailedError if the request ended by an error.
        """
        detokenizer = Detokenizer(self.tokenizer) if self.tokenizer is not None else None
        try:
            while (event := request.next_event())[0] == "token":
                text = detokenizer.push([event[1]]) if detokenizer else ""
                yield TokenEvent([event[1]], text)
            if request.error is not None:
                raise failure(request)
            text = detokenizer.push([], last=True) if detokenizer else ""
            yield TokenEvent([], text, request.finish_reason, request.metrics())
        finally:
            self.cancel(request)

    def result(self, request: Request) -> RequestOutput:
        """Wait for the end of a request; an error is in the output, not raised."""
        request.done.wait()
        return self._output(request)

    def cancel(self, request: Request) -> None:
        """End a request in any state; its blocks are free when this returns."""
        optimized = api.lookup(self.model)
        if optimized is not None and request.finish_reason is None:
            optimized.engine().cancel_all([request])

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
    ) -> list[RequestOutput]:
        """Run prompts together and wait; outputs in the order of the prompts.

        Raises: InvalidRequestError or CapacityError before anything runs, naming the prompt.
        """
        if isinstance(prompts, str):
            raise InvalidRequestError("prompts must be a list of prompts, got a str")
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequestError(
                f"params must be one or one per prompt ({len(prompts)}), got {len(params)}"
            )
        core, requests = self._core(), []
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self._request(prompt, own, stream=False))
                core.check(requests[-1])
            except InvalidRequestError as error:
                raise type(error)(f"prompt {index}: {error}") from error
        try:
            core.submit_all(requests)
            return [self.result(request) for request in requests]
        finally:
            core.cancel_all(requests)

    def metrics(self) -> EngineMetrics:
        """A snapshot of the engine's counters."""
        return self._core().metrics()

    def close(self) -> None:
        """End all requests and free the KV cache; the model stays optimised."""
        optimized = api.lookup(self.model)
        if not self._closed and optimized is not None:
            optimized.close_engine()
        self._closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _core(self) -> EngineCore:
        if self._closed:
            raise EngineClosedError("this engine is closed; make a new one: fastgen.Engine(model)")
        try:
            return api.require(self.model).ready(self.model)
        except TransformersLoop as reason:
            raise EngineClosedError(f"the engine cannot run this model: {reason}") from None

    def _request(self, prompt: Prompt, params: SamplingParams | None, stream: bool) -> Request:
        if params is None:
            params = self.default_params()
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params must be SamplingParams, got {params!r}")
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= self._eos_token_ids()
        ids = encode_prompt(prompt, self.tokenizer)
        return Request(ids, params, frozenset(stops), stream=stream)

    def _eos_token_ids(self) -> set[int]:
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            return set()
        return {eos} if isinstance(eos, int) else set(eos)

    def default_params(self) -> SamplingParams:
        """Sampling as the model's generation config says: greedy unless do_sample is set."""
        config = self.model.generation_config
        max_tokens = config.max_new_tokens or SamplingParams.max_tokens
        if not config.do_sample:
            return SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(config.temperature, 1.0),
            top_k=_or(config.top_k, 50),  # transformers' default when sampling
            top_p=_or(config.top_p, 1.0),
        )

    def _output(self, request: Request) -> RequestOutput:
        assert request.finish_reason is not None
        text = ""
        if self.tokenizer is not None:
            text = self.tokenizer.decode(request.output_token_ids, skip_special_tokens=True)
        return RequestOutput(
            prompt_ids=request.prompt_token_ids,
            token_ids=list(request.output_token_ids),
            text=text,
            finish_reason=request.finish_reason,
            metrics=request.metrics(),
            error=None if request.error is None else str(failure(request)),
        )


def _or(value: float | None, default: Any) -> Any:
    return default if value is None else value
