"""Input factors of convolutions without unfolding."""

from backpack_ext.conv_factors.geometry import Geometry
from backpack_ext.conv_factors.means import patch_means

__all__ = ["Geometry", "patch_means"]
