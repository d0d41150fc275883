"""What every curvature block of a parameter can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from curvature.decomposition import check_damping, check_finite, widen
from curvature.distributed import all_reduce

# One parameter-shaped tensor, or as many as the block has parameters: (weight, bias), say.
Parts = Tensor | tuple[Tensor, ...]

# Largest dense block that is formed where a result can be had in no other way.
MAX_DENSE = 8192


class Block(ABC):
    r"""A symmetric positive semi-definite matrix M that acts on one parameter, or on several.

    Vectors are parameter-shaped tensors ``[..., *shape]`` with any number of leading batch axes. A
    block of a weight and its bias takes and returns both, one of more parameters all of them. Products
    are computed in the wider of the two data types and returned in that of the vectors; decompositions
    are computed in float32 or above. What needs a decomposition checks its factors; plain products do
    not, so they hand infinities on as `torch` does.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the parameters that the block acts on: one, two (weight and bias), or more."""

    @property
    @abstractmethod
    def factors(self) -> dict[str, Tensor]:
        """The tensors that define the block."""

    @abstractmethod
    def replaced(self, **factors: Tensor) -> Block:
        """Return the same kind of block with other tensors."""

    @abstractmethod
    def matvec(self, *vectors: Tensor) -> Parts:
        """Return ``M v``, shaped like the vectors."""

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Return all eigenvalues ``[p]``, in any order."""

    @abstractmethod
    def scaled(self, scale: float | Tensor) -> Block:
        """Return a multiple of the matrix."""

    @abstractmethod
    def power(self, exponent: float, damping: float = 0.0) -> Block:
        r"""Return :math:`(M + \delta I)^{e}`.

        Args:
            exponent: e, any number: -1 inverts, -1/2 maps white noise to samples.
            damping: The number added to all eigenvalues.

        Raises:
            ValueError: If a factor is not finite, not symmetric or indefinite; if the damping is
                negative; if ``exponent`` is negative and the damped matrix is singular.
        """

    @abstractmethod
    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Return the Frobenius norm."""

    @abstractmethod
    def diagonal(self) -> Parts:
        """Return the diagonal, shaped like the parameter(s)."""

    @abstractmethod
    def state_dict(self) -> dict:
        """Return tensors, numbers and strings that `from_state_dict` makes a block of.

        ``torch.save`` it; ``torch.load`` reads it with its safe default.
        """

    # ------------------------------------------------------------------ built on these

    @property
    def dim(self) -> int:
        """Number of rows p of the matrix."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def dtype(self) -> torch.dtype:
        """The widest data type among the factors."""
        first, *rest = (t.dtype for t in self.factors.values())
        for dtype in rest:
            first = first if dtype == first else torch.promote_types(first, dtype)
        return first

    @property
    def device(self) -> torch.device:
        """Device of the first factor."""
        return next(iter(self.factors.values())).device

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues ``[p]``, ascending.

        Raises:
            ValueError: If a factor is not finite, not symmetric, or indefinite.
        """
        return self.spectrum().sort().values

    def __mul__(self, scale: float | Tensor) -> Block:
        """Multiply the matrix with a number.

        Raises:
            TypeError: If it is no single number.
        """
        if not isinstance(scale, (int, float, Tensor)) and not hasattr(scale, "__float__"):
            return NotImplemented
        if getattr(scale, "ndim", 0):
            raise TypeError(
                f"{type(self).__name__}: * takes one number, got a tensor of shape {tuple(scale.shape)}."
            )
        return self.scaled(scale if isinstance(scale, Tensor) else float(scale))

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy's numbers leave the product to us

    def __truediv__(self, scale: float | Tensor) -> Block:
        """Divide the matrix by a number."""
        return self * (1 / scale)

    def __radd__(self, other: int) -> Block:
        """Let ``sum(blocks)`` begin with its 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def inverse(self, damping: float = 0.0, method: str = "exact") -> Block:
        r"""Return :math:`(M + \delta I)^{-1}`; see `power`.

        Args:
            damping: delta.
            method: As for `Kronecker.inverse`. Blocks without two dense factors have one way only, so
                that it makes no difference to them.

        Raises:
            ValueError: As `power`, or if there is no such method.
        """
        check_method(type(self).__name__, method)
        return self.power(-1.0, damping)

    def solve(self, *vectors: Tensor, damping: float = 0.0) -> Parts:
        r"""Return :math:`(M + \delta I)^{-1} v`; keep an `inverse` to solve more than once.

        Example:
            >>> from curvature import Kronecker
            >>> K = Kronecker(3.0 * torch.eye(1), torch.eye(2))
            >>> K.solve(torch.tensor([[8.0, 4.0]]), damping=1.0)
            tensor([[2., 1.]])
        """
        return self.inverse(damping).matvec(*vectors)

    def logdet(self, damping: float = 0.0) -> Tensor:
        r"""Return :math:`\log\det(M + \delta I)`.

        Raises:
            ValueError: As for `power`, or if the damped matrix is singular.

        Example:
            >>> from curvature import Kronecker
            >>> Kronecker(3.0 * torch.eye(1), torch.eye(2)).logdet(damping=1.0).exp()  # 4 * 4
            tensor(16.)
        """
        name = f"{type(self).__name__}.logdet"
        return damped(name, self.spectrum(), damping, positive=True).log().sum()

    def sample(
        self,
        damping: float = 0.0,
        shape: Sequence[int] | int = (),
        generator: torch.Generator | None = None,
    ) -> Parts:
        r"""Draw from :math:`N(0, (M + \delta I)^{-1})`, ``[*shape, *parameter.shape]``.

        Each call decomposes the factors; for many calls keep ``root = block.power(-0.5, damping)``
        and multiply it with standard normal noise.

        Raises:
            ValueError: As for `power`.

        Example:
            >>> from curvature import Kronecker
            >>> x = Kronecker(99.0 * torch.eye(2), torch.eye(3)).sample(damping=1.0, shape=(5000,))
            >>> x.shape, bool((x.std() - 0.1).abs() < 0.003)  # 1 / sqrt(99 + 1)
            (torch.Size([5000, 2, 3]), True)
        """
        root, shape = self.power(-0.5, damping), (shape,) if isinstance(shape, int) else shape
        noise = tuple(
            torch.randn((*shape, *s), generator=generator, dtype=root.dtype, device=root.device)
            for s in self.shapes
        )
        return root.matvec(*noise)

    def to_dense(self) -> Tensor:
        """Return the dense matrix ``[p, p]``.

        Rows and columns follow ``parameter.flatten()``; for a block of weight and bias they follow
        ``torch.cat([W, bias[:, None]], 1).flatten()`` with ``W`` the matrix form ``[(g o), i]``.
        """
        eye = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        return join(self.matvec(*split(eye, self.shapes)), self.shapes).mT

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Block:
        """Return the block on another device, in another data type; ``to(torch.float64)`` works too."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"{type(self).__name__}.to: two data types, {device} and {dtype}.")
            device, dtype = None, device
        return self.replaced(**{k: t.to(device=device, dtype=dtype) for k, t in self.factors.items()})

    def clone(self) -> Block:
        """Return a block that shares no memory with this one."""
        return self.replaced(**{k: t.clone() for k, t in self.factors.items()})

    def all_reduce(self, group: dist.ProcessGroup | None = None, average: bool = True) -> Block:
        """Accumulate the blocks of all processes of a group.

        Args:
            group: The process group; all processes by default.
            average: Whether the total loss is the mean of the processes' losses, as it is in data
                parallel training of a mean loss; otherwise it is their sum.

        Returns:
            The accumulated block, the same on each process.
        """
        messages = self.numerators()
        summed = all_reduce(messages, group)
        scale = 1 / dist.get_world_size(group) if average else 1.0
        return self.from_numerators(summed, scale)

    def _tensors(self) -> dict[str, Tensor]:
        """Return copies of the factors: they may be parts of larger tensors, which a file would hold."""
        return {name: t.detach().clone() for name, t in self.factors.items()}

    def numerators(self) -> list[Tensor]:
        """Return what adds up over processes."""
        return list(self.factors.values())

    def from_numerators(self, summed: Sequence[Tensor], scale: float) -> Block:
        """Return the block of a total loss that is ``scale`` times a sum of losses."""
        names = self.factors
        return self.replaced(**{k: t * scale for k, t in zip(names, summed, strict=True)})


def damped(owner: str, values: Tensor, damping: float, positive: bool) -> Tensor:
    """Return eigenvalues plus damping.

    Args:
        owner: Who asks, for messages.
        values: Eigenvalues of a positive semi-definite matrix.
        damping: What to add.
        positive: Whether the result must be larger than zero.

    Raises:
        ValueError: If the damping is negative, an eigenvalue is not finite or negative, or the
            result would be singular although it must not be.
    """
    damping, values = check_damping(owner, damping), widen(values)
    check_finite(f"{owner}: the eigenvalues", values)
    lowest, highest = float(values.min()), float(values.max())
    if lowest < 0:
        raise ValueError(
            f"{owner}: the matrix is indefinite, its smallest eigenvalue is {lowest:.3g} (largest "
            f"{highest:.3g}). Curvature blocks are positive semi-definite; was this one built from "
            "differences?"
        )
    if positive and not float((values + damping).min()) > 0:
        raise ValueError(
            f"{owner}: the matrix is singular: its smallest eigenvalue is {lowest:.3g}, its largest "
            f"{highest:.3g}, the damping {damping:g}. Pass a larger damping."
        )
    return values + damping


def raised(owner: str, values: Tensor, exponent: float, damping: float) -> Tensor:
    """Return ``(values + damping) ** exponent``, or raise if that is undefined.

    Raises:
        ValueError: As `damped`, or if the result overflows.
    """
    result = damped(owner, values, damping, positive=exponent < 0) ** exponent
    check_finite(f"{owner}: the eigenvalues to the power {exponent:g}", result)
    return result


def split(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Cut flat vectors ``[..., p]`` into parameter-shaped tensors ``[..., *shape]``."""
    parts = flat.split([shape.numel() for shape in shapes], dim=-1)
    return tuple(t.reshape((*flat.shape[:-1], *s)) for t, s in zip(parts, shapes, strict=True))


def join(parts: Parts, shapes: Sequence[torch.Size]) -> Tensor:
    """Join parameter-shaped tensors ``[..., *shape]`` into flat vectors ``[..., p]``."""
    parts = (parts,) if isinstance(parts, Tensor) else parts
    flat = [
        t.reshape(*t.shape[: t.dim() - len(s)], s.numel()) for t, s in zip(parts, shapes, strict=True)
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


METHODS = ("exact", "factored", "cholesky")


def check_method(owner: str, method: str) -> None:
    """Raise if there is no such way to an inverse.

    Raises:
        ValueError: If so.
    """
    if method not in METHODS:
        raise ValueError(f"{owner}.inverse: method={method!r}; expected one of {METHODS}.")


def result_dtype(vector: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the data type of a product: that of the vector, unless it counts."""
    return vector.dtype if vector.is_floating_point() else dtype


def check_vectors(owner: str, vectors: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
    """Raise if vectors are not shaped like the parameters.

    Raises:
        ValueError: If so.
    """
    wanted = {1: "one tensor", 2: "(weight, bias)"}.get(len(shapes), f"{len(shapes)} tensors")
    if len(vectors) != len(shapes):
        raise ValueError(
            f"{owner} takes {wanted} of shape {_text(shapes)}, got {len(vectors)} tensors: a joint "
            "block acts on all its parameters (weight and bias, say) together, any other on one."
        )
    for t in vectors:
        if not isinstance(t, Tensor):
            raise TypeError(f"{owner} takes {wanted}, got {type(t).__name__} (a missing gradient?).")
    leads = {t.shape[: t.dim() - len(s)] for t, s in zip(vectors, shapes, strict=True)}
    for t, shape in zip(vectors, shapes, strict=True):
        if len(leads) > 1 or t.shape[t.dim() - len(shape) :] != shape or t.dim() < len(shape):
            raise ValueError(
                f"{owner} takes {wanted} of shape {_text(shapes)} behind any batch axes, got "
                f"{_text([v.shape for v in vectors])}."
            )


def _text(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


def check_size(matrix, what: str) -> None:
    """Raise if a matrix is too large to be formed.

    Raises:
        ValueError: If it has more than `MAX_DENSE` rows.
    """
    if matrix.dim > MAX_DENSE:
        raise ValueError(
            f"{type(matrix).__name__}.{what} needs the dense matrix of {matrix.dim} x {matrix.dim} "
            f"entries, more than curvature.block.MAX_DENSE = {MAX_DENSE} rows. Use matvec, or treat "
            "its parts one by one."
        )
