"""What a request must be before it is queued: looked at on the caller's thread, with ints only."""

from __future__ import annotations

import itertools

from ..config import check_int
from ..errors import CapacityError, InvalidRequestError
from .request import Request


def check_request(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Refuse a request that could never run, whatever the pool.

    Raises: InvalidRequestError for ids that the model has not, CapacityError for too many tokens.
    """
    prompt, params = request.prompt_token_ids, request.sampling
    if not prompt and request.query_token_id is None:
        raise InvalidRequestError("a prompt must hold at least one token, got none")
    if len(prompt) + params.max_tokens > max_model_len:
        raise CapacityError(
            f"prompt ({len(prompt)}) + max_tokens ({params.max_tokens}) must be <= max_model_len "
            f"({max_model_len}); shorten one of them"
        )
    largest = vocab_size - 1
    if request.query_token_id is not None:
        check_int("query_token_id", request.query_token_id, 0, largest, InvalidRequestError)
    for token_id in prompt:
        if type(token_id) is not int or not 0 <= token_id <= largest:
            check_int("each prompt token id", token_id, 0, largest, InvalidRequestError)
    for name, token_ids in (
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("bad_words", itertools.chain(*request.bad_words)),
    ):
        for token_id in token_ids:
            check_int(f"each token id of {name}", token_id, 0, largest, InvalidRequestError)
