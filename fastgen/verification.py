"""`fastgen.verify(model, prompts)`: does fastgen compute what transformers computes, and if not,
where do they part?

Both make the greedy continuation of every prompt. Then fastgen's engine is fed transformers' tokens
and its logits are compared with transformers', so that they stay comparable after tokens differ.
Last, the outputs of the decoder layers are compared on one sequence: fastgen's rewritten graph,
run node by node, and the plain forward.

What transformers differs by from itself is measured on the same sequences, and is the noise that
every difference is judged against: its own plain forward, without a cache, in a batch of several
equal rows, and with results rounded otherwise at random (as another order of the same sums would
do). TOLERANCE times that is not taken for a mistake, nor is a token that differs where
transformers' logits are so near that differences of this size turn them around: a near tie.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import api
from .config import Config, SamplingParams
from .engine.engine import EngineCore, failure
from .engine.lockstep import LockstepGroup
from .engine.request import Request
from .errors import InvalidRequestError, ReleasedWeightsError, UnsupportedModelError
from .generate import TransformersLoop
from .layer_outputs import LayerOutputs
from .reference import Reference
from .text import encode_prompt
from .verification_report import LOGITS, LayerComparison, PromptComparison, Verification

# Of transformers' own noise, which is a maximum over few runs.
TOLERANCE = 3
COPIES = 5  # rows of the batch in which the noise is measured
# Token budget of an engine that is made here: longer prompts are computed in chunks.
CHUNK = 128

_salts = itertools.count()


def verify(
    model: Any,
    prompts: Any = None,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 24,
    config: Config | None = None,
    **fields: Any,
) -> Verification:
    """Run transformers and fastgen on the same prompts and say whether and where they part.

    Works on the model as it is: a model that is optimised is verified with what fastgen keeps for
    it, one that is not is optimised and restored. Takes no second copy of the weights. Prompts run
    alone in transformers, and together, in chunks and again over a cached prefix in fastgen; what
    the generation config says of sampling, penalties and end tokens is left out.

    Args:
        model: As for `fastgen.optimize`.
        prompts: A list of texts, token ids or chats; [num_prompts, num_tokens] token ids; or a
            tokenizer's output with its attention_mask. None: random tokens of several lengths,
            among them those around a block of the cache, and one that is computed in chunks.
        tokenizer: Needed for text and chats.
        max_new_tokens: Tokens generated for every prompt.
        config, fields: As for `fastgen.optimize`; left out, an optimised model keeps its own.
    Returns: a report; `.ok` says whether all is equal within the noise, str() what was compared.
    Raises: UnsupportedModelError if the engine cannot run the model, ReleasedWeightsError if
        transformers cannot; InvalidRequestError or CapacityError for bad prompts.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InvalidRequestError(f"max_new_tokens must be an int >= 1, got {max_new_tokens!r}")
    was_optimized = api.lookup(model) is not None
    if not was_optimized and config is None:
        fields = {"max_num_batched_tokens": CHUNK, **fields}
    if not was_optimized or config is not None or fields:
        api.optimize(model, config, **fields)
    try:
        return _verify(model, prompts, tokenizer, max_new_tokens)
    finally:
        if not was_optimized:
            api.restore(model)


def _verify(model: Any, prompts: Any, tokenizer: Any, num_tokens: int) -> Verification:
    optimized = api.require(model)
    try:
        engine = optimized.ready(model)
    except TransformersLoop as reason:
        raise UnsupportedModelError(f"the engine cannot run this model: {reason}") from None
    if optimized.weights.released:
        raise ReleasedWeightsError(
            "transformers needs weights that were released (release_weights=True); verify the "
            "model before it is optimised so, or with another setting"
        )
    rows = _rows(prompts, tokenizer, engine, num_tokens)
    salt = f"verify {next(_salts)}"  # nothing that was cached before is taken

    def requests() -> list[Request]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return [Request(list(row), params, cache_salt=salt, fails_on_nan=False) for row in rows]

    for request in requests():
        engine.check(request)
    reference = Reference(model)
    layers = LayerOutputs(engine.compiled, optimized.device)
    expected = [reference.generate(row, num_tokens) for row in rows]
    forced = _forced_logits(engine, requests(), [tokens for tokens, _ in expected])
    found = _tokens(engine, requests())

    differences = [
        _difference(ours, logits) for ours, (_, logits) in zip(forced, expected, strict=True)
    ]
    chosen = max(range(len(rows)), key=lambda row: _or_infinity(float(differences[row].max())))
    noise = _Noise()
    for index, (row, (tokens, logits)) in enumerate(zip(rows, expected, strict=True)):
        names = layers.names if index == chosen else None
        noise.measure(reference, [*row, *tokens[:-1]], logits, names)
    compared: tuple[LayerComparison, ...] = ()
    if noise.note is None:
        settings, (tokens, _) = optimized.config, expected[chosen]
        logits, values = layers.run(
            [*rows[chosen], *tokens[:-1]],
            len(rows[chosen]),
            settings.block_size,
            settings.max_num_batched_tokens,
        )
        compared = noise.compare({**values, LOGITS: logits})
    return Verification(
        model=type(reference.model).__name__,
        dtype=str(reference.model.dtype).removeprefix("torch."),
        device=str(reference.device),
        num_new_tokens=num_tokens,
        noise=noise.of_logits,
        tolerance=TOLERANCE * noise.of_logits,
        prompts=tuple(
            _compare_tokens(len(row), *theirs, tokens, difference, TOLERANCE * noise.of_logits)
            for row, theirs, tokens, difference in zip(
                rows, expected, found, differences, strict=True
            )
        ),
        layers=compared,
        layers_prompt=chosen,
        num_layers=len(engine.compiled.spec.layers),
        note=noise.note,
    )


class _Noise:
    """What transformers differs by from itself, over the sequences that were measured.

    of_logits: in the logits. outputs, of_outputs: of the sequence whose layers were asked for, by
    layer and for the logits, what the plain forward gave and its noise.
    """

    def __init__(self) -> None:
        self._own = 0.0  # of the plain forward
        self._plain_difference = 0.0  # between the plain forward and generate()
        self.outputs: dict[str, torch.Tensor] = {}
        self.of_outputs: dict[str, float] = {}

    def measure(
        self,
        reference: Reference,
        sequence: list[int],
        logits: torch.Tensor,
        layers: list[str] | None,
    ) -> None:
        """logits: [n, vocab_size], what generate() had behind the last n tokens of a sequence."""
        names = layers or []
        own, outputs = reference.forward(sequence, len(logits), layers=names)
        self._plain_difference = max(
            self._plain_difference, float(_difference(own[0], logits).max())
        )
        self._own = max(self._own, _rounding(logits, reference.model.dtype))
        for name, value in outputs.items():
            self.outputs[name], self.of_outputs[name] = value, _rounding(value, value.dtype)
        for otherwise in (False, True):
            other, values = reference.forward(
                sequence, len(logits), copies=COPIES, layers=names, rounded_otherwise=otherwise
            )
            self._own = max(self._own, float(_difference(other, own).max()))
            for name, value in values.items():
                difference = float(_difference(value, outputs[name]).max())
                self.of_outputs[name] = max(self.of_outputs[name], difference)
        if layers is not None:
            self.outputs[LOGITS] = own[0]

    @property
    def of_logits(self) -> float:
        return self._own if self.note is not None else max(self._own, self._plain_difference)

    @property
    def note(self) -> str | None:
        """Why the plain forward is no measure of what generate() computes."""
        if self._plain_difference <= TOLERANCE * self._own:
            return None
        return (
            f"transformers' plain forward differs from its generate() by "
            f"{self._plain_difference:.2g}, which is no noise: the layers cannot be compared"
        )

    def compare(self, found: dict[str, torch.Tensor]) -> tuple[LayerComparison, ...]:
        """fastgen's outputs of the same sequence; those of another shape are left out."""
        compared = []
        for name, value in found.items():
            expected = self.outputs[name]
            if expected.numel() != value.numel():
                continue
            difference = float(_difference(value, expected.reshape(value.shape)).max())
            noise = self.of_logits if name == LOGITS else self.of_outputs[name]
            differs = not difference <= TOLERANCE * noise  # NaN differs
            compared.append(LayerComparison(name, difference, noise, differs))
        return tuple(compared)


def _rows(prompts: Any, tokenizer: Any, engine: EngineCore, num_tokens: int) -> list[list[int]]:
    """Token ids of every prompt; what is masked is left out."""
    if prompts is None:
        return _default_prompts(engine, num_tokens)
    if isinstance(prompts, Mapping):
        ids, masks = torch.as_tensor(prompts["input_ids"]), prompts.get("attention_mask")
        masks = torch.ones_like(ids) if masks is None else torch.as_tensor(masks)
        if ids.dim() != 2 or masks.shape != ids.shape:
            raise InvalidRequestError(
                "input_ids and attention_mask must be [num_prompts, num_tokens], got "
                f"{list(ids.shape)} and {list(masks.shape)}"
            )
        prompts = [row[mask.bool()] for row, mask in zip(ids, masks, strict=True)]
    one = isinstance(prompts, str) or (isinstance(prompts, torch.Tensor) and prompts.dim() != 2)
    if one or not isinstance(prompts, Sequence | torch.Tensor) or not len(prompts):
        raise InvalidRequestError(
            "prompts must be a list of at least one prompt, or a matrix of token ids, got "
            f"{type(prompts).__name__}"
        )
    each: list[Any] = list(prompts)
    return [encode_prompt(prompt, tokenizer) for prompt in each]


def _default_prompts(engine: EngineCore, num_tokens: int) -> list[list[int]]:
    block, chunk = engine.config.block_size, engine.config.max_num_batched_tokens
    longest = min(chunk, 2 * CHUNK) + block + 3
    lengths = {1, block - 1, block, block + 1, 3 * block - 5, longest}
    fitting = sorted(n for n in lengths if 0 < n <= engine.max_model_len - num_tokens)
    generator = torch.Generator().manual_seed(0)
    vocab_size = engine.compiled.vocab_size
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist()
        for length in fitting or [1]
    ]


def _forced_logits(
    engine: EngineCore, requests: list[Request], tokens: list[list[int]]
) -> list[torch.Tensor]:
    """The engine's logits [num_tokens, vocab_size] fp32, if these are the tokens."""
    together = len(requests) <= engine.config.max_num_seqs and engine.fits(requests)
    rows = list(zip(requests, tokens, strict=True))
    logits: list[torch.Tensor] = []
    for group_rows in [rows] if together else [[row] for row in rows]:
        steps = []
        with LockstepGroup(engine, [request for request, _ in group_rows]) as group:
            for step in zip(*(forced for _, forced in group_rows), strict=True):
                steps.append(group.next_logits().float())
                if len(steps) < len(tokens[0]):
                    group.feed(list(step))
        logits.extend(torch.stack(steps, dim=1))
    return logits


def _tokens(engine: EngineCore, requests: list[Request]) -> list[list[int]]:
    """What the engine generates by itself."""
    try:
        engine.submit_all(requests)
        for request in requests:
            request.done.wait()
            if request.finish_reason in ("error", "cancelled"):
                raise failure(request)
    finally:
        engine.cancel_all(requests)
    return [request.output_token_ids for request in requests]


def _difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Absolute differences in fp32; none between infinities of one sign."""
    first, second = first.float(), second.float()
    return (first - second).abs().masked_fill(first == second, 0.0)


def _or_infinity(value: float) -> float:
    """NaN is the largest difference."""
    return value if value == value else float("inf")


def _rounding(values: torch.Tensor, dtype: torch.dtype) -> float:
    """One rounding of the largest finite value."""
    return torch.finfo(dtype).eps * float(values.float().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _compare_tokens(
    num_prompt_tokens: int,
    expected: list[int],
    logits: torch.Tensor,
    found: list[int],
    differences: torch.Tensor,
    tolerance: float,
) -> PromptComparison:
    """logits: transformers'. differences: of the engine's from them, [num_tokens, vocab_size]."""
    largest = [_or_infinity(float(value)) for value in differences.amax(dim=-1)]
    worst = max(range(len(largest)), key=largest.__getitem__)
    comparison = PromptComparison(
        num_prompt_tokens=num_prompt_tokens,
        difference=largest[worst],
        difference_at=worst,
        differs=largest[worst] > tolerance,
    )
    pairs = enumerate(zip(expected, found, strict=True))
    at = next((step for step, (one, other) in pairs if one != other), None)
    if at is None:
        return comparison
    best = logits[at].topk(2).values
    gap = float(logits[at][expected[at]] - logits[at][found[at]])
    return replace(
        comparison,
        parts_at=at,
        expected_token=expected[at],
        found_token=found[at],
        margin=float(best[0] - best[1]),
        gap=gap,
        near_tie=gap <= 2 * tolerance,
    )
