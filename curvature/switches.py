"""Settings of the whole process."""

from __future__ import annotations

from importlib.util import find_spec

# Not one per thread: autograd runs a backward pass on GPU in threads of its own.
_triton = False


def triton_enabled() -> bool:
    """Whether symmetric products on GPU may be those of `curvature.triton_gram`."""
    return _triton


class use_triton:
    r"""Have symmetric products on GPU formed by a Triton kernel that computes one triangle.

    It is off until it is asked for: the kernel has been tested in Triton's interpreter, but neither
    run nor timed on a GPU. ``python -m benchmarks.symmetric --device cuda`` tells where it wins.
    Products of float32 then have the precision that ``torch.backends.cuda.matmul`` is set to.

    Args:
        mode: On or off, for the whole process, from now on; within a ``with`` statement until its end.

    Raises:
        ImportError: If Triton is not installed.

    Example:
        >>> from curvature import use_triton
        >>> with use_triton(False):
        ...     triton_enabled()
        False
    """

    def __init__(self, mode: bool = True):
        global _triton
        if mode and find_spec("triton") is None:
            raise ImportError(
                "use_triton: Triton is not installed. torch's packages for GPU on Linux come with it; "
                "elsewhere: pip install triton."
            )
        self._before = _triton
        _triton = bool(mode)

    def __enter__(self) -> use_triton:
        return self

    def __exit__(self, *_) -> None:
        global _triton
        _triton = self._before
