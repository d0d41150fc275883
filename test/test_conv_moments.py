"""Second moments of convolution patches from overlaps, against patches read off the convolution."""

import random
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from backpack_ext import KFAC, BatchGrad, UnsupportedError, backpack, extend, register_rule, sharing
from backpack_ext.conv_factors import choice, moments
from backpack_ext.conv_factors.geometry import Dimension, Geometry
from backpack_ext.conv_factors.moments import moment
from backpack_ext.conv_factors.overlaps import Overlaps, overlaps, step_of, window
from backpack_ext.conv_factors.spectra import spectral, transforms
from backpack_ext.rules import RULES

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MODES = ("zeros", "zeros", "reflect", "replicate", "circular")


def drawn(rng: random.Random) -> tuple[nn.Module, Tensor]:
    """A convolution with one output per group, no bias, and a batch that it can be called with."""
    while True:
        dims, groups, channels = rng.randint(1, 3), rng.choice([1, 1, 2, 3]), rng.randint(1, 3)

        def sizes(low: int, high: int, dims: int = dims) -> tuple[int, ...]:
            return tuple(rng.randint(low, high) for _ in range(dims))

        x = torch.randn(rng.randint(1, 4), channels * groups, *sizes(1, 5 if dims == 3 else 7)).double()
        kernel, stride = sizes(1, 3 if dims == 3 else 4), sizes(1, 3)
        options = {"dilation": sizes(1, 2), "groups": groups, "bias": False, "padding": sizes(0, 2)}
        if rng.random() < 0.35:
            cls, options["output_padding"] = TRANSPOSED[dims - 1], sizes(0, 1)
        else:
            cls, options["padding_mode"] = CONVS[dims - 1], rng.choice(MODES)
            if rng.random() < 0.25:
                options["padding"] = rng.choice(["same", "valid"])
                stride = (1,) * dims if options["padding"] == "same" else stride
        try:
            conv = cls(channels * groups, groups, kernel, stride, **options).double()
            if conv(x).numel():
                return conv, x
        except (RuntimeError, ValueError):  # no such convolution, or no output
            continue


@torch.no_grad()
def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """`u[g, (c k), (n o)]`: the outputs for weights that are 1 at one entry and 0 elsewhere."""
    weight, rows = conv.weight, []
    for e in range(weight.numel()):
        weight.zero_().view(-1)[e] = 1
        rows.append(conv(x).flatten(2))
    groups = conv.groups
    u = torch.stack(rows).unflatten(0, (groups, -1))  # [g, (c k), n, g, o]
    return torch.stack([u[g, :, :, g].flatten(1) for g in range(groups)])


def geometry_of(conv: nn.Module, x: Tensor) -> Geometry:
    return Geometry.of(conv, x.shape, conv(x[:1]).shape)


def levels_of(geometry: Geometry) -> list[int]:
    dims = geometry.dimensions
    spectra = geometry.groups == 1 and spectral(dims) is not None
    return list(range(len(dims) + 1 + spectra))


# -- every method ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", range(8))
def test_every_level_of_random_convolutions(seed: int):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(45):
        conv, x = drawn(rng)
        geometry, u = geometry_of(conv, x), patches(conv, x)
        expected = u @ u.mT
        for level in levels_of(geometry):
            for workspace in (moments.WORKSPACE, 1):
                found = moment(x, geometry, level, workspace=workspace)
                assert found.shape == expected.shape and found.is_contiguous(), (conv, level)
                assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10), (conv, x.shape, level)
        assert torch.allclose(moment(x, geometry), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_spectra_of_random_convolutions(seed: int):
    """Of stride 1, where they exist: all borders, dilations, kernels that are wider than the image."""
    rng, count = random.Random(seed), 0
    torch.manual_seed(seed)
    while count < 40:
        size, kernel, dilation = ([rng.randint(1, m) for _ in range(2)] for m in (9, 5, 2))
        most = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [rng.randint(0, m) for m in most]
        options = {"dilation": dilation, "padding": padding, "bias": False}
        cls = rng.choice([nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d])
        if cls is nn.Conv2d:
            options["padding_mode"] = rng.choice(MODES)
        conv, x = (
            cls(3, 1, kernel, **options).double(),
            torch.randn(rng.randint(1, 4), 3, *size).double(),
        )
        try:
            geometry = geometry_of(conv, x)
        except RuntimeError:  # an output without pixels, or more to reflect than there is
            continue
        if len(levels_of(geometry)) < 4:
            continue
        count += 1
        u = patches(conv, x)
        for workspace in (moments.WORKSPACE, 1):
            found = moment(x, geometry, 3, workspace=workspace)
            assert torch.allclose(found, u @ u.mT, rtol=1e-10, atol=1e-10), (conv, x.shape)


def test_frequencies_in_several_parts(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 1, 3, padding=1, bias=False).double(), torch.randn(4, 3, 8, 7).double()
    geometry, u = geometry_of(conv, x), patches(conv, x)
    for at_once in (1, 300, 10**6):
        monkeypatch.setattr("backpack_ext.conv_factors.spectra.AT_ONCE", at_once)
        assert torch.allclose(moment(x, geometry, 3), u @ u.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 2}, {"stride": (1, 2), "padding": 1}])
def test_no_spectra(options: dict):
    conv, x = nn.Conv2d(4, 2, 3, **options), torch.randn(2, 4, 8, 8)
    geometry = geometry_of(conv, x)
    assert levels_of(geometry) == [0, 1, 2]
    assert choice.seconds(2, 4, geometry, 3) == float("inf")
    with pytest.raises(ValueError, match="spectra are for convolutions of two dimensions, stride 1"):
        moment(x, geometry, 3)


def test_windows_are_the_pairs_of_the_pattern():
    rng, count = random.Random(0), 0
    while count < 300:
        transposed, size, kernel = rng.random() < 0.4, rng.randint(1, 9), rng.randint(1, 5)
        stride, dilation, before = rng.randint(1, 4), rng.randint(1, 3), rng.randint(0, 4)
        reach = dilation * (kernel - 1)
        if transposed:
            out = (
                (size - 1) * stride - 2 * before + reach + 1 + rng.randint(0, max(stride, dilation) - 1)
            )
        else:
            out = (size + 2 * before - reach - 1) // stride + 1
        if out < 1:
            continue
        count += 1
        d = Dimension(size, out, kernel, stride, dilation, before, transposed)
        pattern, step, whole = d.pattern(), step_of(d), Overlaps(d)
        for k, other in product(range(kernel), repeat=2):
            both = torch.einsum("io,jo->ij", pattern[:, :, k].int(), pattern[:, :, other].int())
            expected = {tuple(pair) for pair in both.nonzero().tolist()}
            w, found = window(d, k, other), set()
            for lo, hi in [] if w is None else whole.segments(w):
                pairs = {(step * j + w.left, step * (j + w.shift) + w.right) for j in range(lo, hi)}
                assert not pairs & found  # segments are disjoint
                found |= pairs
            assert found == expected, (d, k, other)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "a slice"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_layouts(kernel: int, layout: str):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 6).double()
    x = {
        "contiguous": lambda: x,
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3),
        "a slice": lambda: x[:, 1:, ::2, 1:],
    }[layout]()
    conv = nn.Conv2d(x.shape[1], 1, kernel, padding=kernel // 2, bias=False).double()
    u = patches(conv, x)
    for level in range(4):
        assert torch.allclose(moment(x, geometry_of(conv, x), level), u @ u.mT, rtol=1e-10, atol=1e-10)


def test_batches_of_none():
    conv = nn.Conv2d(4, 2, 3, groups=2, padding=1)
    geometry = Geometry.of(conv, (0, 4, 5, 6), (0, 2, 5, 6))
    for level in range(3):
        found = moment(torch.zeros(0, 4, 5, 6), geometry, level)
        assert found.shape == (2, 18, 18) and not found.any()


@pytest.mark.parametrize("level", [-1, 4])
def test_levels_that_there_are_not(level: int):
    conv, x = nn.Conv2d(1, 1, 3), torch.randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match=rf"level={level}; expected 0 to 2 dimensions, or one more"):
        moment(x, geometry_of(conv, x), level)


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [4, 20])
def test_accuracy_in_float32_and_of_half_types(size: int, level: int):
    """Within 4e-6 of sqrt(A_ii A_jj), also when unfolding; half types are summed in float32."""
    torch.manual_seed(0)
    x = torch.randn(16, 24, size, size).relu() + torch.rand(1)  # far from mean zero
    conv = nn.Conv2d(24, 1, 3, padding=1, bias=False)
    geometry = geometry_of(conv, x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = x.to(dtype)
        exact = moment(given.double(), geometry, 0)
        found = moment(given, geometry, level)
        assert found.dtype == torch.float32
        scale = exact.diagonal(dim1=1, dim2=2).sqrt()
        error = (found.double() - exact).abs() / (scale.unsqueeze(1) * scale.unsqueeze(2))
        assert error.max() < 4e-6


def test_nothing_cancels_but_by_spectra():
    """Where the border is large and the inside small: bounds hold for pairs that miss the border.

    By spectra, errors are relative to the squares of channels; these are as large as the border.
    """
    torch.manual_seed(0)
    x = torch.randn(4, 2, 8, 8)
    x[:, :, 0] *= 1e5
    x[..., 0] *= 1e5
    conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    geometry = geometry_of(conv, x)
    exact = moment(x.double(), geometry, 0)[0]
    scale = exact.diagonal().sqrt()
    for level in (0, 1, 2):
        error = (moment(x, geometry, level)[0].double() - exact).abs() / scale / scale[:, None]
        assert error.max() < 4e-6
    found, channel = moment(x, geometry, 3)[0], x.double().square().sum((0, 2, 3)).sqrt()
    channel = channel.repeat_interleave(9)
    assert ((found.double() - exact).abs() / channel / channel[:, None]).max() < 4e-6
    assert ((found.double() - exact).abs() / scale / scale[:, None]).max() > 4e-6


def test_squares_by_spectra_are_not_negative():
    """A channel that is active at the border only, or never, has zeros where its square is zero."""
    torch.manual_seed(0)
    x = torch.randn(8, 6, 10, 10)
    x[:, :4, 1:, :] = 0
    x[:, 5] = 0
    conv = nn.Conv2d(6, 1, 3, padding=1, bias=False)
    geometry = geometry_of(conv, x)
    squares = moment(x, geometry, 3)[0].diagonal()
    exact = moment(x.double(), geometry, 0)[0].diagonal()
    assert (squares >= 0).all() and ((squares == 0) == (exact == 0)).all()


# -- what is chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, channels, size, options, expected",
    [
        (32, 64, 32, {"padding": 1}, {3}),
        (32, 256, 14, {"padding": 1}, {3}),
        (32, 64, 32, {"padding": 1, "stride": 2}, {0, 1, 2}),
        (64, 3, 32, {"padding": 1}, {1}),
        (32, 64, 32, {"kernel_size": 1, "stride": 2}, {0}),
        (32, 48, 32, {"kernel_size": 4, "stride": 4}, {0}),
        (2, 2, 5, {"padding": 1}, {0}),
    ],
)
def test_choice(n: int, channels: int, size: int, options: dict, expected: set[int]):
    with torch.device("meta"):
        conv = nn.Conv2d(channels, 1, **{"kernel_size": 3, **options})
        geometry = geometry_of(conv, torch.empty(n, channels, size, size))
    assert choice.best_level(n, channels, geometry) in expected


def test_large_kernels_in_many_dimensions_are_unfolded_in_most():
    """Plans of too many products are not even made."""
    with torch.device("meta"):
        conv = nn.Conv3d(1, 1, 9, padding=4)
        geometry = geometry_of(conv, torch.empty(2, 1, 20, 20, 20))
    assert choice.seconds(2, 1, geometry, 3) == float("inf")
    assert choice.best_level(2, 1, geometry) < 3


def test_plans_are_kept():
    d = Dimension(7, 7, 3, before=1)
    assert overlaps(d) is overlaps(Dimension(7, 7, 3, before=1))
    assert moments.plan((d, d)) is moments.plan((d, d))


def test_transforms_are_made_for_what_uses_them():
    """They are large; that spectra are thought of makes none."""
    geometry = Geometry((Dimension(211, 211, 3, before=1),) * 2)
    before = [cache.cache_info().currsize for cache in transforms.caches]
    assert choice.seconds(2, 4, geometry, 3) < float("inf")
    choice.best_level(2, 4, geometry)
    assert [cache.cache_info().currsize for cache in transforms.caches] == before


# -- in KFAC ---------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A convolution that is called on images of two sizes."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.conv(x), self.conv(x[..., 1:])
        return (one.flatten(1).sum(1) + other.flatten(1).sum(1).square())[:, None]


def factor(model: nn.Module, conv: nn.Module, x: Tensor, **options) -> Tensor:
    """KFAC-expand's A of a convolution, whose inputs are the model's."""
    extend(model, check_layers=False)  # the check of recorded calls forms patches
    with backpack(KFAC("expand", **{"fisher": "empirical", **options})):
        extend(nn.MSELoss(reduction="sum"))(model(x), torch.zeros(len(x), 1).to(x)).backward()
    return conv.weight.kfac.A


@pytest.fixture(params=[0, 1, 2, 3])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A level that is taken whatever is fastest."""

    def given(n: int, channels: int, geometry: Geometry, device: str = "cpu") -> int:
        return min(request.param, levels_of(geometry)[-1])

    monkeypatch.setattr(moments, "best_level", given)
    monkeypatch.setattr(choice, "best_level", given)
    return request.param


class Summed(nn.Module):
    """One number per datum."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1).square().sum(1, keepdim=True)


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("fisher", ["empirical", "mc", "forward"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_factors(level: int, bias: str, fisher: str, transposed: bool, groups: int, monkeypatch):
    """Patches are not formed, and A is their mean; in joint blocks with the mean patch."""
    torch.manual_seed(0)
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv, x = cls(4, 2, 3, stride=2, padding=1, groups=groups).double(), torch.randn(3, 4, 5, 6).double()
    plain = cls(4, groups, 3, stride=2, padding=1, groups=groups, bias=False).double()
    u = patches(plain, x)
    if bias == "joint":
        u = torch.cat([u, torch.ones_like(u[:, :1])], dim=1)
    expected = u @ u.mT / u.shape[2]
    forbid_patches(monkeypatch)
    found = factor(Summed(conv), conv, x, fisher=fisher, bias=bias, keep="factor")
    assert torch.allclose(found, expected if groups > 1 else expected[0], rtol=1e-10, atol=1e-10)


def forbid_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args):
        raise AssertionError("patches were formed")

    monkeypatch.setattr("backpack_ext.rules.affine.patches", refuse)


@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_several_calls_add_up(level: int, bias: str, monkeypatch: pytest.MonkeyPatch):
    """Each call's sum counts as many rows as it has; inputs are not concatenated."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 2, 3, padding=1).double(), torch.randn(3, 2, 5, 6).double()
    plain = nn.Conv2d(2, 1, 3, padding=1, bias=False).double()
    u = torch.cat([patches(plain, x), patches(plain, x[..., 1:])], dim=2)[0]
    if bias == "joint":
        u = torch.cat([u, torch.ones_like(u[:1])])
    forbid_patches(monkeypatch)
    found = factor(Twice(conv), conv, x, bias=bias)
    assert torch.allclose(found, u @ u.T / u.shape[1], rtol=1e-10, atol=1e-10)


def test_an_input_that_all_data_share(level: int):
    """Their number changes nothing about the mean."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)
            self.register_buffer("image", torch.randn(1, 2, 6))

        def forward(self, x: Tensor) -> Tensor:
            z = x[:, None, None] + self.conv(self.image)
            return z.square().flatten(1).sum(1, keepdim=True)

    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(4).double()
    plain = nn.Conv1d(2, 1, 3, padding=1, bias=False).double()
    u = patches(plain, model.image)[0]
    found = factor(model, model.conv, x, bias="joint")
    assert torch.allclose(found[:-1, :-1], u @ u.T / u.shape[1], rtol=1e-10, atol=1e-10)
    assert torch.allclose(found[-1, :-1], u.mean(1), rtol=1e-10, atol=1e-10)
    assert model.conv.weight.kfac.rows == 4 * 6


def test_layers_of_equal_shape(level: int):
    """They are given to the extension together."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(2, 2, 3, padding=1).double() for _ in range(3)]
    model, x = nn.Sequential(*convs, nn.Flatten(), nn.Linear(40, 1).double()), torch.randn(3, 2, 5, 4)
    x = x.double()
    plain, inputs = nn.Conv2d(2, 1, 3, padding=1, bias=False).double(), [x]
    with torch.no_grad():
        for conv in convs[:-1]:
            inputs.append(conv(inputs[-1]))
    factor(model, convs[0], x, bias="joint")
    for conv, given in zip(convs, inputs, strict=True):
        u = patches(plain, given)[0]
        assert torch.allclose(conv.weight.kfac.A[:-1, :-1], u @ u.T / u.shape[1], rtol=1e-10, atol=1e-10)
        assert torch.allclose(conv.weight.kfac.A[-1, :-1], u.mean(1), rtol=1e-10, atol=1e-10)


def test_data_types(level: int):
    """A has the type of the option, of the network, and float32 for half networks."""
    torch.manual_seed(0)
    for own, option, expected in (
        (torch.float32, None, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
    ):
        conv, x = nn.Conv2d(2, 2, 3).to(own), torch.randn(3, 2, 5, 6).to(own)
        u = patches(nn.Conv2d(2, 1, 3, bias=False).double(), x.double())[0]
        found = factor(Summed(conv), conv, x, dtype=option, bias="joint")
        assert found.dtype == expected
        bound = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7}[expected]
        error = found[:-1, :-1].double() - u @ u.T / u.shape[1]
        assert error.abs().max() < 4 * bound


def test_too_large_a_factor_is_its_diagonal(level: int):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 2, 3).double(), torch.randn(3, 2, 5, 6).double()
    u = patches(nn.Conv2d(2, 1, 3, bias=False).double(), x)[0]
    found = factor(Summed(conv), conv, x, max_dim=17, oversize="diagonal")
    assert torch.allclose(found, u.square().mean(1), rtol=1e-10, atol=1e-10)
    with pytest.raises(UnsupportedError, match=r"factor A of conv .* would be 18 x 18"):
        factor(Summed(conv), conv, x, max_dim=17)


class Doubled(nn.Conv2d):
    """A convolution of twice its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def test_rules_with_inputs_of_their_own(level: int, monkeypatch: pytest.MonkeyPatch):
    """What a subclass says about inputs counts, also here."""
    monkeypatch.setattr("backpack_ext.rules.base.RULES", dict(RULES))

    @register_rule(Doubled)
    class DoubledRule(type(RULES[nn.Conv2d])):
        def __init__(self):
            super().__init__(2)

        def inputs(self, site) -> Tensor:
            return 2 * super().inputs(site)

    torch.manual_seed(0)
    conv, x = Doubled(2, 2, 3).double(), torch.randn(3, 2, 5, 6).double()
    u = patches(nn.Conv2d(2, 1, 3, bias=False).double(), x)[0]
    found = factor(Summed(conv), conv, x)
    assert torch.allclose(found, 4 * u @ u.T / u.shape[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [True, False])
def test_beside_quantities_that_form_patches(level: int, first: bool):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 2, 3).double(), torch.randn(3, 2, 5, 6).double()
    u = patches(nn.Conv2d(2, 1, 3, bias=False).double(), x)[0]
    model, extensions = extend(Summed(conv)), [KFAC("expand", "empirical"), BatchGrad()]
    with backpack(*extensions[:: 1 if first else -1]):
        extend(nn.MSELoss(reduction="sum"))(model(x), torch.zeros(3, 1).double()).backward()
    assert torch.allclose(conv.weight.kfac.A, u @ u.T / u.shape[1], rtol=1e-10, atol=1e-10)
    assert torch.allclose(conv.weight.grad_batch.sum(0), conv.weight.grad)


def test_patches_that_are_there_are_used_where_the_product_is_cheap():
    with torch.device("meta"):
        small, large = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(256, 1, 3, padding=1)
        one = geometry_of(small, torch.empty(2, 2, 4, 4))
        two = geometry_of(large, torch.empty(2, 256, 32, 32))
    assert choice.product_is_faster(2, 2, one)
    assert not choice.product_is_faster(2, 256, two)


def test_in_a_sharing_block():
    """Positions that do not exist are left out, as they are of patches that are formed."""
    torch.manual_seed(0)
    conv, x = nn.Conv1d(2, 2, 3, padding=1).double(), torch.randn(3, 2, 5).double()
    lengths = torch.tensor([5, 2, 3])
    exists = torch.arange(5) < lengths[:, None]
    u = patches(nn.Conv1d(2, 1, 3, padding=1, bias=False).double(), x)[0].unflatten(1, (3, 5))
    u = u[:, exists]

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x).square() * exists[:, None]).flatten(1).sum(1, keepdim=True)

    with sharing(mask=exists):
        found = factor(Masked(), conv, x)
    assert torch.allclose(found, u @ u.T / u.shape[1], rtol=1e-10, atol=1e-10)
