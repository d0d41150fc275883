"""Linear, bilinear, convolution, transposed convolution and embeddings in normal form."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from backpack_ext.conv_factors import Geometry, patch_means
from backpack_ext.conv_factors.choice import product_is_faster
from backpack_ext.conv_factors.moments import moment
from backpack_ext.conv_factors.unfold import patches
from backpack_ext.errors import UnsupportedError
from backpack_ext.images import Images
from backpack_ext.normal import Bags, OneHot
from backpack_ext.rules.base import InputMoment, Rule, by_shape
from backpack_ext.site import Site
from curvature import Axes

TRANSPOSED = Axes("i o -> 1 o i")

# The family of rules whose weight is a plain matrix ``[o, i]``.
PLAIN = "plain matrix"
_KERNEL_AXES = ("x", "y", "z")


class LinearRule(Rule):
    """``nn.Linear`` on inputs ``[N, ..., i]``: all axes between the first and last are shared."""

    @property
    def family(self) -> str | None:
        """Plain matrices ``[o, i]``, unless a subclass lays them out in another way."""
        plain = type(self).weight_axes is Rule.weight_axes and type(self).axes is Rule.axes
        return PLAIN if plain else None

    def inputs(self, site: Site) -> Tensor:
        """Return ``a[n,s,i]``, a view of the layer's input where its layout allows."""
        return site.rows(site.input(), 1)

    @by_shape
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[v,n,s,o]``."""
        return site.vector_rows(g, 1)


class BilinearRule(Rule):
    """``nn.Bilinear``: its inputs are all products of a feature of the one and one of the other."""

    arguments = ("input1", "input2")

    def inputs(self, site: Site) -> Tensor:
        """Return ``a[n,s,(i j)]``, the outer products of the two inputs."""
        if site.input(1) is None:
            raise UnsupportedError(
                f"{site.label}: a bilinear layer has two inputs, but this one was called with one. If "
                "its forward is overridden, register a rule for its class."
            )
        one, two = site.rows(site.input(0), 1), site.rows(site.input(1), 1)
        return (one.unsqueeze(3) * two.unsqueeze(2)).flatten(2)

    @by_shape
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[v,n,s,o]``."""
        return site.vector_rows(g, 1)

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return ``o i j -> 1 o (i j)``."""
        return Axes("o i j -> 1 o (i j)", (("i", module.in1_features),))


class _SpatialRule(Rule):
    """What convolutions and their transposes have in common: positions are output pixels."""

    def __init__(self, dims: int):
        self.dims = dims

    def groups(self, module: nn.Module) -> int:
        """Return the convolution's groups."""
        return module.groups

    def misfit(self, module: nn.Module, x: Tensor, output: Tensor) -> str | None:
        """Return how the sizes of input and output differ from what the module's numbers say."""
        if x.dim() != self.dims + 2 or output.dim() != x.dim():
            return None  # no batch axis: said when it is needed
        try:
            Geometry.of(module, x.shape, output.shape)
        except ValueError as error:
            return f"its output is not that of its own numbers: {error}"
        return None

    def _pixels(self, site: Site, t: Tensor, groups: int) -> Tensor:
        """Bring patches ``[R, pixels, c, k]`` to ``[g, n, s, (c/g k)]``."""
        parts = [site.rows(part.flatten(2), 2).flatten(1, 2) for part in t.chunk(groups, dim=2)]
        return parts[0] if groups == 1 else torch.stack(parts)

    def _check(self, site: Site) -> Tensor:
        x = site.input()
        if x.dim() != self.dims + 2:
            raise UnsupportedError(
                f"{site.label}: the input has no batch axis (shape {tuple(x.shape)}). Add one: "
                "per-datum quantities need it even for a single datum."
            )
        return x

    def inputs(self, site: Site) -> Tensor:
        """Return the patches ``a[g,n,s,(c k)]``: what kernel entries meet at each output pixel."""
        x = self._check(site)
        return self._pixels(site, self._patches(site, x), site.module.groups)

    def inputs_of(self, site: Site, data: slice) -> Tensor | None:
        """Return the patches of some of the data, where each datum is one image."""
        images = self.images(site)
        return None if images is None else images.patches(data)

    def images(self, site: Site) -> Images | None:
        """Return the layer's own input, where each datum is one image and the inputs are its patches."""
        x = self._check(site)
        if not site.leads_with_data(len(x)) or not self._has_patches():
            return None
        return Images(x, self._geometry(site))

    def _patches(self, site: Site, x: Tensor) -> Tensor:
        return patches(x, self._geometry(site))

    def _geometry(self, site: Site) -> Geometry:
        try:
            return Geometry.of(site.module, site.in_shape, site.out_shape)
        except ValueError as error:
            raise UnsupportedError(
                f"{site.label}: its output is not that of its own numbers: {error}. Did they change "
                "after the forward pass?"
            ) from error

    def _has_patches(self) -> bool:
        """Whether its inputs are the patches, as a subclass's need not be."""
        cls = type(self)
        return (cls.inputs, cls._patches, cls._pixels) == (
            *(_SpatialRule.inputs, _SpatialRule._patches, _SpatialRule._pixels),
        )

    def mean_inputs(self, site: Site) -> Tensor | None:
        """Return the means of the patches over each image's pixels; None for inputs of integers."""
        x = self._check(site)
        if not x.is_floating_point() or not self._has_patches():
            return None
        means = patch_means(x, self._geometry(site))
        if site.leads_with_data(len(x)):
            return means.reshape(len(x), site.module.groups, 1, -1).transpose(0, 1)
        return self._pixels(site, means.unsqueeze(1), site.module.groups)

    def moment_shape(self, site: Site) -> tuple[int, int] | None:
        """Return the number of patches and their size, unless a subclass has inputs of its own."""
        if not self._has_patches():
            return None
        size = site.module.in_channels // site.module.groups * prod(site.module.kernel_size)
        return site.out_shape.numel() // max(1, site.module.out_channels), size

    def input_moment(
        self, site: Site, dtype: torch.dtype, with_sum: bool = False, formed: bool = False
    ) -> InputMoment | None:
        """Return the sums of patches and of their outer products, see `backpack_ext.conv_factors`."""
        x = self._check(site)
        geometry = self._geometry(site)
        if formed and product_is_faster(len(x), x.shape[1], geometry, x.device.type):
            return None
        # how the patches would be read as those of the data: each once, or by all data
        n, s = site.rows(x.new_empty(1, 1, 1).expand(len(x), geometry.pixels, 1), 2).shape[:2]
        copies = n * s // max(1, len(x))
        second = moment(x, geometry, dtype=dtype)
        first = None
        if with_sum:
            means = patch_means(x.sum(0, keepdim=True, dtype=dtype), geometry)  # of the sum of all
            first = means.reshape(geometry.groups, -1) * geometry.pixels
        if copies > 1:
            second, first = second * copies, None if first is None else first * copies
        return InputMoment(second, first, n * s * geometry.pixels)

    @by_shape
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[g,v,n,s,o]`` from ``[v, R, (g o), *pixels]``."""
        groups = self.groups(site.module)
        v, R, channels = g.shape[:3]
        g = g.reshape(v, R, groups, channels // groups, -1).permute(2, 0, 1, 4, 3)
        if site.leads_with_data(R):
            return g
        parts = [site.vector_rows(part, 2).flatten(2, 3) for part in g]
        return parts[0] if groups == 1 else torch.stack(parts)


class ConvRule(_SpatialRule):
    """``nn.Conv1d`` to ``nn.Conv3d``: a position is an output pixel, an input its patch."""

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return ``(g o) i k -> g o (i k)``."""
        k = _KERNEL_AXES[: self.dims]
        names = " ".join(k)
        sizes = (("g", module.groups), *zip(k, module.kernel_size, strict=True))
        return Axes(f"(g o) i {names} -> g o (i {names})", sizes)


class ConvTransposeRule(_SpatialRule):
    """``nn.ConvTranspose1d`` to ``3d``: the convolution of the zero-stuffed input."""

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return ``(g i) o k -> g o (i k)``: the stored weight has input channels first."""
        k = _KERNEL_AXES[: self.dims]
        names = " ".join(k)
        sizes = (("g", module.groups), *zip(k, module.kernel_size, strict=True))
        return Axes(f"(g i) o {names} -> g o (i {names})", sizes)


class EmbeddingRule(Rule):
    """``nn.Embedding`` and ``nn.EmbeddingBag``: one-hot inputs, and sums of such, never formed.

    ``padding_idx`` gives zero inputs. A bag is one position: its input is
    ``sum_k w_k e_{token_k}``, with the weights 1, those of the call, or 1 over the number of the
    bag's tokens. One rule for both, because a table that both use is one layer. With
    ``mode="max"`` each feature picks a token of its own: not affine in this sense, and left to
    `backpack_ext.bare`.
    """

    bias = None
    arguments = ("input", "offsets", "per_sample_weights")

    def lists(self, module: nn.Module, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Return the flat tokens and the offsets of bags."""
        bags = isinstance(module, nn.EmbeddingBag) and inputs[1] is not None
        return inputs[:2] if bags else ()

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the table, unless features pick their tokens one by one."""
        return {} if getattr(module, "mode", None) == "max" else super().parameters(module)

    def misfit(self, module: nn.Module, x: Tensor, output: Tensor) -> str | None:
        """Return what is wrong if the first argument cannot be the tokens (a mask, say)."""
        fits = isinstance(module, nn.EmbeddingBag) or x.shape == output.shape[:-1]
        if fits and not (x.is_floating_point() or x.dtype == torch.bool):
            return None
        return (
            f"its first argument, {x.dtype} of shape {tuple(x.shape)}, is not what it looks up for an "
            f"output of shape {tuple(output.shape)}"
        )

    def inputs(self, site: Site) -> OneHot:
        """Return the token indices ``[n,s]`` as one-hot inputs, or the bags ``[n,s]``."""
        m = site.module
        if m.scale_grad_by_freq:
            raise UnsupportedError(
                f"{site.label}: scale_grad_by_freq=True makes the gradient differ from the loss's "
                "derivative, so no curvature belongs to it. Set it to False."
            )
        if isinstance(m, nn.EmbeddingBag):
            return self._bags(site)
        index = site.rows(site.input(), 0)
        mask = None if m.padding_idx is None else index != m.padding_idx
        return OneHot(index, m.num_embeddings, mask)

    def _bags(self, site: Site) -> OneHot:
        m, index, offsets, weight = site.module, *(site.input(k) for k in range(3))
        bags, every = site.out_shape[0], torch.arange(len(index), device=index.device)
        if index.dim() == 2:
            row = every.repeat_interleave(index.shape[1])
        elif offsets is None:
            raise UnsupportedError(
                f"{site.label}: flat tokens of shape {tuple(index.shape)} come with offsets, but none "
                "arrived. If the layer's forward is overridden, register a rule for its class."
            )
        else:
            # of several bags that begin at a token the last has it; those before are empty
            row = torch.searchsorted(offsets, every.to(offsets.dtype), right=True) - 1
            row = row.clamp(max=bags - 1)  # what is behind the last offset is the last bag's too
        index, weight = index.flatten(), None if weight is None else weight.flatten()
        if m.padding_idx is not None:
            kept = index != m.padding_idx
            index, row, weight = index[kept], row[kept], None if weight is None else weight[kept]
        if m.mode == "mean":
            dtype = torch.promote_types(m.weight.dtype, torch.float32)
            weight = (1 / row.bincount(minlength=bags).to(dtype))[row]
        a = OneHot(index, m.num_embeddings, None, Bags(row, (bags, 1), weight))
        return a.at(site.rows(torch.arange(bags, device=index.device), 0))

    @by_shape
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[v,n,s,o]``."""
        return site.vector_rows(g, 1)

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return ``i o -> 1 o i``: an embedding stores one row per input."""
        return TRANSPOSED
