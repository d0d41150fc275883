"""What layers bring in a backward pass, collected as factors V of whole parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backpack_ext.images import Images
from backpack_ext.layer_factor import LayerFactor, versions_of
from backpack_ext.normal import OneHot
from backpack_ext.site import Site
from backpack_ext.unit import Unit
from curvature import Axes
from curvature.decomposition import widen
from curvature.factor import Concatenated, DenseFactor, Factor, Stacked, Sum


@dataclass(eq=False)
class _Piece:
    """What a layer brought in one chunk of columns.

    Args:
        sites: Its calls.
        a: Its inputs, of a convolution its images; None for an elementwise layer.
        b: Its vectors ``[g,v,n,s,o]``; by role the per-sample vectors ``[v,n,*shape]`` of an
            elementwise layer.
        versions: Those of the inputs' tensors when they were read.
    """

    sites: tuple[Site, ...]
    a: Tensor | OneHot | Images | None
    b: Tensor | dict[str, Tensor]
    versions: tuple[int, ...] = ()


@dataclass(eq=False)
class _Layer:
    """What a layer brought in all chunks.

    Args:
        parameters: Its trainable parameters by role.
        axes: How their axes form matrices, by role.
        parts: Which parts of parameters it is, by role.
        pieces: What it brought, by the chunk's number.
    """

    parameters: dict[str, nn.Parameter]
    axes: dict[str, Axes]
    parts: dict[str, tuple[int, int]]
    pieces: dict[int, _Piece] = field(default_factory=dict)

    def inputs_of(self, sites: Sequence[Site]) -> Tensor | OneHot | Images | None:
        """Return the inputs of some calls if a chunk has brought them."""
        for piece in self.pieces.values():
            if piece.sites == tuple(sites):
                return piece.a
        return None

    def placed(self, role: str, m: Tensor) -> Tensor:
        """Bring ``[...,g,o,i]`` to the parameter's shape, zero outside of the part used."""
        if role in self.parts:
            k, groups = self.parts[role]
            whole = m.new_zeros(*m.shape[:-3], groups, *m.shape[-2:])
            whole[..., k : k + 1, :, :] = m
            m = whole
        return self.axes[role].to_parameter(m)


class FactorStore:
    """Collects inputs and vectors of layers, chunk by chunk of columns; makes factors of them.

    Columns are ordered by chunk, then by vector, then by datum. Columns that never arrive at a layer
    (those of a loss that does not depend on it) are zero.

    Args:
        data: The data to keep; all by default.
        scale: What to multiply vectors with.
    """

    def __init__(self, data: Tensor | None = None, scale: float = 1.0):
        self.data, self.scale = data, scale
        self.layers: dict[tuple, _Layer] = {}
        self.widths: list[int] = []  # vectors per chunk
        self.width: int | None = None  # of the chunk that is running
        self.batch = 0
        self.dtypes: set[torch.dtype] = set()  # of what is kept
        self.held: dict[int, int] = {}  # bytes of tensors, by where they are in memory

    def inputs_of(self, unit: Unit) -> Tensor | OneHot | Images | None:
        """Return the inputs of a layer's calls if they are kept, of all data."""
        layer = self.layers.get(unit.key)
        return None if layer is None or self.data is not None else layer.inputs_of(unit.sites)

    def add(self, unit: Unit, inputs: Tensor | OneHot | Images | None = None) -> int:
        """Take one layer's vectors.

        Args:
            unit: The layer.
            inputs: Its inputs, if another store has them already; they may be costly to form.

        Returns:
            How many more bytes it takes to keep inputs and vectors.
        """
        layer = self.layers.get(unit.key)
        if layer is None:
            roles = unit.parameters
            axes = {} if unit.rule.elementwise else {role: unit.axes(role) for role in roles}
            layer = self.layers[unit.key] = _Layer(dict(roles), axes, dict(unit.sites[0].parts))
        self.batch = unit.batch
        data = None if self.data is None else self.data.to(unit.cotangents[0].device)
        if unit.rule.elementwise:
            b = {role: self._kept(widen(unit.grads(role)), 1, data) for role in unit.parameters}
            self.width, a = len(next(iter(b.values()))), None
        else:
            b, a = self._kept(widen(unit.b), 2, data), layer.inputs_of(unit.sites)  # of another chunk
            if a is None and "weight" not in unit.parameters:
                a = b.new_empty(0)  # a bias has no need of inputs
            elif a is None:
                a = unit.kept_a if inputs is None else inputs
                if isinstance(a, (OneHot, Images)):
                    a = a if data is None else a.select(data)
                else:
                    a = widen(a) if data is None else widen(a[:, data])
            self.width = b.shape[1]
        known = () if a is None else versions_of(a)
        layer.pieces[len(self.widths)] = _Piece(tuple(unit.sites), a, b, known)
        tensors = _tensors(a, b)
        self.dtypes.update(t.dtype for t in tensors if t.is_floating_point())
        return self._more(tensors)

    def _more(self, tensors: list[Tensor]) -> int:
        """Return the bytes of tensors that are not held yet: inputs may come again."""
        more = 0
        for t in tensors:
            key, size = t.data_ptr(), t.numel() * t.element_size()
            more += max(0, size - self.held.get(key, 0))
            self.held[key] = max(size, self.held.get(key, 0))
        return more

    @property
    def dtype(self) -> torch.dtype:
        """The widest data type of what is kept."""
        return max(self.dtypes, key=lambda dtype: torch.finfo(dtype).bits)

    def _kept(self, t: Tensor, axis: int, data: Tensor | None) -> Tensor:
        t = t if data is None else t.index_select(axis, data)
        return t if self.scale == 1 else t * self.scale

    def close_chunk(self) -> None:
        """Note the end of a chunk of columns, if one has begun."""
        if self.width is not None:
            self.widths.append(self.width)
            self.width = None

    def forget(self) -> None:
        """Let go of all tensors; what is known is the parameters."""
        self.held.clear()
        for layer in self.layers.values():
            layer.pieces.clear()

    def covers(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether vectors arrived at all of some parameters."""
        return {id(p) for p in parameters} <= {id(p) for p in self.parameters}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that vectors arrived at."""
        found = {id(p): p for layer in self.layers.values() for p in layer.parameters.values()}
        return list(found.values())

    # ------------------------------------------------------------------ factors

    def factor(self, parameters: Sequence[nn.Parameter]) -> Factor:
        """Return the factor over some parameters, its rows in their order.

        Args:
            parameters: Parameters that vectors arrived at.
        """
        uses: dict[int, list[tuple[_Layer, str]]] = {}
        for layer in self.layers.values():
            for role, p in layer.parameters.items():
                uses.setdefault(id(p), []).append((layer, role))
        found, k = [], 0
        while k < len(parameters):
            calls = uses[id(parameters[k])]
            layer, role = calls[0]
            bias = parameters[k + 1] if k + 1 < len(parameters) else None
            if len(calls) == 1 and role == "weight" and _joins(layer, bias, uses):
                found.append(self._of_layer(layer, ("weight", "bias")))
                k += 2
                continue
            terms = [self._of_layer(layer, (role,)) for layer, role in calls]
            found.append(terms[0] if len(terms) == 1 else Sum(terms))
            k += 1
        return found[0] if len(found) == 1 else Stacked(found)

    def _of_layer(self, layer: _Layer, roles: tuple[str, ...]) -> Factor:
        pieces = layer.pieces
        same = len({piece.sites for piece in pieces.values()}) == 1
        if same and len(pieces) == len(self.widths):
            return self._of_pieces(layer, [pieces[k] for k in range(len(self.widths))], roles)
        some = next(iter(pieces.values()))
        chunks = [
            self._of_pieces(layer, [pieces.get(k) or _zeros(some, width)], roles)
            for k, width in enumerate(self.widths)
        ]
        return chunks[0] if len(chunks) == 1 else Concatenated(chunks)

    @staticmethod
    def _of_pieces(layer: _Layer, pieces: list[_Piece], roles: tuple[str, ...]) -> Factor:
        """Return the factor of chunks that the same calls brought."""
        first, shapes = pieces[0], [layer.parameters[role].shape for role in roles]
        if first.a is None:
            rows = [piece.b[roles[0]] for piece in pieces]
            return DenseFactor((rows[0] if len(rows) == 1 else torch.cat(rows)).flatten(0, 1))
        if roles == ("bias",):
            rows = [piece.b.sum(3).permute(1, 2, 0, 3).unsqueeze(-1) for piece in pieces]
            rows = rows[0] if len(rows) == 1 else torch.cat(rows)
            return DenseFactor(layer.placed("bias", rows.flatten(0, 1)))
        joined = first.b
        if len(pieces) > 1:  # the joined vectors take the place of the chunks'
            widths = [piece.b.shape[1] for piece in pieces]
            joined = torch.cat([piece.b for piece in pieces], dim=1)
            for piece, b in zip(pieces, joined.split(widths, dim=1), strict=True):
                piece.b = b
        axes = [layer.axes[role] for role in roles]
        return LayerFactor(first.a, joined, shapes, axes, layer.parts.get("weight"), first.versions)


def _joins(layer: _Layer, bias: nn.Parameter | None, uses: dict[int, list]) -> bool:
    """Whether a layer's weight and the parameter behind it are one factor: its own bias."""
    if bias is None or layer.parameters.get("bias") is not bias or len(uses[id(bias)]) > 1:
        return False
    piece = next(iter(layer.pieces.values()))
    plain = piece.a is not None and not isinstance(piece.a, OneHot)
    return plain and layer.parts.get("weight") == layer.parts.get("bias")


def _zeros(piece: _Piece, width: int) -> _Piece:
    """Return a piece of zero vectors."""
    if piece.a is None:
        rows = {role: t.new_zeros(width, *t.shape[1:]) for role, t in piece.b.items()}
        return _Piece(piece.sites, None, rows)
    g, _, *rest = piece.b.shape
    return _Piece(piece.sites, piece.a, piece.b.new_zeros(g, width, *rest), piece.versions)


def _tensors(a: Tensor | OneHot | Images | None, b: Tensor | dict[str, Tensor]) -> list[Tensor]:
    found = list(b.values()) if isinstance(b, dict) else [b]
    if isinstance(a, OneHot):
        return [*found, a.index]
    if isinstance(a, Images):
        return [*found, a.x]
    return found if a is None else [*found, a]
