"""Every error fastgen raises on purpose. Messages say what must hold and what was given."""


class FastgenError(Exception):
    """Base class of all errors raised by fastgen."""


class UnsupportedModelError(FastgenError, ValueError):
    """The model, or a part of its graph, cannot be rewritten without changing what it computes."""


class NotOptimizedError(FastgenError, ValueError):
    """The call needs a model that went through `fastgen.optimize`."""


class ReleasedWeightsError(FastgenError, RuntimeError):
    """The call needs weights that `release_weights` freed; `fastgen.restore` brings them back."""


class ArtifactError(FastgenError):
    """An exported folder cannot be written or loaded, or is not what was exported."""


class InvalidRequestError(FastgenError, ValueError):
    """A prompt or a sampling parameter is out of its range; nothing was run."""


class CapacityError(InvalidRequestError):
    """The request can never fit: it is longer than the model or the KV cache pool allows."""


class RequestFailedError(FastgenError, RuntimeError):
    """A request ended because something raised while it ran; `__cause__` is that exception."""


class EngineClosedError(FastgenError, RuntimeError):
    """The engine was closed, or its model is gone."""


class QueueFullError(FastgenError, RuntimeError):
    """As many requests wait as max_queue allows; nothing was queued."""
