"""Linear, convolution, transposed convolution and embedding in normal form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backpack_ext.errors import UnsupportedError
from backpack_ext.normal import OneHot
from backpack_ext.rules.base import Rule, by_shape
from backpack_ext.rules.patches import patches, transposed_patches
from backpack_ext.site import Site
from curvature import Axes

TRANSPOSED = Axes("i o -> 1 o i")
_KERNEL_AXES = ("x", "y", "z")


class LinearRule(Rule):
    """``nn.Linear`` on inputs ``[N, ..., i]``: all axes between the first and last are shared."""

    def inputs(self, site: Site) -> Tensor:
        """Return ``a[n,s,i]``, a view of the layer's input where its layout allows."""
        return site.rows(site.input(), 1)

    @by_shape
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[v,n,s,o]``."""
        return site.vector_rows(g, 1)


class _SpatialRule(Rule):
    """What convolutions and their transposes have in common: positions are output pixels."""

    def __init__(self, dims: int):
        self.dims = dims

    def groups(self, module: nn.Module) -> int:
        """Return the convolution's groups."""
        return module.groups

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

    @by_shape
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[g,v,n,s,o]`` from ``[v, R, (g o), *pixels]``."""
        groups = self.groups(site.module)
        v, R, channels = g.shape[:3]
        g = g.reshape(v, R, groups, channels // groups, -1).permute(2, 0, 1, 4, 3)
        parts = [site.vector_rows(part, 2).flatten(2, 3) for part in g]
        return parts[0] if groups == 1 else torch.stack(parts)


class ConvRule(_SpatialRule):
    """``nn.Conv1d`` to ``nn.Conv3d``: a position is an output pixel, an input its patch."""

    def inputs(self, site: Site) -> Tensor:
        """Return the patches ``a[g,n,s,(c k)]``; any stride, dilation, padding and padding mode."""
        m, x = site.module, self._check(site)
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        elif m.padding == "same":
            x = F.pad(x, m._reversed_padding_repeated_twice)
        elif m.padding != "valid" and any(m.padding):
            x = F.pad(x, [p for p in reversed(m.padding) for _ in range(2)])
        return self._pixels(site, patches(x, m.kernel_size, m.stride, m.dilation), m.groups)

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return ``(g o) i k -> g o (i k)``."""
        k = _KERNEL_AXES[: self.dims]
        names = " ".join(k)
        sizes = (("g", module.groups), *zip(k, module.kernel_size, strict=True))
        return Axes(f"(g o) i {names} -> g o (i {names})", sizes)


class ConvTransposeRule(_SpatialRule):
    """``nn.ConvTranspose1d`` to ``3d``: the convolution of the zero-stuffed input."""

    def inputs(self, site: Site) -> Tensor:
        """Return ``a[g,n,s,(c k)]``: for each output pixel the inputs that kernel entries meet."""
        m, x = site.module, self._check(site)
        pixels = site.out_shape[2:]
        t = transposed_patches(x, m.kernel_size, m.stride, m.padding, m.dilation, pixels)
        return self._pixels(site, t, m.groups)

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return ``(g i) o k -> g o (i k)``: the stored weight has input channels first."""
        k = _KERNEL_AXES[: self.dims]
        names = " ".join(k)
        sizes = (("g", module.groups), *zip(k, module.kernel_size, strict=True))
        return Axes(f"(g i) o {names} -> g o (i {names})", sizes)


class EmbeddingRule(Rule):
    """``nn.Embedding``: one-hot inputs, never formed; ``padding_idx`` gives zero inputs."""

    bias = None

    def misfit(self, module: nn.Module, x: Tensor, output: Tensor) -> str | None:
        """Return what is wrong if the first argument cannot be the tokens (a mask, say)."""
        if x.shape == output.shape[:-1] and not (x.is_floating_point() or x.dtype == torch.bool):
            return None
        return (
            f"its first argument, {x.dtype} of shape {tuple(x.shape)}, is not what it looks up for an "
            f"output of shape {tuple(output.shape)}"
        )

    def inputs(self, site: Site) -> OneHot:
        """Return the token indices ``[n,s]`` as one-hot inputs."""
        m = site.module
        if m.scale_grad_by_freq:
            raise UnsupportedError(
                f"{site.label}: scale_grad_by_freq=True makes the gradient differ from the loss's "
                "derivative, so no curvature belongs to it. Set it to False."
            )
        index = site.rows(site.input(), 0)
        mask = None if m.padding_idx is None else index != m.padding_idx
        return OneHot(index, m.num_embeddings, mask)

    @by_shape
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Return ``b[v,n,s,o]``."""
        return site.vector_rows(g, 1)

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return ``i o -> 1 o i``: an embedding stores one row per input."""
        return TRANSPOSED
