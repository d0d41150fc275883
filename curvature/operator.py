"""The curvature of a whole model: one block per parameter, or per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from curvature.block import Block, Parts, check_size, join, split
from curvature.decomposition import check_damping
from curvature.dense import DiagonalBlock
from curvature.distributed import all_reduce
from curvature.interop import to_linear_operator, to_scipy
from curvature.storage import block_from_state_dict

# One tensor per parameter name, each [..., *shape]; or all of them as flat vectors [..., P].
Vector = TypeVar("Vector", Mapping[str, Tensor], Tensor)
Damping = float | Mapping[str, float]


@dataclass(eq=False, slots=True)
class BlockDiagonalOperator:
    r"""A block-diagonal matrix over named parameters.

    Vectors are mappings from names to parameter-shaped tensors ``[..., *shape]``, or flat vectors
    ``[..., P]`` in the order of ``names`` (that of `torch.nn.utils.parameters_to_vector` if the
    blocks come from `of_parameters`); results are of the same kind. Dampings are one number for all
    blocks, or one per parameter name (joint blocks take that of their first name).

    Args:
        blocks: For each block the name of its parameter, or the names of its weight and bias.
        names: The order of the parameters in flat vectors; that of ``blocks`` by default.

    Raises:
        ValueError: If there are no blocks, a name appears twice, or ``names`` are other names.

    Example:
        >>> import torch
        >>> from curvature import Kronecker
        >>> w, b = Kronecker(torch.eye(1), 3.0 * torch.eye(2)), DiagonalBlock(torch.ones(1))
        >>> H = BlockDiagonalOperator({"w": w, "b": b})
        >>> H.solve(torch.tensor([8.0, 4.0, 2.0]), damping=1.0)
        tensor([2., 1., 1.])
        >>> H.solve({"w": torch.tensor([[8.0, 4.0]]), "b": torch.tensor([2.0])}, damping=1.0)["w"]
        tensor([[2., 1.]])
        >>> H.trace(), H.logdet(damping=1.0).exp()
        (tensor(7.), tensor(32.))
    """

    blocks: Mapping[str | tuple[str, ...], Block]
    names: Sequence[str] | None = None

    def __post_init__(self):
        blocks = {(k,) if isinstance(k, str) else tuple(k): b for k, b in self.blocks.items()}
        found = [name for key in blocks for name in key]
        names = found if self.names is None else list(self.names)
        if not found or len(set(found)) < len(found) or sorted(found) != sorted(names):
            raise ValueError(
                "BlockDiagonalOperator: expected at least one block, each parameter in one block, and "
                f"`names` with the same names; got blocks for {found} and names {names}."
            )
        for key, block in blocks.items():
            if len(key) != len(block.shapes):
                raise ValueError(
                    f"BlockDiagonalOperator: {type(block).__name__} for {key} acts on "
                    f"{len(block.shapes)} parameter(s). A joint block needs the names of its weight and "
                    "its bias, both trained."
                )
        self.blocks, self.names = blocks, tuple(names)

    @classmethod
    def of_parameters(
        cls, named_parameters: Iterable[tuple[str, Tensor]], savefield: str
    ) -> BlockDiagonalOperator:
        """Gather what a backward pass left on parameters.

        Args:
            named_parameters: As from ``model.named_parameters()``.
            savefield: The attribute that holds the blocks; a tensor shaped like its parameter is
                read as a diagonal. Parameters that are frozen are left out. Several parameters may
                hold one block: their names then follow the order in which they come (of a weight and
                its bias, the weight is first).

        Raises:
            ValueError: If a trainable parameter has no such attribute, or it is something else; if a
                block's parameters do not come in the order of its shapes.

        Example:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> w.diag_ggn_exact = torch.tensor([1.0, 2.0])
            >>> BlockDiagonalOperator.of_parameters([("w", w)], "diag_ggn_exact").trace()
            tensor(3.)
        """
        found: dict[int, tuple[Block, list[tuple[str, Tensor]]]] = {}
        order = []
        for name, p in named_parameters:
            if not p.requires_grad:
                continue
            block = getattr(p, savefield, None)
            if isinstance(block, Tensor) and block.shape == p.shape and savefield != "grad":
                block = DiagonalBlock(block)
            if not isinstance(block, Block):
                raise ValueError(
                    f"BlockDiagonalOperator: parameter {name} has no block in .{savefield} (found "
                    f"{type(block).__name__}). Run a backward pass with an extension that saves there, "
                    "or pass only the parameters that are covered."
                )
            order.append(name)
            found.setdefault(id(block), (block, []))[1].append((name, p))
        return cls({_in_order(b, named): b for b, named in found.values()}, order)

    def __getitem__(self, name: str) -> Block:
        """Return the block of a parameter."""
        for key, block in self.blocks.items():
            if name in key:
                return block
        raise KeyError(f"no block for {name!r}; there are blocks for {', '.join(self.names)}")

    def __repr__(self) -> str:
        return f"BlockDiagonalOperator({len(self.blocks)} blocks, P={self.dim})"

    # ------------------------------------------------------------------ vectors

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters' shapes, in the order of ``names``."""
        found = {
            n: s for key, block in self.blocks.items() for n, s in zip(key, block.shapes, strict=True)
        }
        return {name: found[name] for name in self.names}

    @property
    def dim(self) -> int:
        """Number of rows P."""
        return sum(block.dim for block in self.blocks.values())

    def flatten(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Bring tensors by name to flat vectors ``[..., P]``."""
        self._check_names(vector)
        shapes = self.shapes
        return join(tuple(vector[name] for name in shapes), tuple(shapes.values()))

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Bring flat vectors ``[..., P]`` to tensors by name.

        Raises:
            ValueError: If the last axis does not count P entries.
        """
        if flat.dim() == 0 or flat.shape[-1] != self.dim:
            raise ValueError(
                f"BlockDiagonalOperator: expected flat vectors of {self.dim} entries, got shape "
                f"{tuple(flat.shape)}."
            )
        shapes = self.shapes
        return dict(zip(shapes, split(flat, tuple(shapes.values())), strict=True))

    def _check_names(self, vector: Mapping) -> None:
        if set(vector) != set(self.names):
            missing, extra = set(self.names) - set(vector), set(vector) - set(self.names)
            raise ValueError(
                f"BlockDiagonalOperator: expected one tensor per parameter; missing {sorted(missing)}, "
                f"unknown {sorted(extra)}."
            )

    def _map(self, vector: Vector, function: Callable[..., Parts]) -> Vector:
        """Apply ``function(key, block, *parts)`` to all blocks."""
        if isinstance(vector, Tensor):
            return self.flatten(self._map(self.unflatten(vector), function))
        self._check_names(vector)
        return self._by_name(
            {k: function(k, b, *(vector[n] for n in k)) for k, b in self.blocks.items()}
        )

    def _by_name(self, parts: Mapping[tuple, Parts]) -> dict[str, Tensor]:
        """Sort the blocks' tensors by parameter."""
        found = {}
        for key, value in parts.items():
            value = (value,) if isinstance(value, Tensor) else value
            found.update(zip(key, value, strict=True))
        return {name: found[name] for name in self.names}

    # ------------------------------------------------------------------ the matrix

    def matvec(self, vector: Vector) -> Vector:
        """Return ``M v``."""
        return self._map(vector, lambda _, block, *parts: block.matvec(*parts))

    def solve(self, vector: Vector, damping: Damping = 0.0) -> Vector:
        r"""Return :math:`(M + \delta I)^{-1} v`; keep an `inverse` to solve more than once."""
        return self.inverse(damping).matvec(vector)

    def inverse(self, damping: Damping = 0.0, **options) -> BlockDiagonalOperator:
        r"""Return :math:`(M + \delta I)^{-1}`.

        Args:
            damping: delta.
            options: For the blocks' own `inverse`, such as ``method="factored"``.

        Raises:
            ValueError: As the blocks' `inverse`; the message names the block.
        """
        return self._each(damping, lambda block, d: block.inverse(d, **options))

    def power(self, exponent: float, damping: Damping = 0.0) -> BlockDiagonalOperator:
        r"""Return :math:`(M + \delta I)^{e}`."""
        return self._each(damping, lambda block, d: block.power(exponent, d))

    def eigh(self) -> BlockDiagonalOperator:
        """Decompose what decomposes: functions of the result are cheap."""
        return self._each(0.0, lambda block, _: _decomposed(block))

    def sample(
        self,
        damping: Damping = 0.0,
        shape: Sequence[int] | int = (),
        generator: torch.Generator | None = None,
        flat: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        r"""Draw from :math:`N(0, (M + \delta I)^{-1})`, tensors ``[*shape, *parameter.shape]`` by name.

        Args:
            damping: delta; the prior precision of a Laplace approximation.
            shape: Shape of the sample.
            generator: Where the noise comes from; torch's default by default.
            flat: Whether to return flat vectors ``[*shape, P]``.
        """
        dampings = self._dampings(damping)
        parts = self._by_name(
            {k: self._named(k, b.sample, dampings[k], shape, generator) for k, b in self.blocks.items()}
        )
        return self.flatten(parts) if flat else parts

    def logdet(self, damping: Damping = 0.0) -> Tensor:
        r"""Return :math:`\log\det(M + \delta I)`."""
        dampings = self._dampings(damping)
        return sum(self._named(k, b.logdet, dampings[k]) for k, b in self.blocks.items())

    def trace(self) -> Tensor:
        """Return the trace."""
        return sum(block.trace() for block in self.blocks.values())

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return torch.stack([block.norm() for block in self.blocks.values()]).square().sum().sqrt()

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues ``[P]``, ascending."""
        found = [self._named(k, b.spectrum) for k, b in self.blocks.items()]
        return torch.cat(found).sort().values

    def diagonal(self, flat: bool = False) -> dict[str, Tensor] | Tensor:
        """Return the diagonal, by name or as a flat vector ``[P]``."""
        parts = self._by_name({k: block.diagonal() for k, block in self.blocks.items()})
        return self.flatten(parts) if flat else parts

    def to_dense(self) -> Tensor:
        """Return the dense matrix ``[P, P]``, in the order of flat vectors.

        Raises:
            ValueError: If it has more than ``curvature.block.MAX_DENSE`` rows.
        """
        check_size(self, "to_dense")
        block = next(iter(self.blocks.values()))
        return self.matvec(torch.eye(self.dim, dtype=block.dtype, device=block.device)).mT

    def to_scipy(self):
        """Return a `scipy.sparse.linalg.LinearOperator` of this matrix: see `curvature.interop`."""
        return to_scipy(self)

    def to_linear_operator(self):
        """Return a `linear_operator.LinearOperator` of this matrix: see `curvature.interop`."""
        return to_linear_operator(self)

    def _dampings(self, damping: Damping) -> dict[tuple[str, ...], float]:
        if not isinstance(damping, Mapping):
            check_damping("BlockDiagonalOperator", damping)
            return dict.fromkeys(self.blocks, damping)
        missing = [key[0] for key in self.blocks if key[0] not in damping]
        if missing:
            raise ValueError(f"BlockDiagonalOperator: no damping for {', '.join(missing)}.")
        unknown = sorted(set(damping) - set(self.names))
        if unknown:
            raise ValueError(f"BlockDiagonalOperator: dampings for unknown names {', '.join(unknown)}.")
        for key in self.blocks:
            if len({damping.get(name, damping[key[0]]) for name in key}) > 1:
                raise ValueError(f"BlockDiagonalOperator: {key} are one block and have one damping.")
        return {key: damping[key[0]] for key in self.blocks}

    def _each(
        self, damping: Damping, function: Callable[[Block, float], Block]
    ) -> BlockDiagonalOperator:
        dampings = self._dampings(damping)
        blocks = {k: self._named(k, function, b, dampings[k]) for k, b in self.blocks.items()}
        return BlockDiagonalOperator(blocks, self.names)

    @staticmethod
    def _named(key: tuple[str, ...], function: Callable, *args):
        """Call a function; its errors say which block."""
        try:
            return function(*args)
        except (TypeError, ValueError) as error:
            raise type(error)(f"block of {', '.join(key)}: {error}") from error

    # ------------------------------------------------------------------ batches, storage

    def __add__(self, other: BlockDiagonalOperator) -> BlockDiagonalOperator:
        """Accumulate block by block; see `Kronecker.__add__`.

        Raises:
            ValueError: If the two have other blocks.
        """
        if not isinstance(other, BlockDiagonalOperator):
            return NotImplemented
        if set(self.blocks) != set(other.blocks):
            raise ValueError(
                f"BlockDiagonalOperator: + needs equal names, got {self.names} and {other.names}."
            )
        return BlockDiagonalOperator(
            {k: self._named(k, add, b, other.blocks[k]) for k, b in self.blocks.items()}, self.names
        )

    def __mul__(self, scale: float) -> BlockDiagonalOperator:
        """Multiply the matrix with a number."""
        return BlockDiagonalOperator({k: b * scale for k, b in self.blocks.items()}, self.names)

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BlockDiagonalOperator:
        """Return the operator on another device, in another data type."""
        return BlockDiagonalOperator(
            {k: block.to(device, dtype) for k, block in self.blocks.items()}, self.names
        )

    def all_reduce(
        self, group: dist.ProcessGroup | None = None, average: bool = True
    ) -> BlockDiagonalOperator:
        """Accumulate over the processes of a group in one message; see `Block.all_reduce`."""
        messages = {k: block.numerators() for k, block in self.blocks.items()}
        summed = iter(all_reduce([t for part in messages.values() for t in part], group))
        scale = 1 / dist.get_world_size(group) if average else 1.0
        return BlockDiagonalOperator(
            {
                k: block.from_numerators([next(summed) for _ in messages[k]], scale)
                for k, block in self.blocks.items()
            },
            self.names,
        )

    def state_dict(self) -> dict:
        """Return tensors, numbers and strings; ``torch.load`` reads them with its safe default."""
        keys = [list(key) for key in self.blocks]
        blocks = [block.state_dict() for block in self.blocks.values()]
        return {"keys": keys, "blocks": blocks, "names": list(self.names)}

    @classmethod
    def from_state_dict(cls, state: dict) -> BlockDiagonalOperator:
        """Make an operator of what `state_dict` returned."""
        blocks = map(block_from_state_dict, state["blocks"])
        return cls(dict(zip(map(tuple, state["keys"]), blocks, strict=True)), state["names"])


def _decomposed(block: Block) -> Block:
    """Return a block's decomposition, or the block if it keeps that to itself."""
    found = block.eigh() if hasattr(block, "eigh") else block
    return found if isinstance(found, Block) else block


def _in_order(block: Block, parameters: Sequence[tuple[str, Tensor]]) -> tuple[str, ...]:
    """Return the names of a block's parameters in the order of its shapes.

    Raises:
        ValueError: If the shapes are others, or come in another order.
    """
    keys = getattr(block, "keys", None)
    if keys is not None:
        names = {id(p): name for name, p in parameters}
        if names.keys() == set(keys):
            return tuple(names[key] for key in keys)
    named = [(name, p.shape) for name, p in parameters]
    # of a joint block, the weight has more axes than the bias and comes first
    weight_first = sorted(named, key=lambda pair: -len(pair[1]))
    for order in (named, weight_first):
        if tuple(shape for _, shape in order) == tuple(block.shapes):
            return tuple(name for name, _ in order)
    if len(named) == len(block.shapes) and len(named) > 2:
        shapes = {name: tuple(shape) for name, shape in named}
        raise ValueError(
            f"BlockDiagonalOperator: {type(block).__name__} acts on parameters of shapes "
            f"{[tuple(s) for s in block.shapes]}, in this order; those that hold it come as {shapes}. "
            "Pass named parameters in the block's order, or give BlockDiagonalOperator the names."
        )
    return tuple(name for name, _ in weight_first)
