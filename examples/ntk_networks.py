"""Networks of any width in two parametrisations that compute the same function at the start.

*Standard*: weights are drawn from N(0, g^2 / fan_in). *NTK* (Jacot et al. 2018): weights are drawn from
N(0, 1), and the layer's input is multiplied by g / sqrt(fan_in). Outputs have the same distribution, and
after the same seed are the same. But derivatives by weights differ by that factor, and hence what
gradient descent does.
"""

from collections.abc import Callable
from math import prod, sqrt

from torch import Tensor, nn

PARAMETRISATIONS = ("standard", "ntk")
# Of ReLU layers: g^2 = 2 keeps the mean square of activations.
RELU_GAIN = sqrt(2)


class Scale(nn.Module):
    """Multiply by a constant. A module of its own, so that the layer behind it is a plain one.

    Args:
        scale: The constant.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the multiple."""
        return self.scale * x

    def extra_repr(self) -> str:
        """Return the constant, for `repr`."""
        return f"{self.scale:.4g}"


def layer(module: nn.Linear | nn.Conv2d, parametrisation: str, gain: float = 1.0) -> list[nn.Module]:
    """Draw a layer's weights and return what stands in its place; biases start at zero.

    Args:
        module: The layer.
        parametrisation: "standard" or "ntk".
        gain: g, by which the layer multiplies the root mean square of its inputs, over sqrt(fan_in).

    Raises:
        ValueError: If there is no such parametrisation.
    """
    if parametrisation not in PARAMETRISATIONS:
        raise ValueError(f"parametrisation={parametrisation!r}; expected one of {PARAMETRISATIONS}.")
    scale = gain / sqrt(prod(module.weight.shape[1:]))
    nn.init.zeros_(module.bias)
    if parametrisation == "standard":
        nn.init.normal_(module.weight, std=scale)
        return [module]
    nn.init.normal_(module.weight)
    return [Scale(scale), module]


def mlp(width: int, parametrisation: str, inputs: int = 64, outputs: int = 10) -> nn.Sequential:
    """Return a ReLU network with two hidden layers.

    Args:
        width: Neurons of each hidden layer.
        parametrisation: "standard" or "ntk".
        inputs: Number of inputs; images ``[N, ...]`` are flattened.
        outputs: Number of outputs.
    """
    return nn.Sequential(
        nn.Flatten(),
        *layer(nn.Linear(inputs, width), parametrisation, RELU_GAIN),
        nn.ReLU(),
        *layer(nn.Linear(width, width), parametrisation, RELU_GAIN),
        nn.ReLU(),
        *layer(nn.Linear(width, outputs), parametrisation),
    )


def cnn(width: int, parametrisation: str, outputs: int = 10) -> nn.Sequential:
    """Return a ReLU network with two convolutions for images ``[N, 1, 8, 8]``.

    Args:
        width: Channels of each convolution.
        parametrisation: "standard" or "ntk".
        outputs: Number of outputs.
    """
    return nn.Sequential(
        *layer(nn.Conv2d(1, width, 3, padding=1), parametrisation, RELU_GAIN),
        nn.ReLU(),
        nn.AvgPool2d(2),
        *layer(nn.Conv2d(width, width, 3, padding=1), parametrisation, RELU_GAIN),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        *layer(nn.Linear(4 * width, outputs), parametrisation),
    )


NETWORKS: dict[str, Callable[[int, str], nn.Sequential]] = {"mlp": mlp, "cnn": cnn}
