"""`model.generate()` on the engine, with transformers' signature, semantics and return classes.

transformers prepares the call itself (validation, masks, positions, processors, criteria) and then
runs what is passed as `custom_generate` in place of its own loop; that is where the engine comes
in. What the engine cannot do exactly is run by transformers' own loop, on the unpatched path.

    patch.py     the patched method: native, or transformers' loop with the reason
    support.py   what may be asked for, and who does it
    prepared.py  a prepared call -> rows.py  its requests
                 -> free_running.py | sample_loop.py | beam_loop.py
"""

from .patch import Optimized, patch, unpatch
from .prepared import TransformersLoop

__all__ = ["Optimized", "TransformersLoop", "patch", "unpatch"]
