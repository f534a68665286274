"""`fastgen.Engine`: requests with text, token ids or chat messages, streamed or collected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from .config import Config, SamplingParams, check_limit
from .engine.engine import EngineCore, failure
from .engine.request import Request
from .engine.token_reader import News, TokenReader
from .errors import EngineClosedError, InvalidRequestError
from .optimized import TransformersLoop
from .outputs import Completion, EngineMetrics, RequestOutput, TokenEvent
from .registry import lookup, require
from .text import Prompt, TextStream, bad_word_ids, encode_prompt

# Fields of a generation config that change tokens and that SamplingParams has no name for, with
# the values that switch each off.
_NOT_IN_SAMPLING_PARAMS: dict[str, tuple] = {
    "num_beams": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "watermarking_config": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": (),
    "max_length": (20,),  # which was transformers' default before it was None
    "max_time": (),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
}


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
        if lookup(model) is None or config is not None or fields:
            from .api import optimize  # for a loaded model nothing that captures is imported

            optimize(model, config, **fields)
        self.model, self.tokenizer = model, tokenizer
        self._closed = False

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        """Queue a prompt and return at once.

        Args:
            prompt: str, list of token ids, or list of chat messages.
            params: None takes the model's generation config (sampling, length).
            cache_salt: Only requests of one salt share cached prefixes, so that none can tell from
                the time it takes what another's prompt was.
            priority: Lower is served earlier. Being one less urgent is as having come
                PRIORITY_SECONDS later, so that nobody waits for ever.
            deadline_s: Seconds from now after which the request ends, as far as it has come, with
                finish_reason "deadline".
        Raises: InvalidRequestError, CapacityError, QueueFullError, EngineClosedError.
        """
        core = self._core()
        requests = self._requests(prompt, params, cache_salt, priority, deadline_s)
        core.submit_all(requests, max_queue=core.config.max_queue)
        return requests[0]

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """The request's tokens as they come; leaving the loop early cancels the request.

        With n > 1 the outputs' events are mixed; `TokenEvent.index` tells them apart. A reader may
        be as slow as it likes, and there may be several: each gets all tokens.

        Raises: RequestFailedError if the request ended by an error.
        """
        events = EventStream(request, self.tokenizer)
        try:
            for output, token_id in TokenReader(request.outputs):
                yield events.event(output, token_id)
        finally:
            self.cancel(request)

    def result(self, request: Request) -> RequestOutput:
        """Wait for the end of a request; an error is in the output, not raised."""
        for each in request.outputs:
            each.done.wait()
        return self._output(request)

    def cancel(self, request: Request, *, wait: bool = True) -> None:
        """End a request in any state; its blocks are free when this returns, if it waits."""
        optimized = lookup(self.model)
        if optimized is not None and any(r.finish_reason is None for r in request.outputs):
            optimized.engine().cancel_all(request.outputs, wait)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
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
        core = self._core()
        requests: list[Request] = []
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            try:
                siblings = self._requests(prompt, own, cache_salt, priority, deadline_s)
                core.check(siblings[0])
            except InvalidRequestError as error:
                raise type(error)(f"prompt {index}: {error}") from error
            requests.extend(siblings)
        try:
            core.submit_all(requests, max_queue=core.config.max_queue)
            return [self.result(request) for request in requests if request.index == 0]
        finally:
            core.cancel_all(requests)

    def metrics(self, wait: bool = True) -> EngineMetrics:
        """A snapshot of the engine's counters, after the step that runs.

        wait: False takes it at once, even while a step hangs, and looks at neither the model nor
            its weights.
        Raises: EngineClosedError, NotOptimizedError.
        """
        if not wait:
            self._check_open()
            return require(self.model).engine().metrics(wait=False)
        return self._core().metrics()

    def pause(self) -> None:
        """Run no step until `resume`; requests are taken and wait, the model's `generate()` too."""
        self._core().pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._core().resume()

    def shutdown(self, drain: bool = True) -> None:
        """Take no more requests, wait for those there are (`drain`) or end them, and close.

        A paused engine is resumed to drain. Requests of the model's `generate()` are waited for
        too: it shares the engine.
        """
        optimized = lookup(self.model)
        if drain and not self._closed and optimized is not None:
            core = self._core()
            self._closed = True
            core.resume()
            core.wait_idle()
            optimized.close_engine()
        self.close()

    def close(self) -> None:
        """End all requests and free the KV cache; the model stays optimised."""
        optimized = lookup(self.model)
        if not self._closed and optimized is not None:
            optimized.close_engine()
        self._closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("this engine is closed; make a new one: fastgen.Engine(model)")

    def _core(self) -> EngineCore:
        self._check_open()
        try:
            core = require(self.model).ready(self.model)
            core.fills_gpu = True
            return core
        except TransformersLoop as reason:
            raise EngineClosedError(f"the engine cannot run this model: {reason}") from None

    def _requests(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        cache_salt: str | None,
        priority: int,
        deadline_s: float | None,
    ) -> list[Request]:
        """One request per output of a prompt."""
        if params is None:
            params = self.default_params()
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params must be SamplingParams, got {params!r}")
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise InvalidRequestError(f"cache_salt must be a str, got {cache_salt!r}")
        check_limit("priority", priority)
        deadline = None
        if deadline_s is not None:
            check_limit("deadline_s", deadline_s)
            deadline = time.perf_counter() + deadline_s
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer: Engine(model, tokenizer)")
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= self._eos_token_ids()
        ids = encode_prompt(prompt, self.tokenizer)
        bad_words = bad_word_ids(params.bad_words, self.tokenizer)
        news = News()
        requests = [
            Request(
                ids,
                params,
                frozenset(stops),
                stop_text=TextStream(self.tokenizer, params) if params.stop else None,
                bad_words=bad_words,
                index=index,
                cache_salt=cache_salt,
                priority=priority,
                deadline=deadline,
                prompt_logprobs=[] if params.prompt_logprobs is not None and index == 0 else None,
                news=news,
            )
            for index in range(params.n)
        ]
        if params.n > 1:
            siblings = tuple(requests)
            for request in requests:
                request.siblings = siblings
        return requests

    def _eos_token_ids(self) -> set[int]:
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            return set()
        return {eos} if isinstance(eos, int) else set(eos)

    def default_params(self) -> SamplingParams:
        """Sampling as the model's generation config says: greedy unless do_sample is set."""
        return params_of(self.model.generation_config)

    def _output(self, request: Request) -> RequestOutput:
        return RequestOutput(
            prompt_ids=request.prompt_token_ids,
            outputs=[self._completion(each) for each in request.outputs],
            prompt_logprobs=request.prompt_logprobs,
        )

    def _completion(self, request: Request) -> Completion:
        assert request.finish_reason is not None
        text, reason, error = "", request.finish_reason, request.error
        try:
            text = self._text(request)
        except Exception as raised:  # of the tokenizer; other requests' texts are whole
            reason, error = "error", error or raised
        return Completion(
            index=request.index,
            token_ids=list(request.output_token_ids),
            text=text,
            finish_reason=reason,
            metrics=request.metrics(),
            stop_reason=request.stop_reason,
            logprobs=_asked(request.sampling.logprobs, request.logprobs),
            processed_logprobs=_asked(
                request.sampling.processed_logprobs, request.processed_logprobs
            ),
            error=None if error is None else str(failure(request, error)),
        )

    def _text(self, request: Request) -> str:
        if self.tokenizer is None:
            return ""
        params = request.sampling
        token_ids = [token for token in request.output_token_ids if _has_text(request, token)]
        if not params.stop:
            return self.tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)
        stream = TextStream(self.tokenizer, params)
        text = "".join(stream.take([token_id]) for token_id in token_ids)
        return text + stream.take([], last=True)


def params_of(config: Any) -> SamplingParams:
    """Sampling as a generation config says: greedy unless do_sample is set.

    Raises: InvalidRequestError if it asks for what SamplingParams has no name for.
    """
    for name, off in _NOT_IN_SAMPLING_PARAMS.items():
        if getattr(config, name, None) not in (None, *off):
            raise InvalidRequestError(
                f"generation_config sets {name}={getattr(config, name)!r}, which Engine does "
                "not do (model.generate() does); pass params"
            )
    max_tokens = config.max_new_tokens or SamplingParams.max_tokens
    num_outputs = config.num_return_sequences or 1
    penalty = _or(config.repetition_penalty, 1.0)
    if not config.do_sample:
        return SamplingParams(
            n=num_outputs,
            max_tokens=max_tokens,
            temperature=0.0,
            repetition_penalty=penalty,
        )
    return SamplingParams(
        n=num_outputs,
        max_tokens=max_tokens,
        temperature=_or(config.temperature, 1.0),
        top_k=_or(config.top_k, 50),  # transformers' default when sampling
        top_p=_or(config.top_p, 1.0),
        min_p=_or(config.min_p, 0.0),
        repetition_penalty=penalty,
    )


class EventStream:
    """One reader's events of a prompt's outputs."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self._outputs = [_OutputEvents(output, tokenizer) for output in request.outputs]

    def event(self, request: Request, token_id: int | None) -> TokenEvent:
        """Of an output's next token, or of its end (None).

        Raises: RequestFailedError if it ended by an error.
        """
        output = self._outputs[request.index]
        if token_id is not None:
            return output.token(token_id)
        if request.error is not None:
            raise failure(request)
        return output.finish()


class _OutputEvents:
    """One output's events: its text and the place in its logprobs."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.request = request
        self._text = TextStream(tokenizer, request.sampling) if tokenizer is not None else None
        self._num_tokens = 0

    def token(self, token_id: int) -> TokenEvent:
        request, here = self.request, slice(self._num_tokens, self._num_tokens + 1)
        self._num_tokens += 1
        text = ""
        if self._text is not None and _has_text(self.request, token_id):
            text = self._text.take([token_id])
        return TokenEvent(
            [token_id],
            text,
            index=request.index,
            logprobs=_asked(request.sampling.logprobs, request.logprobs[here]),
            processed_logprobs=_asked(
                request.sampling.processed_logprobs, request.processed_logprobs[here]
            ),
        )

    def finish(self) -> TokenEvent:
        return TokenEvent(
            [],
            self._text.take([], last=True) if self._text else "",
            self.request.finish_reason,
            self.request.metrics(),
            self.request.index,
            stop_reason=self.request.stop_reason,
        )


def _has_text(request: Request, token_id: int) -> bool:
    """Whether a token's text is shown: that of the end or stop token only if it was asked for."""
    return request.sampling.include_stop_str_in_output or token_id not in request.stop_token_ids


def _asked(count: int | None, logprobs: list) -> list | None:
    return None if count is None else list(logprobs)


def _or(value: float | None, default: Any) -> Any:
    return default if value is None else value
