"""What makes two full blocks of the KV cache the same: a chain of SHA-256 digests.

    digest[0] = sha256(root + token ids of block 0);  digest[i] = sha256(digest[i-1] + block i)

The root stands for everything but the tokens that keys and values depend on: the weight epoch, the
graph (and with it the adapters that are switched on) and the caller's salt. A cryptographic hash,
because a collision would show one request's text to another.
"""

from __future__ import annotations

import hashlib
from array import array

from .request import Request


def root_digest(weight_epoch: int, graph_id: int, salt: str | None) -> bytes:
    """What the chains of all requests begin with that may share blocks."""
    return hashlib.sha256(repr((weight_epoch, graph_id, salt)).encode()).digest()


def block_digests(request: Request, num_tokens: int, block_size: int) -> list[bytes]:
    """Digests of the full blocks among a request's first tokens; kept on the request.

    None for a request that must not share. Generated tokens count only while positions do.
    """
    if request.cache_root is None:
        return []
    if request.first_output_position not in (None, len(request.prompt_token_ids)):
        num_tokens = min(num_tokens, len(request.prompt_token_ids))
    digests = request.block_digests
    for block in range(len(digests), num_tokens // block_size):
        ids = array("q", request.token_ids(block * block_size, (block + 1) * block_size))
        parent = digests[-1] if digests else request.cache_root
        digests.append(hashlib.sha256(parent + ids.tobytes()).digest())
    return digests[: num_tokens // block_size]
