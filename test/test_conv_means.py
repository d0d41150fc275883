"""Patch means of convolutions, by every plan, against gradients of torch's own convolutions."""

import random

import pytest
import torch
from torch import Tensor, nn

from backpack_ext import KFAC, backpack, extend
from backpack_ext.conv_factors import axis, kept, patch_means
from backpack_ext.conv_factors.cost import cheapest, cost, plans_of
from backpack_ext.conv_factors.geometry import Geometry
from benchmarks.conv_factors.__main__ import main

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MODES = ("zeros", "reflect", "replicate", "circular")


def oracle(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``[N, C, K]``: the weight's gradient of the sum of an output channel is that of patches."""
    found = []
    for datum in x:
        out = module(datum[None])[0]
        (grad,) = torch.autograd.grad(out.sum(), module.weight)
        first = grad[:, 0] if module.transposed else grad[:: len(out) // module.groups].flatten(0, 1)
        found.append(first.flatten(1) * len(out) / out.numel())
    return torch.stack(found)


def geometry_of(module: nn.Module, x: Tensor) -> Geometry:
    return Geometry.of(module, x.shape, module(x).shape)


def random_case(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]] | None:
    """Return a module and the sizes ``[C, *I]`` of its input; None if the draw is not valid."""
    dims, groups = rng.choice((1, 1, 2, 2, 2, 3)), rng.choice((1, 1, 1, 2, 3))
    largest = (40, 12, 6)[dims - 1]

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randint(low, high) for _ in range(dims))

    sizes, kernel, stride, dilation = draw(1, largest), draw(1, 4), draw(1, 4), draw(1, 3)
    if rng.random() < 0.3:
        stride = kernel
    options = {"groups": groups, "stride": stride, "dilation": dilation, "bias": rng.random() < 0.5}
    channels = groups * rng.randint(1, 2), groups * rng.randint(1, 3)
    if rng.random() < 0.35:
        cls = TRANSPOSED[dims - 1]
        extra = tuple(rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        options |= {"padding": draw(0, 2), "output_padding": extra}
    else:
        cls, mode = CONVS[dims - 1], rng.choice(MODES)
        kind = rng.choice(("numbers", "numbers", "same", "valid"))
        padding = draw(0, 3) if kind == "numbers" else kind
        options |= {"padding": padding, "padding_mode": mode}
        if kind == "same":
            options["stride"] = 1
    module = cls(*channels, kernel, **options).double()
    try:
        module(torch.zeros(1, channels[0], *sizes, dtype=torch.float64))
    except RuntimeError:  # no output pixel, or more padding than the mode has entries for
        return None
    return module, (channels[0], *sizes)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("seed", range(8))
def test_fuzz(seed: int):
    """50 geometries per seed, each by all of its plans."""
    rng, done, used = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    while done < 50:
        case = random_case(rng)
        if case is None:
            continue
        module, shape = case
        x = torch.randn(rng.randint(2, 3), *shape, dtype=torch.float64)
        if rng.random() < 0.3:  # another layout in memory
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        geometry, expected = geometry_of(module, x), oracle(module, x)
        for plan in (None, *plans_of(geometry)):
            found = patch_means(x, geometry, plan)
            message = f"{module} on {shape} by {plan}"
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11, msg=message)
            used += 1
        done += 1
    assert used > 3 * done


# every kind of core: one period, phases of a stride, wide ones, edges, none; wide channels_last
LARGER = [
    (nn.Conv2d(20, 1, 3, padding=1), (11, 9)),
    (nn.Conv2d(20, 1, 7, padding=3, stride=2), (23, 30)),
    (nn.Conv2d(20, 1, (1, 3), stride=(2, 1)), (11, 9)),
    (nn.Conv2d(20, 1, 4, stride=4), (16, 18)),
    (nn.Conv1d(3, 1, 5, padding=2, stride=3), (701,)),
    (nn.Conv1d(20, 1, 5, padding=2, padding_mode="reflect"), (300,)),
    (nn.Conv3d(20, 1, 3, padding=1), (5, 6, 7)),
    (nn.ConvTranspose2d(20, 1, 3, padding=1, stride=2), (9, 12)),
]


@pytest.mark.parametrize("module, sizes", LARGER, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(module: nn.Module, sizes: tuple, layout: str, dtype: torch.dtype, monkeypatch):
    """As exact as float32 sums of the input as it is, in pieces of the batch."""
    monkeypatch.setattr("backpack_ext.conv_factors.means.CHUNK", {"cpu": 2000})
    torch.manual_seed(0)
    x = (torch.randn(3, module.in_channels, *sizes) + 1).to(dtype)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    module = module.double()
    geometry, expected = geometry_of(module, x.double()), oracle(module, x.double())
    # rounding of at most as many additions as a mean has, and much less in practice
    bound = 4e-6 * float(x.double().abs().max())
    for plan in (None, *plans_of(geometry)):
        found = patch_means(x, geometry, plan)
        assert found.dtype == torch.float32
        assert float((found - expected).abs().max()) < bound, plan


def test_autocast_does_not_round():
    conv, x = nn.Conv2d(4, 1, 3, padding=1), torch.randn(2, 4, 7, 6)
    geometry = geometry_of(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        for plan in plans_of(geometry):
            found = patch_means(x, geometry, plan)
            torch.testing.assert_close(found, patch_means(x.double(), geometry).float())


def test_wrong_size():
    geometry = Geometry.of(nn.Conv2d(2, 1, 3), (1, 2, 5, 6), (1, 1, 3, 4))
    with pytest.raises(
        ValueError, match=r"shape \(1, 2, 6, 5\); the geometry is that of \[R, C, 5, 6\]"
    ):
        patch_means(torch.zeros(1, 2, 6, 5), geometry)


def test_inputs_that_no_pixel_meets():
    conv = nn.Conv2d(2, 1, 1, padding=1, stride=2)
    x = torch.full((2, 2, 1, 1), 3.0)
    assert torch.equal(patch_means(x, geometry_of(conv, x)), torch.zeros(2, 2, 1))


# -- the choice ------------------------------------------------------------------------------------


def test_sums_alone_where_kernels_have_no_edges():
    """1x1 kernels with any stride, circular padding, and transposed convolutions that are not cut."""
    for module in (
        nn.Conv2d(1, 1, 1),
        nn.Conv2d(1, 1, 1, stride=3),
        nn.Conv2d(1, 1, 5, padding="same", padding_mode="circular"),
        nn.ConvTranspose2d(1, 1, 4, stride=2),
    ):
        plan = cheapest(geometry_of(module, torch.zeros(1, 1, 28, 28)), 64)
        assert plan.is_sum(geometry_of(module, torch.zeros(1, 1, 28, 28))), (module, plan)


@pytest.mark.parametrize(
    "module, channels, size, summed",
    [
        (nn.Conv2d(1, 1, 3, padding=1), 64, 56, True),
        (nn.Conv2d(1, 1, 7, padding=3, stride=2), 3, 224, True),
        (nn.Conv2d(1, 1, 16, stride=16), 3, 224, True),
        (nn.Conv2d(1, 1, 3, padding=1), 512, 7, False),
    ],
)
def test_choice(module: nn.Module, channels: int, size: int, summed: bool):
    """Large maps are summed before they are multiplied, small ones are multiplied."""
    geometry = geometry_of(module, torch.zeros(1, 1, size, size))
    chosen = cheapest(geometry, 32 * channels)
    assert any(chosen.periods) == summed
    costs = {plan: cost(plan, geometry, 32 * channels) for plan in plans_of(geometry)}
    assert costs[chosen] == min(costs.values())


def test_large_joined_weights_are_not_formed():
    """A kernel as large as a large map: its weights for all pixels at once would be 268 MB."""
    geometry = geometry_of(nn.Conv2d(1, 1, 91, padding=45), torch.zeros(1, 1, 90, 90))
    assert not cheapest(geometry, 64).joined
    assert all(sum(plan.periods) for plan in plans_of(geometry) if plan.joined)


def test_benchmark(tmp_path, capsys):
    cases = ["32x16x16", "k80", "T 64x28x28"]
    found = main(["--quick", "--parts", "reduce", "--cases", *cases, "--out", str(tmp_path)])
    assert [row["case"].split()[0] for row in found["parts"]["reduce"]] == ["32x16x16", "1x16000", "T"]
    assert all({row["chosen"], "unfold"} <= set(row["seconds"]) for row in found["parts"]["reduce"])
    assert "of 3 cases the choice took more than" in capsys.readouterr().out


# -- in KFAC ---------------------------------------------------------------------------------------

LAYERS = [
    (nn.Conv2d, {"kernel_size": 2, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("cls, options", LAYERS)
def test_kfac_reduce_forms_no_patches(cls: type, options: dict, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(cls(4, 6, **options), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(5, 4, *((7, 6) if "2d" in cls.__name__ else (7,)), dtype=torch.float64)
    model(x)
    means = oracle(model[0], x)
    extend(model)
    loss_fn, y = extend(nn.CrossEntropyLoss()), torch.randint(3, (5,))
    for seen in (False, True):
        if seen:  # the first pass checks the layer, by its patches
            monkeypatch.setattr("backpack_ext.rules.affine.patches", None)
        with backpack(KFAC("reduce", fisher="empirical")):
            loss_fn(model(x), y).backward()
    groups = model[0].groups
    rows = means.unflatten(1, (groups, -1)).movedim(1, 0).flatten(2)  # [g, N, (c k)]
    expected = rows.mT @ rows / len(x)
    torch.testing.assert_close(model[0].weight.kfac.A, expected if groups > 1 else expected[0])


def test_signals_of_many_lengths_are_not_all_kept():
    x, small = torch.randn(1, 1, 2500), axis.axes_of.caches[0].cache_info().currsize
    for length in range(2000, 2500, 50):
        conv = nn.Conv1d(1, 2, 400, stride=160)
        part = x[..., :length]
        patch_means(part, Geometry.of(conv, part.shape, conv(part).shape))
    few, many = (cache.cache_info().currsize for cache in reversed(axis.axes_of.caches))
    assert few <= kept.FEW and many == small


def test_means_first_asked_for_in_inference_mode():
    conv, x = nn.Conv1d(2, 3, 7, stride=3, padding=2), torch.randn(2, 2, 53)
    geometry = Geometry.of(conv, x.shape, conv(x).shape)
    with torch.inference_mode():
        patch_means(x, geometry)
    leaf = x.requires_grad_()
    patch_means(leaf, geometry).sum().backward()
    assert leaf.grad.abs().sum() > 0
