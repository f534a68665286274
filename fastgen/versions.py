"""The versions that fastgen was tested with; others are warned of once, never refused."""

from __future__ import annotations

import functools
import logging
import re
from importlib import metadata

logger = logging.getLogger("fastgen")

# Package -> first and last tested (major, minor).
TESTED = {"torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 23))}


@functools.cache
def warn_of_untested_versions() -> None:
    """Log a warning for each package outside its tested range; once in a process."""
    for package, (first, last) in TESTED.items():
        version = metadata.version(package)
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or not first <= (int(numbers[1]), int(numbers[2])) <= last:
            tested = " to ".join(".".join(map(str, bound)) for bound in (first, last))
            logger.warning(
                "%s %s is untested; fastgen was tested with %s", package, version, tested
            )
