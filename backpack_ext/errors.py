"""Exceptions of the backward pass."""


class UnsupportedError(NotImplementedError):
    """A quantity is not defined, or not implemented, for something the model does.

    The message names the module path and class, what was found, and what to do about it.
    """


class RecordingError(RuntimeError):
    """The forward pass was not recorded as the backward pass needs it."""


class ProcessGroupError(RuntimeError):
    """The processes of a group did not sum their results: one failed, or did something else."""
