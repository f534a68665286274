"""python -m fastgen.generate: print the table of what generate() can be asked for, as Markdown."""

import sys

from .support import markdown

_HEAD = """\
# What `generate()` can be asked for, and who does it

*native*: the engine produces every token, equal to transformers' in fp32, with the same classes,
keys, shapes, padding and state of the random generator. *transformers' loop*: the call runs exactly
as without fastgen, with one warning that says why. *refused*: transformers raises its own error.
A name that has no row here, of a later release, goes to transformers' loop.

Printed by `python -m fastgen.generate`."""

if __name__ == "__main__":
    sys.stdout.write("\n".join((_HEAD, *markdown(), "")))
