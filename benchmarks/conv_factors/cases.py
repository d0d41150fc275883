"""Convolutions and the sizes of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Case:
    """A convolution on a batch.

    Args:
        name: Channels, size, kernel and so on, for tables.
        module: The convolution; its own number of output channels does not matter.
        sizes: Spatial sizes of its input.
    """

    name: str
    module: nn.Module
    sizes: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self.module.in_channels


def conv(channels: int, size: int | tuple[int, ...], kernel: int, **options) -> Case:
    """Return a convolution with square inputs (``size`` a number), or inputs of a size."""
    sizes = (size, size) if isinstance(size, int) else size
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
    return _case(cls, channels, sizes, kernel, options)


def transposed(channels: int, size: int, kernel: int, **options) -> Case:
    """Return a transposed convolution with square inputs."""
    return _case(nn.ConvTranspose2d, channels, (size, size), kernel, options)


def _case(cls: type, channels: int, sizes: tuple[int, ...], kernel: int, options: dict) -> Case:
    short = {"stride": "s", "padding": "p", "dilation": "d", "groups": "g", "padding_mode": ""}
    said = " ".join(f"{short[key]}{value}" for key, value in options.items())
    kind = "T " if cls is nn.ConvTranspose2d else ""
    name = f"{kind}{channels}x{'x'.join(map(str, sizes))} k{kernel} {said}".strip()
    return Case(name, cls(channels, channels, kernel, bias=False, **options), sizes)
