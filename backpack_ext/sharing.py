r"""``sharing``: which positions of padded data exist, and which datum a row of ragged data belongs to.

Layers are brought to ``[N, S, ...]``, whatever the number S_n of positions that datum n really has:
positions that do not exist hold zeros, in inputs and in vectors. Sums over positions are right then
by themselves. Only what divides by a number of positions has to know how many exist.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from backpack_ext.errors import RecordingError, UnsupportedError

if TYPE_CHECKING:
    from backpack_ext.site import Site

NORMALIZE = ("mean", "sum")

# Stands for the rows of losses in a mapping of module paths.
LOSS = "loss"

Segmentation = Tensor | Sequence[Tensor]


class sharing:
    r"""Say which positions exist, or which datum each row belongs to, for forward passes in the block.

    .. code-block:: python

        with backpack(KFAC("reduce")), sharing(mask=mask):         # padded sequences, mask[N, T]
            loss_fn(model(x), y).backward()
        with backpack(KFAC("reduce")), sharing(segments=graph):    # graphs, graph[node]
            loss_fn(model(x, edges, graph), y).backward()

    With ``S_n`` existing positions of datum n in a layer, ``S_n > 0`` for N' of the data:

    =================== ============================================ ==============================
    approx, normalize   A                                            B
    =================== ============================================ ==============================
    expand              ``1/(sum_n S_n) sum_ns a a^T``               ``sum_vns b b^T``
    reduce, "mean"      ``1/N' sum_n abar abar^T``, abar = mean_s a  ``sum_vn bhat bhat^T``,
                                                                     bhat = sum_s b
    reduce, "sum"       ``1/N' sum_n ahat ahat^T``, ahat = sum_s a   ``sum_vn bbar bbar^T``,
                                                                     bbar = mean_s b
    =================== ============================================ ==============================

    Where all S_n are equal, ``B (x) A`` is the same for both. Otherwise "mean" is exact for a linear
    model that is read out by a mean over positions, "sum" for one that is read out by a sum. With
    ``bias="joint"`` the constant that is appended is 1, and S_n for "sum": the bias's inputs are
    ones, treated as the others. A separate bias has the same, exact block for both. All other
    quantities do not depend on ``normalize``.

    *Masks.* Layers read as ``[N, T, ...]``, also when flattened or sequence-first, lack the positions
    where the mask is False: neither inputs nor vectors count there. Layers with one position per
    datum (behind a pooling) are plain. A loss may have the rows ``logits[mask]``. The mask is
    believed: where positions that it leaves out do reach the loss, the check of layers (see
    `extend`) finds that their gradient is not autograd's, the first time. Parameters without a rule
    get what autograd brings.

    *Segments.* N is the number of data here, not the size of the model's first input. Layers, and
    losses, whose leading size is the length of a segments tensor are read by it, those with leading
    size N are plain, and others raise. Where a length happens to be N and the rows are not one per
    datum in order, sizes do not say which is meant: that raises too, unless a mapping has an entry
    for the layer's path (other than ``""``), or for ``"loss"``.

    *Mappings* go from module paths, as in ``extend(model, batch_axis=...)``, to what holds for the
    modules there and below; the longest path wins. None means plain, as do paths without an entry.
    The path ``"loss"`` stands for the rows of losses: ``segments={"": graph, "head": None, "loss":
    None}``; a mask there says that they are ``logits[mask]``.

    The forward pass records; the backward pass may run inside or outside of the block. Blocks may
    be nested, the innermost counts. Unlike ``backpack``, an instance can be used again.

    Args:
        mask: ``[N, T]``, bool, True where a position exists; or a mapping to such.
        segments: ``[R]``, integers, the datum of each row, in any order; or a list of such, for nodes
            and edges, that are told apart by their lengths; or a mapping to such.
        num_data: The number of data N for ``segments``; by default the largest entry plus 1. The
            last data may have no rows.
        normalize: ``"mean"`` or ``"sum"``, for ``approx="reduce"``.

    Raises:
        ValueError: If both of ``mask`` and ``segments`` or none are given; if ``normalize`` is neither
            "mean" nor "sum"; for wrong shapes, negative entries, too small a ``num_data``. In the
            backward pass: if a layer's rows fit neither mask nor segments, or fit several.
        TypeError: If something is no tensor of the right data type.
        RecordingError: In the backward pass, if a layer was called outside of the block in which the
            backward pass runs.

    References:
        Eschenhagen et al. (2023), Kronecker-factored approximate curvature for modern neural network
        architectures.

    Example:
        The mean over one and over two rows; the block of reduce is exact:

        >>> from backpack_ext import KFAC, backpack, extend, sharing
        >>> model, loss_fn = extend(nn.Linear(1, 1, bias=False)), extend(nn.MSELoss(reduction="sum"))
        >>> X, graph = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 1])
        >>> with backpack(KFAC("reduce", "exact")), sharing(segments=graph):
        ...     z = model(X)
        ...     means = torch.stack([z[:1].mean(0), z[1:].mean(0)])
        ...     loss_fn(means, torch.zeros(2, 1)).backward()
        >>> model.weight.kfac.trace().round()  # 2 (1^2 + 3^2), the Hessian
        tensor(20.)
    """

    # The innermost block, or None. Like BackPACK's own context it is global to the process.
    current: sharing | None = None

    def __init__(
        self,
        mask: Tensor | Mapping[str, Tensor | None] | None = None,
        segments: Segmentation | Mapping[str, Segmentation | None] | None = None,
        num_data: int | None = None,
        normalize: str = "mean",
    ):
        if (mask is None) == (segments is None):
            raise ValueError(
                "sharing: expected one of `mask` (padded data) and `segments` (ragged rows), got "
                f"{'neither' if mask is None else 'both'}."
            )
        if normalize not in NORMALIZE:
            raise ValueError(f"sharing: normalize={normalize!r}; expected one of {NORMALIZE}.")
        self.normalize = normalize
        self.kind = "segments" if mask is None else "mask"
        given = segments if mask is None else mask
        given = dict(given) if isinstance(given, Mapping) else {"": given}
        self._outer: list[sharing | None] = []
        # paths that no model has shown yet
        self._unseen = set(given) - {"", LOSS}
        self.segments: tuple[Segments, ...] = ()
        self.num_data: int | None = None
        if mask is not None:
            if num_data is not None:
                raise ValueError("sharing: num_data goes with `segments`; a mask [N, T] has N rows.")
            self._entries = {path: _checked_mask(path, m) for path, m in given.items()}
        else:
            self._read_segments(given, num_data)

    def __enter__(self) -> sharing:
        self._outer.append(sharing.current)
        sharing.current = self
        return self

    def __exit__(self, *exc) -> None:
        sharing.current = self._outer.pop()

    def __repr__(self) -> str:
        return f"sharing({self.kind}, normalize={self.normalize!r})"

    def _read_segments(self, given: Mapping[str, Segmentation | None], num_data: int | None) -> None:
        owners = {path: _checked_segments(path, entry) for path, entry in given.items()}
        tensors = [t for entry in owners.values() for t in entry or ()]
        needed = max((int(t.max()) + 1 for t in tensors if len(t)), default=0)
        if num_data is None:
            num_data = needed
        if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < max(1, needed):
            raise ValueError(
                f"sharing: num_data={num_data!r}; expected an integer of at least {max(1, needed)}: "
                f"the segments name {needed} data."
            )
        self.num_data = num_data
        known: list[tuple[Tensor, Segments]] = []

        def made(entry: list[Tensor]) -> tuple[Segments, ...]:
            return tuple(dict.fromkeys(_made(t, num_data, known) for t in entry))

        self._entries = {k: None if entry is None else made(entry) for k, entry in owners.items()}
        self.segments = tuple(s for _, s in known)

    # ---------------------------------------------------------------- the forward pass

    def see(self, module: nn.Module) -> None:
        """Note the module paths of a model that is called."""
        if self._unseen:
            self._unseen -= {path for path, _ in module.named_modules(remove_duplicate=False)}

    def record(self, site: Site) -> None:
        """Have a layer's call read by this."""
        site.sharing = self
        if self.num_data is not None:
            site.batch = self.num_data
        if self._unseen:  # of a part that is called on its own
            self._unseen -= {k for k in self._unseen if f"{site.name}.".startswith(f"{k}.")}

    # ---------------------------------------------------------------- the backward pass

    def check(self) -> None:
        """Raise if a mapping names modules that no model has shown."""
        if self._unseen:
            raise ValueError(
                f"sharing: `{self.kind}` names {sorted(self._unseen)}, but the model has no such "
                "modules. Expected module paths as in extend(model, batch_axis=...), '' or 'loss'."
            )

    def _entry(self, path: str) -> tuple[str | None, Tensor | tuple[Segments, ...] | None]:
        """Return the longest given prefix of a module path, and what it maps to."""
        while path not in self._entries:
            if not path:
                return None, None
            path = path.rpartition(".")[0]
        return path, self._entries[path]

    def existing(self, site: Site, positions: int) -> Tensor | None:
        """Return which of a layer's positions exist, ``[N, S]``; None if it is plain.

        Args:
            site: The layer's call, its input in normal form.
            positions: Their number S.
        """
        if self.kind == "segments":
            rows = site.segments
            if rows is None:
                return None
            return rows.existing.repeat_interleave(positions // rows.width, dim=1)
        key, mask = self._entry(site.name)
        if mask is None or (site.broadcast and positions == 1):
            return None
        N, T = mask.shape
        if site.batch != N:
            raise ValueError(
                f"sharing: the mask for {site.label} has shape {tuple(mask.shape)}, [N, T], but the "
                f"batch has N = {site.batch} data. Pass one row per datum."
            )
        if positions == T == 1 and not key and not mask.all():
            raise ValueError(
                f"sharing: with a mask of shape {tuple(mask.shape)}, {site.label} may be a layer "
                "whose only position is masked, or one behind a pooling. Say which: "
                f"mask={{{site.name!r}: mask}} for the former."
            )
        if positions == T:
            return mask
        if positions == 1:
            return None
        raise ValueError(
            f"sharing: {site.label} has {positions} positions per datum; expected {T}, as the mask of "
            f"shape {tuple(mask.shape)} has, or 1. Give it a mask of its own, or None if all its "
            f"positions exist: mask={{'': mask, {site.name!r}: ...}}."
        )

    def refuse_steps(self, site: Site) -> None:
        """Raise for weights of a recurrent module: its steps are calls, not positions of a mask."""
        if self._entry(site.name)[1] is not None:
            path = site.name.rpartition(".")[0]
            raise UnsupportedError(
                f"sharing: {site.label} is used in a recurrent module, whose steps a mask does not tell "
                "apart: each is a call of its own. Count all steps of all data: "
                f"sharing(mask={{'': mask, {path!r}: None}})."
            )

    def segments_of(self, site: Site, size: int) -> Segments | None:
        """Return what a layer's rows are read by; None if it is plain.

        Args:
            site: The layer's call.
            size: The number of its rows.
        """
        key, entry = self._entry(site.name)
        if self.kind == "mask" or entry is None:
            return None
        sure = bool(key) or key == site.name
        found, problem = self._match(entry, size, sure)
        if problem:
            raise ValueError(
                f"sharing: {site.label} has {size} rows; {problem} Say what holds for it: "
                f"segments={{'': ..., {site.name!r}: ITS_SEGMENTS or None}}."
            )
        return found

    def of_loss(self, size: int, batch: int, batch_axis: int) -> Segments | None:
        """Return what the rows of a loss are read by; None if plainly.

        Args:
            size: The leading size of the loss's input.
            batch: Number of data N.
            batch_axis: 1 if the rows are ordered sequence-first.

        Raises:
            UnsupportedError: If the rows fit nothing.
            ValueError: If they fit several readings.
        """
        if self.kind == "mask":
            return self._packed(size, batch, batch_axis)
        sure = LOSS in self._entries
        entry = self._entries[LOSS] if sure else self.segments
        if entry is None or batch == 1:
            return None
        found, problem = self._match(entry, size, sure)
        if problem:
            error = UnsupportedError if size not in self.sizes else ValueError
            raise error(
                f"sharing: the loss's input has {size} rows; {problem} Say what holds for it: "
                "segments={'': ..., 'loss': THE_DATUM_OF_EACH_ROW or None}."
            )
        return found

    def _match(
        self, entry: Iterable[Segments], size: int, sure: bool
    ) -> tuple[Segments | None, str | None]:
        """Return the segments of a certain length, None for plain rows; and what is wrong."""
        found = [s for s in entry if s.length == size]
        if size == self.num_data and all(s.plain for s in found):
            return None, None
        if len(found) == 1 and (sure or size != self.num_data):
            return found[0], None
        if not found:
            lengths = sorted({s.length for s in entry})
            return None, (
                f"expected one row per entry of the segments (lengths {lengths}) or per datum "
                f"(N = {self.num_data})."
            )
        several = f"{len(found)} different segments have" if len(found) > 1 else "the segments have"
        also = " and so is N" if size == self.num_data else ""
        return None, f"{several} this length{also}, so its rows can be read in several ways."

    def _packed(self, size: int, batch: int, batch_axis: int) -> Segments | None:
        """Return the data of the rows ``logits[mask]``, if a loss has them."""
        sure = LOSS in self._entries
        mask = self._entries.get(LOSS if sure else "")
        if mask is None or (batch_axis and not sure) or mask.shape[0] != batch:
            return None
        owner = mask.nonzero()[:, 0]
        if len(owner) != size or size == mask.numel():
            return None
        rows = Segments(owner, batch)
        if rows.plain:
            return None
        if size % batch == 0 and not sure:
            raise ValueError(
                f"sharing: the loss's input has {size} rows. The mask has as many True entries, but "
                f"they are a multiple of N = {batch} too. Say which: mask={{'': mask, 'loss': mask}} "
                "for logits[mask], or 'loss': None."
            )
        return rows

    @property
    def sizes(self) -> Collection[int]:
        """Sizes of an axis along which the data may be apart, besides N."""
        return {s.length for s in self.segments}

    def sum_rows(self, path: str, node: Node, index: int, g: Tensor) -> Tensor:
        """Add up the rows of each datum, ``[v, N, ...]`` from ``[v, R, ...]``: see `Capture`.

        Args:
            path: Of a layer whose output all data share.
            node: Where it was added to each row.
            index: Which output of the node.
            g: What arrived there.
        """
        size = g.shape[1]
        key, entry = self._entry(path)
        if not any(s.length == size for s in entry or ()):
            key, entry = None, self.segments
        rows, problem = self._match(entry, size, bool(key))
        if problem:
            raise ValueError(
                f"sharing: the output of {path!r}, which all data share, is added to {size} rows; "
                f"{problem} Say what they are: segments={{'': ..., {path!r}: THEIR_SEGMENTS}}."
            )
        return g if rows is None else rows.pad(g, 1).sum(2)


class Segments:
    """Rows ``[R]``, each of one datum, and their places in ``[N, W]``, W the largest number of rows.

    Args:
        owner: ``[R]``, the datum of each row.
        num_data: Number of data N.

    Attributes:
        length: R.
        width: W, at least 1.
        existing: ``[N, W]``, which places hold a row.
        plain: Whether row n is datum n.
    """

    def __init__(self, owner: Tensor, num_data: int):
        self.owner, self.num_data, self.length = owner, num_data, len(owner)
        counts = torch.bincount(owner, minlength=num_data)
        self.width = max(1, int(counts.max()))
        self.existing = torch.arange(self.width, device=owner.device) < counts[:, None]
        order = owner.argsort(stable=True)
        rank = torch.empty_like(owner)
        # the number of a row among those of its datum, in the order of the rows
        first = counts.cumsum(0) - counts
        rank[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]
        self.places = owner * self.width + rank
        self.plain = len(owner) == num_data and bool((owner[1:] > owner[:-1]).all())

    def pad(self, t: Tensor, dim: int) -> Tensor:
        """Bring ``[..., R, ...]`` to ``[..., N, W, ...]``, zero where no row is."""
        shape = (*t.shape[:dim], self.num_data * self.width, *t.shape[dim + 1 :])
        out = t.new_zeros(shape).index_copy_(dim, self.places.to(t.device), t)
        return out.unflatten(dim, (self.num_data, self.width))

    def unpad(self, t: Tensor, dim: int) -> Tensor:
        """Bring ``[..., N, W, ...]`` back to ``[..., R, ...]``."""
        return t.flatten(dim, dim + 1).index_select(dim, self.places.to(t.device))


def sharing_of(sites: Iterable[Site], start: str) -> sharing | None:
    """Return the block in which the layers behind a loss (or output) were called, if in one.

    Raises:
        RecordingError: If they were called in different ones, or in none and one is active now.
    """
    found = {id(site.sharing): site for site in sites}
    site = next(iter(found.values()), None)
    context = None if site is None else site.sharing
    outside = next((s for s in found.values() if s.sharing is None), None)
    active = sharing.current
    if active is not None and outside is not None:
        raise RecordingError(
            f"{outside.label} was called outside of the `with sharing(...)` block that the backward "
            "pass runs in. The forward pass records: call the model inside of the block."
        )
    if len(found) > 1 or (active is not None and context is not None and context is not active):
        raise RecordingError(
            f"The layers behind {start} were called in different `sharing` blocks, or in another one "
            "than is active in the backward pass. Call the model in one block, and run the backward "
            "pass in the same or in none."
        )
    if context is not None:
        context.check()
    return context


def _checked_mask(path: str, mask: Tensor | None) -> Tensor | None:
    name = f"the mask for {path!r}" if path else "the mask"
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else repr(type(mask).__name__)
        raise TypeError(
            f"sharing: {name} is {came}; expected a torch.bool tensor [N, T], True where a position "
            "exists (attention_mask.bool(), ~key_padding_mask)."
        )
    if mask.dim() != 2:
        raise ValueError(f"sharing: {name} has shape {tuple(mask.shape)}; expected [N, T].")
    return mask.detach()


def _checked_segments(path: str, entry: Segmentation | None) -> list[Tensor] | None:
    name = f"the segments for {path!r}" if path else "the segments"
    if entry is None:
        return None
    tensors = [entry] if isinstance(entry, Tensor) else entry
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise TypeError(
            f"sharing: {name} are {entry!r}; expected an integer tensor [R], or a list of some."
        )
    for t in tensors:
        integers = isinstance(t, Tensor) and t.dtype != torch.bool
        if not integers or t.is_floating_point() or t.is_complex():
            came = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else repr(type(t).__name__)
            raise TypeError(f"sharing: {name} contain {came}; expected integers, the datum of each row.")
        if t.dim() != 1:
            raise ValueError(f"sharing: {name} have shape {tuple(t.shape)}; expected [R].")
        if bool((t < 0).any()):
            raise ValueError(
                f"sharing: {name} contain {int(t.min())}; expected the data's numbers, 0 to N - 1. "
                "Every row belongs to a datum: leave out rows that are padding, or use a mask."
            )
    return [t.detach().long() for t in tensors]


def _made(owner: Tensor, num_data: int, known: list[tuple[Tensor, Segments]]) -> Segments:
    """Return the segments of a tensor; equal ones are the same object."""
    for other, segments in known:
        if other.shape == owner.shape and torch.equal(other, owner.to(other.device)):
            return segments
    known.append((owner, Segments(owner, num_data)))
    return known[-1][1]
