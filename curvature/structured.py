r"""Structured matrices: what all structures share.

A structure is a set of :math:`d \times d` matrices closed under sums, scaling and products. Its
elements are held in a few tensors that are linear in the matrix, so that arithmetic, copies,
reductions over processes and checkpoints are the same code for all structures.

Index letters: d dimension, n columns of a dense operand, r columns of a Gram factor, ``*batch``
leading axes that hold many matrices of one structure.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from curvature.distributed import all_reduce

Self = TypeVar("Self", bound="StructuredMatrix")

# Numbers whose squares are formed at once.
PART = 2**18


class NaiveWarning(UserWarning):
    """An operation of a structured matrix went through the dense matrix."""


_WARNED: set[tuple[type, str]] = set()


class StructuredMatrix(ABC):
    r"""A (batch of) square matrix of one structure.

    A new structure defines `to_dense` and `from_dense` and works. What it does not define goes
    through the dense matrix, with a `NaiveWarning` once per class and operation; each of these has
    a hook of the same name with an underscore in front (``_matmul``, ``_compose``, ``_gram``, ...)
    that makes it fast. ``options`` are integers such as a block size. They are declared, with their
    defaults, in the class attribute ``defaults`` and limited to what makes sense for ``dim``.

    Non-finite entries are not looked for, since that would wait for the device; they propagate.

    Args:
        tensors: Linear in the matrix, each ``[*batch, *shape]`` with the shapes of `shapes`.
        dim: Number of rows and columns d.
        **options: Of the structure.

    Attributes:
        name: Short name of the structure, the key in ``STRUCTURES``.
        tensors: As above. All that belongs to the matrix is in there.
        dim: As above.
        options: As above, limited to what makes sense for ``dim``.

    Raises:
        TypeError: If a tensor is not of a real floating-point type, or an option is unknown.
        ValueError: If a shape or an option does not fit.

    Example:
        Only the two required methods, for multiples of the identity:

        >>> class Scalar(StructuredMatrix):
        ...     def to_dense(self):
        ...         return self.tensors[0][..., None, None] * torch.eye(self.dim)
        ...     @classmethod
        ...     def from_dense(cls, M):
        ...         return cls([M.diagonal(dim1=-2, dim2=-1).mean(-1)], M.shape[-1])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", NaiveWarning)
        ...     A = 3.0 * Scalar.eye(2)
        ...     (A @ A).tensors
        (tensor(9.),)
    """

    name: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, int]] = {}

    def __init__(self, tensors: Sequence[Tensor], dim: int, **options: int):
        self.dim = dim
        self.options = self._limited(dim, options)
        self.tensors = tuple(tensors)
        self._check_tensors()

    # ------------------------------------------------------------------ required

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrix, ``[*batch, d, d]``. It may share memory with ``tensors``."""

    @classmethod
    @abstractmethod
    def from_dense(cls: type[Self], M: Tensor, **options: int) -> Self:
        """Keep the structure's entries of ``M[*batch, d, d]``, ignore the others.

        Where one number stands for several entries it is their mean. The result shares no memory
        with ``M``.

        Raises:
            TypeError: If ``M`` is not of a real floating-point type, or an option is unknown.
            ValueError: If ``M`` is not square or an option does not fit.
        """

    # ------------------------------------------------------------------ properties

    @property
    def batch_shape(self) -> torch.Size:
        """Leading axes of the matrices: () for a single one."""
        t = self.tensors[0]
        return t.shape[: t.dim() - len(_shapes(type(self), self.dim, self._key)[0])]

    @property
    def shape(self) -> torch.Size:
        """``[*batch, d, d]``."""
        return torch.Size((*self.batch_shape, self.dim, self.dim))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the entries."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.tensors[0].device

    def __repr__(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{type(self).__name__}(shape={tuple(self.shape)}{options}, dtype={self.dtype})"

    # ------------------------------------------------------------------ construction

    @classmethod
    def shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of ``tensors`` without batch axes."""
        return _shapes(cls, dim, tuple(cls._limited(dim, options).items()))

    @classmethod
    def zeros(
        cls: type[Self],
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: int,
    ) -> Self:
        """Return zeros of shape ``[*batch_shape, dim, dim]``."""
        shapes = cls.shapes(dim, **options)
        tensors = [torch.zeros((*batch_shape, *shape), dtype=dtype, device=device) for shape in shapes]
        return cls(tensors, dim, **options)

    @classmethod
    def eye(
        cls: type[Self],
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: int,
    ) -> Self:
        """Return identities of shape ``[*batch_shape, dim, dim]``."""
        return cls.zeros(dim, batch_shape, dtype, device, **options).add_identity_(1.0)

    @classmethod
    def project(cls: type[Self], M: Tensor, **options: int) -> Self:
        r"""Map a symmetric matrix into the structure's Lie algebra.

        .. math::  P(M)_{ij} = (1 + [(j, i) \text{ is not kept}]) M_{ij}
                   \quad \text{for kept } (i, j)

        Of Toeplitz matrices, first average each diagonal. An entry that is kept without its mirror
        image stands for both, hence the factor of two: without it the inverse of a curvature
        matrix is not tracked (Lin et al., 2024, "Structured inverse-free natural gradient").

        Args:
            M: ``[*batch, d, d]``, symmetric; only its entries in the structure are read.
            **options: Of the structure.

        Raises:
            TypeError: If ``M`` is not of a real floating-point type, or an option is unknown.
            ValueError: If ``M`` is not square or an option does not fit.
        """
        return cls._project(M, **cls._check_square(M, options))

    @classmethod
    def project_gram(cls: type[Self], S: Tensor, scale: float = 1.0, **options: int) -> Self:
        r"""Return :math:`P(\text{scale} \; S S^T)`, forming no more of it than the structure keeps.

        Args:
            S: ``[*batch, d, r]``.
            scale: Factor of the product. It is applied before rounding to a half type.
            **options: Of the structure.

        Raises:
            TypeError: If ``S`` is not of a real floating-point type, or an option is unknown.
            ValueError: If ``S`` is no matrix or an option does not fit.
        """
        if not isinstance(S, Tensor) or not S.is_floating_point():
            raise TypeError(f"{cls.__name__}.project_gram: expected floating-point S, got {_about(S)}.")
        if S.dim() < 2:
            raise ValueError(f"{cls.__name__}.project_gram: expected S[*batch, d, r], got {_about(S)}.")
        return cls._project_gram(S, float(scale), **cls._limited(S.shape[-2], options))

    @classmethod
    def stack(cls: type[Self], matrices: Sequence[Self]) -> Self:
        """Stack matrices of equal shape along a new leading batch axis, as a copy.

        Raises:
            TypeError: If a matrix is of another structure or data type.
            ValueError: If there are none, or their shapes or options differ.
        """
        if not matrices:
            raise ValueError(f"{cls.__name__}.stack: expected at least one matrix, got none.")
        first = matrices[0]
        for other in matrices:
            first._check_same(other, "stack")
            if other.batch_shape != first.batch_shape:
                raise ValueError(
                    f"{cls.__name__}.stack: expected equal batch shapes, got "
                    f"{tuple(first.batch_shape)} and {tuple(other.batch_shape)}."
                )
        return first.like(torch.stack(ts) for ts in zip(*(m.tensors for m in matrices), strict=True))

    def unstack(self: Self) -> list[Self]:
        """Split along the first batch axis; the parts share memory with this matrix.

        Raises:
            ValueError: If there is no batch axis.
        """
        if not self.batch_shape:
            raise ValueError(f"{self!r}.unstack: expected a batch axis, there is none.")
        return [self.like(ts) for ts in zip(*(t.unbind(0) for t in self.tensors), strict=True)]

    # ------------------------------------------------------------------ products

    def matmul(self, X: Tensor, transpose: bool = False) -> Tensor:
        """Return ``A X``, or ``A^T X``.

        Args:
            X: ``[*other, d, n]``; its leading axes broadcast with the batch axes.
            transpose: Whether to multiply with the transpose.

        Returns:
            ``[*broadcast, d, n]``.

        Raises:
            TypeError: If ``X`` is no tensor of the matrix's data type.
            ValueError: If shapes do not fit.
        """
        self._check_operand(X, -2, "matmul")
        return self._matmul(X, transpose)

    def rmatmul(self, X: Tensor, transpose: bool = False) -> Tensor:
        """Return ``X A``, or ``X A^T``, for ``X[*other, n, d]``; see `matmul`.

        The same as ``X @ A``, which takes 15 us longer: torch first tries, and fails, to multiply.
        """
        self._check_operand(X, -1, "rmatmul")
        return self._rmatmul(X, transpose)

    def __matmul__(self, other: Any) -> Any:
        """Product with a dense ``X[..., d, n]``, or with a matrix of the same structure, in it."""
        if isinstance(other, StructuredMatrix):
            self._check_pair(other, "@")
            return self._compose(other)
        return self.matmul(other) if isinstance(other, Tensor) else NotImplemented

    def __rmatmul__(self, other: Any) -> Any:
        return self.rmatmul(other) if isinstance(other, Tensor) else NotImplemented

    def gram(self: Self) -> Self:
        r"""Return :math:`P(A^T A)`, see `project`."""
        return self._gram()

    # ------------------------------------------------------------------ reductions

    def trace(self) -> Tensor:
        """Return the traces ``[*batch]``, in float32 for half types (as the other reductions)."""
        return self._trace()

    def square_norm(self) -> Tensor:
        r"""Return the squared Frobenius norms :math:`\operatorname{tr}(A^T A)`, ``[*batch]``.

        In float32 for half types: the squared norm of a float16 identity overflows at d = 65505.
        """
        return self._square_norm()

    def norm(self) -> Tensor:
        """Return the Frobenius norms ``[*batch]``, in float32 for half types."""
        return self.square_norm().sqrt()

    # ------------------------------------------------------------------ linear arithmetic

    def __add__(self: Self, other: Any) -> Self:
        if not isinstance(other, StructuredMatrix):
            return NotImplemented
        self._check_pair(other, "+")
        return self.like(t + u for t, u in zip(self.tensors, other.tensors, strict=True))

    def __sub__(self: Self, other: Any) -> Self:
        if not isinstance(other, StructuredMatrix):
            return NotImplemented
        self._check_pair(other, "-")
        return self.like(t - u for t, u in zip(self.tensors, other.tensors, strict=True))

    def __neg__(self: Self) -> Self:
        return self.like(-t for t in self.tensors)

    def __mul__(self: Self, factor: Any) -> Self:
        """Scale by a number, or by a tensor of the batch shape; the data type stays."""
        if not isinstance(factor, int | float | Tensor):
            return NotImplemented
        if not isinstance(factor, Tensor):
            return self.like(t * factor for t in self.tensors)
        factors = self._factors(factor, "*")
        return self.like((t * f).to(t.dtype) for t, f in zip(self.tensors, factors, strict=True))

    __rmul__ = __mul__

    def __truediv__(self: Self, factor: Any) -> Self:
        if not isinstance(factor, int | float | Tensor):
            return NotImplemented
        factors = self._factors(factor, "/")
        return self.like((t / f).to(t.dtype) for t, f in zip(self.tensors, factors, strict=True))

    def add_(self: Self, other: StructuredMatrix, alpha: float | Tensor = 1.0) -> Self:
        """Add ``alpha other`` in place; ``alpha`` is a number or a tensor of the batch shape.

        Raises:
            TypeError: If ``other`` is of another structure or data type.
            ValueError: If dimensions, options or batch shapes do not fit.
        """
        self._check_pair(other, "add_", grow=False)
        factors = self._factors(alpha, "add_", grow=False)
        for t, u, f in zip(self.tensors, other.tensors, factors, strict=True):
            if not isinstance(f, Tensor):
                t.add_(u, alpha=f)
            elif f.dtype == t.dtype:
                t.addcmul_(u, f)
            else:
                t.add_((u * f).to(t.dtype))
        return self

    def add_identity_(self: Self, alpha: float = 1.0) -> Self:
        """Add ``alpha I`` in place."""
        self._add_identity(alpha)
        return self

    def mul_(self: Self, factor: float | Tensor) -> Self:
        """Scale in place by a number, or by a tensor of the batch shape."""
        for t, f in zip(self.tensors, self._factors(factor, "mul_", grow=False), strict=True):
            t.mul_(f)
        return self

    def copy_(self: Self, other: StructuredMatrix) -> Self:
        """Overwrite with another matrix of the structure, of any floating-point type and device."""
        self._check_same(other, "copy_", dtype=False)
        self._check_batch(other.batch_shape, "copy_", grow=False)
        for t, u in zip(self.tensors, other.tensors, strict=True):
            t.copy_(u)
        return self

    # ------------------------------------------------------------------ copies

    def clone(self: Self) -> Self:
        """Return a copy."""
        return self.like(t.clone() for t in self.tensors)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Convert data type or device, with the arguments of `torch.Tensor.to`."""
        moved = self.like(t.to(*args, **kwargs) for t in self.tensors)
        if not moved.tensors[0].is_floating_point():
            raise TypeError(f"{self!r}.to: expected a real floating-point type, got {moved.dtype}.")
        return moved

    def all_reduce(self: Self, group: dist.ProcessGroup | None = None, average: bool = False) -> Self:
        """Return the sum, or the mean, over the processes of a group.

        Args:
            group: The process group; all processes by default.
            average: Whether to divide by the number of processes.

        Raises:
            RuntimeError: If torch.distributed was not initialised.
        """
        # half types go wide before the sum, or dividing it would come after it overflowed
        wide = [t.to(accumulator(t.dtype)) for t in self.tensors]
        sums = all_reduce(wide, group)
        size = dist.get_world_size(group) if average else 1
        return self.like((s / size if average else s).to(self.dtype) for s in sums)

    def state_dict(self) -> dict[str, Tensor | int | str]:
        """Return a flat dictionary that `torch.load` reads with its safe default.

        The tensors are those of the matrix, as is usual for state dictionaries.
        """
        tensors = {f"tensor{k}": t for k, t in enumerate(self.tensors)}
        return {"structure": self._title(), "dim": self.dim, **self.options, **tensors}

    @classmethod
    def from_state_dict(cls: type[Self], state: Mapping[str, Any]) -> Self:
        """Return a copy of what `state_dict` came from.

        Where the class is not known, it is ``STRUCTURES[state["structure"]]``.

        Raises:
            ValueError: If the state belongs to another structure or does not fit.
        """
        if state.get("structure") != cls._title():
            raise ValueError(
                f"{cls.__name__}.from_state_dict: expected the state of structure {cls._title()!r}, got "
                f"that of {state.get('structure')!r}; use STRUCTURES[state['structure']]."
            )
        missing = {"dim", "tensor0", *cls.defaults} - set(state)
        if missing:
            raise ValueError(
                f"{cls.__name__}.from_state_dict: expected {', '.join(sorted(missing))} in the state, "
                f"got only {', '.join(state)}; was it made by state_dict()?"
            )
        count = sum(key.startswith("tensor") for key in state)
        tensors = [state[f"tensor{k}"].clone() for k in range(count)]
        return cls(tensors, state["dim"], **{key: state[key] for key in cls.defaults})

    # ------------------------------------------------------------------ hooks, naive by default

    @classmethod
    def _limit(cls, dim: int, **options: int) -> dict[str, int]:
        """Limit options to what makes sense for ``dim``; raise ValueError if nothing does."""
        return options

    @classmethod
    def _shapes(cls, dim: int, **options: int) -> tuple[tuple[int, ...], ...] | None:
        return None  # not known before a matrix was made

    def _matmul(self, X: Tensor, transpose: bool) -> Tensor:
        self._warn_naive("matmul")
        D = self.to_dense()
        return (D.mT if transpose else D) @ X

    def _rmatmul(self, X: Tensor, transpose: bool) -> Tensor:
        return self._matmul(X.mT, not transpose).mT

    def _compose(self: Self, other: Self) -> Self:
        self._warn_naive("compose")
        return self.from_dense(self.to_dense() @ other.to_dense(), **self.options)

    @classmethod
    def _project(cls: type[Self], M: Tensor, **options: int) -> Self:
        cls._warn_naive("project")
        ones = torch.ones(M.shape[-2:], dtype=M.dtype, device=M.device)
        kept = cls.from_dense(ones, **options).to_dense() != 0
        return cls.from_dense(torch.where(kept & ~kept.mT, 2 * M, M), **options)

    @classmethod
    def _project_gram(cls: type[Self], S: Tensor, scale: float, **options: int) -> Self:
        cls._warn_naive("project_gram")
        return cls._project(scaled_product(S, S.mT, scale), **options)

    def _gram(self: Self) -> Self:
        self._warn_naive("gram")
        D = self.to_dense()
        return self._project(D.mT @ D, **self.options)

    def _trace(self) -> Tensor:
        self._warn_naive("trace")
        D = self.to_dense()
        return D.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=accumulator(D.dtype))

    def _square_norm(self) -> Tensor:
        self._warn_naive("square_norm")
        return square_sum(self.to_dense(), (-2, -1))

    def _add_identity(self, alpha: float) -> None:
        self._warn_naive("add_identity_")
        identity = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        self.add_(self.from_dense(identity, **self.options), alpha)

    # ------------------------------------------------------------------ helpers

    @classmethod
    def _of(cls: type[Self], tensors: Iterable[Tensor], dim: int, options: dict[str, int]) -> Self:
        """Return a matrix of tensors that fit; nothing is checked (the constructor takes 10 us)."""
        new = object.__new__(cls)
        new.tensors, new.dim, new.options = tuple(tensors), dim, options
        return new

    def like(self: Self, tensors: Iterable[Tensor]) -> Self:
        """Return a matrix with other tensors that fit; nothing is checked."""
        return self._of(tensors, self.dim, self.options)

    @classmethod
    def _title(cls) -> str:
        return cls.name or cls.__name__

    @classmethod
    def _warn_naive(cls, operation: str) -> None:
        if (cls, operation) not in _WARNED:
            _WARNED.add((cls, operation))
            warnings.warn(
                f"{cls.__name__}.{operation} goes through the dense matrix; define _{operation} in the "
                "class to make it fast.",
                NaiveWarning,
                stacklevel=4,
            )

    @classmethod
    def _limited(cls, dim: int, options: Mapping[str, int]) -> dict[str, int]:
        """Complete the options with their defaults and limit them."""
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"{cls.__name__}: expected a dimension of at least 1, got {dim!r}.")
        unknown = [key for key in options if key not in cls.defaults]
        if unknown:
            known = ", ".join(cls.defaults) or "none"
            raise TypeError(f"{cls.__name__}: unknown option {unknown[0]!r}; there are: {known}.")
        for key, value in options.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{cls.__name__}: expected an integer for {key}, got {value!r}.")
        return cls._limit(dim, **{**cls.defaults, **options})

    @classmethod
    def _check_square(cls, M: Tensor, options: Mapping[str, int]) -> dict[str, int]:
        """Check a dense matrix; return the options, complete and limited."""
        if not isinstance(M, Tensor) or not M.is_floating_point():
            raise TypeError(f"{cls.__name__}: expected a floating-point matrix, got {_about(M)}.")
        if M.dim() < 2 or M.shape[-1] != M.shape[-2]:
            raise ValueError(f"{cls.__name__}: expected a square M[*batch, d, d], got {_about(M)}.")
        return cls._limited(M.shape[-1], options)

    def _check_tensors(self) -> None:
        title = type(self).__name__
        for t in self.tensors:
            if not isinstance(t, Tensor) or not t.is_floating_point():
                raise TypeError(f"{title}: expected floating-point tensors, got {_about(t)}.")
        expected = self._shapes(self.dim, **self.options)
        if expected is None:
            return
        found = [t.shape for t in self.tensors]
        fit = len(found) == len(expected) and all(
            f[max(0, len(f) - len(e)) :] == e for f, e in zip(found, expected, strict=True)
        )
        batches = {f[: len(f) - len(e)] for f, e in zip(found, expected, strict=False)}
        if not fit or len(batches) != 1:
            raise ValueError(
                f"{title} of dimension {self.dim}, {self.options}: expected tensors of shapes "
                f"{', '.join(map(str, expected))} behind common batch axes, got "
                f"{', '.join(str(tuple(f)) for f in found)}."
            )

    def _check_same(self, other: StructuredMatrix, operation: str, dtype: bool = True) -> None:
        """Refuse another structure, dimension, options or data type."""
        if type(other) is not type(self):
            raise TypeError(
                f"{self!r} {operation} {other!r}: expected the same structure; make both dense with "
                "to_dense() to mix structures."
            )
        if other.dim != self.dim or other.options != self.options:
            raise ValueError(
                f"{self!r} {operation} {other!r}: expected equal dimensions and options; "
                "from_dense(matrix.to_dense(), **options) changes options."
            )
        if dtype and other.dtype != self.dtype:
            raise TypeError(
                f"{self!r} {operation} {other!r}: expected equal data types; convert one with to()."
            )

    def _check_pair(self, other: StructuredMatrix, operation: str, grow: bool = True) -> None:
        """Do what `_check_same` and `_check_batch` do."""
        self._check_same(other, operation)
        # all else is equal, hence the batch is if this is
        if other.tensors[0].shape != self.tensors[0].shape:
            self._check_batch(other.batch_shape, operation, grow)

    def _check_batch(self, shape: torch.Size, operation: str, grow: bool = True) -> None:
        """Refuse leading axes that do not broadcast; without ``grow`` those that add to the batch."""
        own = self.batch_shape
        if not shape or shape == own or (grow and not own):
            return
        try:
            if grow or torch.broadcast_shapes(own, shape) == own:
                torch.broadcast_shapes(own, shape)
                return
        except RuntimeError:
            pass
        goal = "that broadcast" if grow else f"that broadcast to {tuple(own)}"
        raise ValueError(
            f"{self!r} {operation}: expected leading axes {goal}, got {tuple(shape)}; "
            "insert axes of size 1 where needed."
        )

    def _check_operand(self, X: Tensor, axis: int, operation: str) -> None:
        if not isinstance(X, Tensor) or X.dtype != self.dtype:
            raise TypeError(
                f"{self!r}.{operation}: expected a tensor of {self.dtype}, got {_about(X)}; convert it."
            )
        if X.dim() < 2 or X.shape[axis] != self.dim:
            layout = "[..., d, n]" if axis == -2 else "[..., n, d]"
            raise ValueError(
                f"{self!r}.{operation}: expected X{layout} with d = {self.dim}, got {_about(X)}; "
                "a vector needs an axis of size 1."
            )
        self._check_batch(X.shape[:-2], operation)

    def _factors(
        self, factor: float | Tensor, operation: str, grow: bool = True
    ) -> list[float | Tensor]:
        """Return the factor for each tensor, with an axis of size 1 for each of its own axes."""
        if not isinstance(factor, Tensor) or factor.dim() == 0:
            return [factor] * len(self.tensors)
        self._check_batch(factor.shape, operation, grow)
        axes = (len(shape) for shape in _shapes(type(self), self.dim, self._key))
        return [factor.reshape(*factor.shape, *[1] * k) for k in axes]

    @property
    def _key(self) -> tuple[tuple[str, int], ...]:
        return tuple(self.options.items())


@lru_cache(maxsize=4096)
def _shapes(
    cls: type[StructuredMatrix], dim: int, options: tuple[tuple[str, int], ...]
) -> tuple[tuple[int, ...], ...]:
    shapes = cls._shapes(dim, **dict(options))
    if shapes is None:
        cls._warn_naive("shapes")
        zero = cls.from_dense(torch.zeros(dim, dim), **dict(options))
        shapes = tuple(tuple(t.shape) for t in zero.tensors)
    return shapes


# ---------------------------------------------------------------------- shared with the other files


def scaled_product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ``scale A B`` for ``A[*batch, i, r]`` and ``B[*batch, r, j]``, in one product."""
    if scale == 1.0:
        return A @ B
    *batch, i, _ = A.shape
    if not batch:
        return torch.addmm(A.new_empty(i, B.shape[-1]), A, B, beta=0, alpha=scale)
    A, B = A.flatten(0, -3), B.flatten(0, -3)
    out = A.new_empty(len(A), i, B.shape[-1])
    return torch.baddbmm(out, A, B, beta=0, alpha=scale).unflatten(0, batch)


def add_product_(Y: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Add ``scale A B`` to ``Y`` in place; in one product unless leading axes broadcast."""
    if Y.dim() == A.dim() == B.dim() == 2:
        return Y.addmm_(A, B, alpha=scale)
    if Y.dim() == A.dim() == B.dim() == 3 and len(A) == len(B):
        return Y.baddbmm_(A, B, alpha=scale)
    return Y.add_(A @ B if scale == 1.0 else scaled_product(A, B, scale))


def square_sum(t: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Return the sum of squares over the last axes, in float32 for half types.

    Nothing of the size of ``t`` is formed.
    """
    if dims == -1 and t.device.type == "cpu" and t.stride(-1) != 1 and t.numel():
        # norms along an axis that is not the last in memory take up to 30 times as long
        step = max(1, PART * t.shape[-1] // t.numel())
        parts = (t,) if step >= t.shape[-1] else t.split(step, -1)
        return reduce(Tensor.add_, (part.to(accumulator(t.dtype)).square().sum(-1) for part in parts))
    return torch.linalg.vector_norm(t, dim=dims, dtype=accumulator(t.dtype)).square_()


def leading_axes(A: Tensor, B: Tensor) -> torch.Size:
    """Return the leading axes of a product of matrices."""
    if A.dim() == B.dim() == 2:
        return A.shape[:0]
    return torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])


def at_least(least: int, cls: type, name: str, value: int) -> int:
    """Return an option; raise ValueError if it is too small."""
    if value < least:
        raise ValueError(f"{cls.__name__}: expected {name} of at least {least}, got {value}.")
    return value


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the data type of sums of many entries."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _about(X: Any) -> str:
    if isinstance(X, Tensor):
        return f"shape {tuple(X.shape)}, {X.dtype}"
    return type(X).__name__
