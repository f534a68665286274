"""What fastgen does with one type: the checks, and the class that follows from them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tiny_models import NativeTokens, has_clear_margin, left_padded, prompts

import fastgen
from fastgen import Engine, SamplingParams
from fastgen.errors import UnsupportedModelError

from .building import RECIPES, Recipe, tiny_model

EXACT = "exact"
LOOP = "transformers' loop"
UNBUILDABLE = "cannot be built"
WRONG = "WRONG"
UNPROVEN = "unproven"  # no prompt that says something, or the checks could not be made
CLASSES = (EXACT, LOOP, UNBUILDABLE, UNPROVEN, WRONG)

NUM_TOKENS = 24
BLOCK_SIZE = 16
# Within a block, at its end, past it, and beyond every window.
LENGTHS = (5, 16, 17, 33)
SHARED = 40  # two blocks and a half, of which two can be shared
_PROMPTS_TRIED = 12
_FEWEST_KINDS = 6  # of tokens in a continuation: fewer would say little

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)


@dataclass
class Verdict:
    """What is known of one type. notes: what is special of it, in words for the table."""

    model_type: str
    outcome: str
    reason: str = ""
    model_class: str = ""
    layers: list[str] = field(default_factory=list)
    recipe: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class UnprovenError(Exception):
    """The checks say nothing: no prompt is far enough from a tie."""


class DivergedError(Exception):
    """fastgen's answer is not transformers'."""


@dataclass
class Continuation:
    """What transformers makes of a prompt, alone. noise: between its fp32 paths and fp64."""

    row: list[int]
    token_ids: list[int]
    exact: torch.Tensor  # logits [NUM_TOKENS, vocab] in fp64, or fp32 if the model knows no fp64
    noise: float


class Oracle:
    """transformers' own answers for one model, and prompts of which they are beyond doubt."""

    def __init__(self, model_type: str, recipe: Recipe) -> None:
        self.recipe = recipe
        self.bytes_per_token = 0  # of fastgen's cache, once it is known
        self.plain = tiny_model(model_type, recipe)
        self.notes: set[str] = set()
        self.exact: Any = copy.deepcopy(self.plain).double()
        if hasattr(self.exact, "set_experts_implementation"):
            self.exact.set_experts_implementation("eager")  # grouped products know no fp64
        try:
            with torch.no_grad():
                self.exact(torch.tensor(prompts(5)))
        except Exception:
            self.exact = None
            self.notes.add("its forward does not run in fp64")
        self.picked = [self.pick(length) for length in LENGTHS]
        (self.prefix,) = prompts(SHARED, seed=99)
        self.sharing = [self.pick(length, self.prefix) for length in (3, 9)]
        # What rounding does to one prompt is one draw: a model's noise is the largest of them.
        self.noise = max(found.noise for found in (*self.picked, *self.sharing))
        self._look_at_a_padded_batch()

    def generate(self, model: Any, row: list[int]) -> tuple[list[int], torch.Tensor]:
        out = model.generate(
            torch.tensor([row]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[0, len(row) :].tolist(), torch.cat(out.logits).double()

    def continuation(self, row: list[int]) -> Continuation | None:
        """None if it says little, or is too near a tie to tell right from wrong."""
        token_ids, logits = self.generate(self.plain, row)
        eps = torch.finfo(torch.float32).eps
        if not logits.isfinite().all() or len(set(token_ids)) < _FEWEST_KINDS:
            self.monotonous += 1
            return None
        noise = eps * float(logits.abs().max())
        if not has_clear_margin((logits,), noise):
            return None
        at_once = self.at_once(self.plain, row, token_ids)
        if at_once is None:
            self.notes.add("generate() differs from its plain forward, which is no oracle")
        exact, known = logits, 64 * noise  # if nothing better is known
        if self.exact is not None:
            exact = self.at_once(self.exact, row, token_ids) if at_once is not None else None
            if exact is None:
                exact_ids, exact = self.generate(self.exact, row)
                if exact_ids != token_ids:
                    return None
            known = float((logits - exact).abs().max())
        if at_once is not None:
            known = max(known, float((at_once - exact).abs().max()))
        known = max(known, noise)
        if not has_clear_margin((logits,), known):
            return None
        return Continuation(row, token_ids, exact, known)

    def at_once(self, model: Any, row: list[int], token_ids: list[int]) -> torch.Tensor | None:
        """Logits of one forward over everything; None if it knows other tokens than generate()."""
        try:
            with torch.no_grad():
                out = model(torch.tensor([[*row, *token_ids]]), use_cache=False)
        except Exception:
            return None
        logits = out.logits[0, len(row) - 1 : -1].double()
        right = logits.argmax(-1).tolist() == token_ids
        return logits if right else None

    def pick(self, length: int, prefix: list[int] | None = None) -> Continuation:
        """A prompt (after `prefix`) whose tokens vary and are 20 times the noise from a tie."""
        self.monotonous = 0
        for seed in range(_PROMPTS_TRIED):
            found = self.continuation([*(prefix or ()), *prompts(length, seed=seed)[0]])
            if found is not None:
                return found
        what = "say little" if self.monotonous > _PROMPTS_TRIED // 2 else "come near a tie"
        raise UnprovenError(f"every prompt of {length} tokens tried would {what}")

    def _look_at_a_padded_batch(self) -> None:
        ids, mask = left_padded([found.row for found in self.picked])
        try:
            out = self.plain.generate(
                ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False
            )
        except Exception as error:
            self.notes.add(f"transformers cannot do a left-padded batch ({type(error).__name__})")
            return
        if out[:, ids.shape[1] :].tolist() != [found.token_ids for found in self.picked]:
            self.notes.add("transformers' left-padded batch differs from its rows alone")


def classify(model_type: str) -> Verdict:
    """All checks of one type. Raises nothing that a model can cause."""
    verdict = Verdict(model_type, UNBUILDABLE)
    try:
        model = tiny_model(model_type)
        verdict.model_class = type(model).__name__
        verdict.layers = _kinds(model)
        model.generate(torch.tensor(prompts(5)), max_new_tokens=3, do_sample=False)
    except Exception as error:
        verdict.reason = _first_line(error)
        return verdict
    try:
        fastgen.optimize(model)
    except UnsupportedModelError as error:
        verdict.outcome, verdict.reason = LOOP, str(error)
        return verdict
    except Exception as error:
        verdict.outcome = WRONG
        verdict.reason = f"optimize raised {_first_line(error)}"
        return verdict
    verdict.layers = _cached_layers(model)
    del model
    try:
        oracle = _oracle(model_type)
        verdict.recipe, verdict.notes = asdict(oracle.recipe), sorted(oracle.notes)
        for check in (_check_alone, _check_chunks, _check_preemption):
            check(model_type, oracle)
        verdict.outcome = EXACT
    except UnprovenError as error:
        verdict.outcome, verdict.reason = UNPROVEN, str(error)
    except Exception as error:
        verdict.outcome, verdict.reason = WRONG, _first_line(error)
    return verdict


def _oracle(model_type: str) -> Oracle:
    failures = []
    for recipe in RECIPES:
        try:
            return Oracle(model_type, recipe)
        except UnprovenError as error:
            failures.append(str(error))
    raise UnprovenError(failures[0])


def _check_alone(model_type: str, oracle: Oracle) -> None:
    """generate() of each row alone and of a padded batch, logits, and prefixes that are shared."""
    with _engine(model_type, oracle) as engine:
        spec = fastgen.api.require(engine.model).compiled.spec
        oracle.bytes_per_token = spec.bytes_per_token
        eps = torch.finfo(torch.float32).eps
        for found in oracle.picked:
            with NativeTokens(engine.model, NUM_TOKENS):
                token_ids, logits = oracle.generate(engine.model, found.row)
            _compare("alone", [token_ids], [found])
            error = float((logits - found.exact).abs().max())
            allowed = 2 * (oracle.noise + eps * float(found.exact.abs().max()))
            if not error <= allowed:
                raise DivergedError(f"logits differ by {error:.2g}, allowed are {allowed:.2g}")
        ids, mask = left_padded([found.row for found in oracle.picked])
        with NativeTokens(engine.model, NUM_TOKENS * len(ids)):
            out = engine.model.generate(
                ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False
            )
        _compare("left-padded", out[:, ids.shape[1] :].tolist(), oracle.picked)
        with NativeTokens(engine.model, NUM_TOKENS * len(oracle.sharing)):
            for place, found in enumerate(oracle.sharing):
                (output,) = engine.generate([found.row], GREEDY)
                _compare("behind a shared prefix", [output.token_ids], [found])
                cached = output.metrics.num_cached_tokens
                if place and cached < SHARED // BLOCK_SIZE * BLOCK_SIZE:
                    raise DivergedError(f"only {cached} tokens of a shared prefix were found")


def _check_chunks(model_type: str, oracle: Oracle) -> None:
    with _engine(model_type, oracle, max_num_batched_tokens=7) as engine:
        outputs = engine.generate([found.row for found in oracle.picked], GREEDY)
        _compare("in chunks", [output.token_ids for output in outputs], oracle.picked)


def _check_preemption(model_type: str, oracle: Oracle) -> None:
    """A pool for two of the requests at their full length."""
    blocks = 1 + 2 * -(-(max(LENGTHS) + NUM_TOKENS) // BLOCK_SIZE)
    small = blocks * oracle.bytes_per_token * BLOCK_SIZE
    with _engine(model_type, oracle, kv_cache_memory_bytes=small) as engine:
        outputs = engine.generate([found.row for found in oracle.picked], GREEDY)
        _compare("preempted", [output.token_ids for output in outputs], oracle.picked)
        if not sum(output.metrics.num_preemptions for output in outputs):
            raise DivergedError("no request was preempted in a pool for two")


@contextmanager
def _engine(model_type: str, oracle: Oracle, **fields: Any) -> Iterator[Engine]:
    """An engine over a model of its own, with NaN in every freed block; all it makes is native."""
    with Engine(tiny_model(model_type, oracle.recipe), **fields) as engine:
        optimized = fastgen.api.require(engine.model)
        optimized.engine().poison_freed_blocks = True
        yield engine
        if optimized.fallbacks:
            raise DivergedError(f"transformers' loop ran: {dict(optimized.fallbacks)}")


def _compare(how: str, answers: list[list[int]], expected: list[Continuation]) -> None:
    for answer, found in zip(answers, expected, strict=True):
        if answer != found.token_ids:
            pairs = zip(answer, found.token_ids, strict=False)
            where = next((at for at, (one, other) in enumerate(pairs) if one != other), len(answer))
            raise DivergedError(
                f"{how}, prompt of {len(found.row)}: token {where} is {answer[where : where + 1]}, "
                f"transformers' is {found.token_ids[where]} (noise {found.noise:.2g})"
            )


def _kinds(model: Any) -> list[str]:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return [str(kind) for kind in kinds or ()]


def _cached_layers(model: Any) -> list[str]:
    """What each layer caches, as fastgen sees it."""
    layers = fastgen.explain(model).spec.layers
    return [
        f"{layer.kind} {layer.num_kv_heads}x{layer.head_dim}"
        + (f"/{layer.v_head_dim}" if layer.v_head_dim != layer.head_dim else "")
        + (f", window {layer.window}" if layer.window else "")
        for layer in layers
    ]


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
