"""Everything that generate() can be asked for, and who does it: the engine or transformers' loop.

This table is what decides: a call that sets a name whose row is not native, or that has no row, is
left to transformers. `python -m fastgen.generate` prints it.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .prepared import PreparedCall, TransformersLoop


class By(enum.Enum):
    """Who does what a row names."""

    NATIVE = "native"
    LOOP = "transformers' loop"
    REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """An argument of generate() or a field of GenerationConfig.

    off: Values with which it asks for nothing; with these, every row is native.
    """

    name: str
    by: By
    note: str
    off: tuple[Any, ...] = (None,)


def _native(note: str, *names: str) -> list[Row]:
    return [Row(name, By.NATIVE, note) for name in names]


def _loop(name: str, note: str, *off: Any) -> Row:
    return Row(name, By.LOOP, note, (None, *off))


def _refused(name: str, note: str, *off: Any) -> Row:
    return Row(name, By.REFUSED, note, (None, *off))


_PROCESSOR = "a processor or warper, called by transformers' own code"
_NO_ASSISTANT = "asks for nothing without an assistant"
_HUB_ONLY = "transformers needs code from the Hub for it"

ARGUMENTS: tuple[Row, ...] = (
    *_native("the prompt, ids", "inputs", "input_ids"),
    *_native("2-D; hidden slots on any side, or within a row", "attention_mask"),
    *_native("", "generation_config"),
    *_native("any, called with the history that transformers would have given", "logits_processor"),
    *_native("any", "stopping_criteria"),
    *_native(_PROCESSOR, "prefix_allowed_tokens_fn"),
    *_native("any; with beams transformers raises", "streamer"),
    *_native("for stop_strings", "tokenizer"),
    *_native(_NO_ASSISTANT, "assistant_tokenizer"),
    *_native("for code from the Hub", "trust_remote_code"),
    _loop("synced_gpus", "steps are kept in time with other processes", False),
    _loop("assistant_model", "assisted generation"),
    _loop("negative_prompt_ids", "classifier-free guidance"),
    _loop("negative_prompt_attention_mask", "classifier-free guidance"),
    _loop("custom_generate", "a loop of the user's own"),
    _loop("past_key_values", "a cache that the caller has begun"),
    *_native("the prompt, embeddings; not with beams", "inputs_embeds"),
)

FIELDS: tuple[Row, ...] = (
    *_native("", "max_length", "max_new_tokens"),
    *_native(_PROCESSOR, "min_length", "min_new_tokens"),
    *_native("a criterion", "max_time", "stop_strings", "eos_token_id"),
    *_native("", "do_sample", "num_return_sequences", "pad_token_id", "bos_token_id"),
    *_native(
        _PROCESSOR,
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "renormalize_logits",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "watermarking_config",
    ),
    *_native("", "return_dict_in_generate", "output_scores", "output_logits"),
    *_native("beams go on from one another's blocks", "num_beams"),
    *_native("for beams", "early_stopping", "length_penalty"),
    _loop("output_attentions", "attention weights, which no fused kernel computes", False),
    *_native("not with beams, nor with hidden slots", "output_hidden_states"),
    Row("use_cache", By.LOOP, "no cache is to be kept", (None, True)),
    Row("cache_implementation", By.LOOP, "another kind of cache", (None, "dynamic", "hybrid")),
    *_native("asks for nothing with a dynamic cache", "cache_config", "max_cache_len"),
    *_native("the engine cuts prompts by max_num_batched_tokens", "prefill_chunk_size"),
    *_native("asks for nothing with a dynamic cache", "compile_config", "disable_compile"),
    *_native("for generate_batch()", "continuous_batching_config"),
    _loop("guidance_scale", "classifier-free guidance", 1, 1.0),
    _loop("token_healing", "the prompt's last token is chosen anew by a call of its own", False),
    _loop("prompt_lookup_num_tokens", "assisted generation from the prompt"),
    _loop("assistant_early_exit", "assisted generation by the first layers"),
    _loop("use_mtp", "assisted generation by the model's extra heads", False),
    _loop("is_assistant", "the model assists another one", False),
    *_native(
        _NO_ASSISTANT,
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "speculation_type",
    ),
    *_native("asks for nothing of a decoder", "decoder_start_token_id"),
    _loop("low_memory", "no longer done by transformers", False),
    _refused("penalty_alpha", f"contrastive search (with top_k > 1): {_HUB_ONLY}", 0, 0.0),
    _refused("dola_layers", f"DoLa: {_HUB_ONLY}"),
    _refused("num_beam_groups", f"group beam search: {_HUB_ONLY}", 1),
    *_native("asks for nothing without beam groups", "diversity_penalty"),
    _refused("constraints", f"constrained beam search: {_HUB_ONLY}"),
    _refused("force_words_ids", f"constrained beam search: {_HUB_ONLY}"),
    *_native("says where the configuration comes from", "_from_model_config"),
    *_native("says where the configuration comes from", "transformers_version"),
)

_ARGUMENTS = {row.name: row for row in ARGUMENTS}
_FIELDS = {row.name: row for row in FIELDS}


def check_call(model: Any, arguments: dict[str, Any]) -> None:
    """Raise TransformersLoop if something that was asked for is not the engine's to do.

    arguments: What was passed, by name, those of **kwargs too.
    """
    for name, value in arguments.items():
        if name not in _fields() and value is not None:
            _check(_ARGUMENTS.get(name), name, value)
    for name in _fields():
        if (value := chosen(model, arguments, name)) is not None:
            _check(_FIELDS.get(name), name, value)
    _check_beams(model, chosen(model, arguments, "num_beams"), arguments)
    if torch.is_autocast_enabled(model.device.type):
        raise TransformersLoop("autocast is on")
    if _get_current_dispatch_mode() is not None:
        raise TransformersLoop("a torch dispatch mode is active")
    if dropout := _active_dropout(model):
        raise TransformersLoop(f"the model is in training mode with dropout ({dropout})")


def chosen(model: Any, arguments: dict[str, Any], name: str) -> Any:
    """A field's value, as transformers merges them: an argument, even None, or what is set."""
    if name in arguments:
        return arguments[name]
    configs = arguments.get("generation_config"), model.generation_config
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _check_beams(model: Any, num_beams: Any, arguments: dict[str, Any]) -> None:
    from transformers import GenerationMixin

    if num_beams in (None, 1):
        return
    if type(num_beams) is not int or num_beams < 1:
        raise TransformersLoop(f"num_beams={num_beams!r}")
    if arguments.get("streamer") is not None:
        raise TransformersLoop("a streamer with beams")
    own = type(model)._beam_search is not GenerationMixin._beam_search  # pyright: ignore
    if own or hasattr(model, "_reorder_cache"):
        raise TransformersLoop(f"{type(model).__name__} has a beam search of its own")


def _check(row: Row | None, name: str, value: Any) -> None:
    if row is None:
        kind = "field" if name in _fields() else "model input"
        raise TransformersLoop(f"the {kind} {name}")
    if row.by is not By.NATIVE and not any(value == off for off in row.off if off is not None):
        shown = f"={value!r}" if isinstance(value, bool | int | float | str) else " is set"
        raise TransformersLoop(f"{name}{shown}")


@functools.cache
def _fields() -> tuple[str, ...]:
    """The fields of the installed transformers' GenerationConfig."""
    from transformers import GenerationConfig

    return tuple(vars(GenerationConfig()))


def check_variant(call: PreparedCall) -> None:
    """Raise TransformersLoop if embeddings or hidden states are asked for in an unknown way."""
    wanted = call.generation_config.output_hidden_states
    if wanted is not None and type(wanted) is not bool:
        raise TransformersLoop(f"output_hidden_states={wanted!r}")
    if call.num_beams > 1:
        raise TransformersLoop(f"beams with {call.variant}")
    if (size := call.generation_config.prefill_chunk_size) is not None:
        raise TransformersLoop(f"prefill_chunk_size={size} with {call.variant}")


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


def rows_without_a_name() -> list[str]:
    """Names of the installed transformers that the table lacks; a new release may bring some."""
    from transformers import GenerationMixin

    parameters = set(inspect.signature(vars(GenerationMixin)["generate"]).parameters) - {
        "self",
        "kwargs",
    }
    return sorted((parameters - _ARGUMENTS.keys()) | (set(_fields()) - _FIELDS.keys()))


def markdown() -> Iterator[str]:
    """The table as lines of Markdown."""
    for title, rows in (("Arguments", ARGUMENTS), ("Fields of GenerationConfig", FIELDS)):
        yield f"\n## {title}\n"
        yield "| name | who does it | nothing asked with | note |"
        yield "|---|---|---|---|"
        for row in rows:
            off = "" if row.by is By.NATIVE else ", ".join(f"`{value!r}`" for value in row.off)
            yield f"| `{row.name}` | {row.by.value} | {off} | {row.note} |"
