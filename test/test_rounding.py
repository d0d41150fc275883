"""Stochastic rounding: only the two neighbours, with the right mean; the rest is left alone."""

import math

import pytest
import torch
from torch import Generator, Tensor

from optim.rounding import copy_rounded_, seeded_generator, stochastic_round

inf, nan = math.inf, math.nan
BITS = {torch.bfloat16: 8, torch.float16: 11}
every_half = pytest.mark.parametrize("dtype", list(BITS), ids=["bfloat16", "float16"])
every_wide = pytest.mark.parametrize("wide", [torch.float32, torch.float64])


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every number that 16 bits make, inf and nan with them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest number of the type that is <= x and the smallest that is >= x."""
    numbers = all_numbers(dtype).double()
    numbers = numbers[numbers.isfinite()]
    return numbers[numbers <= x].max().item(), numbers[numbers >= x].min().item()


def values(dtype: torch.dtype) -> list[float]:
    """Numbers between others, at all scales, with all kinds of neighbours."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps  # the smallest subnormal number
    found = [1.0 + 0.3 * info.eps, 2.0 - 0.2 * info.eps, 3.14159, 0.1, 1e-3, 65503.0, info.max * 0.99931]
    found += [info.smallest_normal * (1 - 0.3 * info.eps), info.smallest_normal * 1.234567]
    found += [least * f for f in (0.75, 0.03, 1.4, 7.9)]
    return found + [-v for v in found]


@every_wide
@every_half
def test_mean_is_the_number_and_only_neighbours_occur(dtype, wide):
    draws = 20000
    for seed, value in enumerate(values(dtype)):
        x = torch.full((draws,), value, dtype=wide)
        exact = x[0].item()
        low, high = neighbours(exact, dtype)
        assert low < exact < high
        y = stochastic_round(x, dtype, seeded(seed))
        assert y.dtype == dtype
        y = y.double()
        assert set(y.tolist()) <= {low, high}
        # five standard deviations of a mean of draws that are low or high
        share = (exact - low) / (high - low)
        bound = 5 * math.sqrt(share * (1 - share) / draws)
        assert abs((y == high).double().mean().item() - share) < bound


@every_wide
@every_half
def test_numbers_of_the_type_stay(dtype, wide):
    x = all_numbers(dtype)
    for seed in range(3):
        y = stochastic_round(x.to(wide), dtype, seeded(seed))
        kept = x.isnan() | (y.view(torch.int16) == x.view(torch.int16))  # with the signs of zeros
        assert kept.all()
        assert torch.equal(y.isnan(), x.isnan())


@every_wide
@every_half
def test_random_numbers_lie_between_neighbours(dtype, wide):
    """At all exponents of float32, against rounding by torch."""
    g = seeded(1)
    x = torch.randn(50000, generator=g, dtype=wide)
    x = torch.ldexp(x, torch.randint(-150, 127, x.shape, generator=g))
    y = stochastic_round(x, dtype, g)
    nearest = x.to(dtype)
    finite = x.abs() <= torch.finfo(dtype).max
    assert torch.equal(y[~finite], nearest[~finite])
    x, y, nearest = x[finite].double(), y[finite], nearest[finite]
    assert y.isfinite().all()
    # what torch rounds to is one neighbour, the other one lies across x
    across = torch.where(nearest.double() < x, inf, -inf).to(dtype)
    other = torch.nextafter(nearest, across)
    is_other = (y == other) & (nearest.double() != x)
    assert ((y == nearest) | is_other).all()
    assert is_other.any()


@every_wide
@every_half
def test_inf_nan_and_overflow(dtype, wide):
    big = torch.finfo(dtype).max
    beyond = big * (1 + torch.finfo(dtype).eps / 8)  # rounds down
    far = big * (1 + torch.finfo(dtype).eps)
    x = torch.tensor([inf, -inf, nan, big, -big, beyond, -beyond, far, -far, 0.0, -0.0], dtype=wide)
    expected = torch.tensor([inf, -inf, nan, big, -big, big, -big, inf, -inf, 0.0, -0.0], dtype=dtype)
    for seed in range(50):
        y = stochastic_round(x, dtype, seeded(seed))
        assert torch.equal(y.view(torch.int16)[3:], expected.view(torch.int16)[3:])
        assert torch.equal(y[:2], expected[:2])
        assert y[2].isnan()


@every_half
def test_no_number_below_the_largest_becomes_inf(dtype):
    """Its upper neighbour is the largest number."""
    big = torch.finfo(dtype).max
    x = torch.nextafter(torch.tensor(big), torch.tensor(0.0)).expand(1000)
    y = stochastic_round(x, dtype, seeded())
    assert (y == big).float().mean() > 0.9
    assert y.isfinite().all()


@every_half
def test_layouts_and_seeds(dtype):
    x = torch.randn(6, 4, generator=seeded()).T[::2]
    y = stochastic_round(x, dtype, seeded(3))
    assert y.shape == x.shape
    assert torch.allclose(y.float(), x, rtol=2 ** (2 - BITS[dtype]), atol=0)
    assert torch.equal(y, stochastic_round(x, dtype, seeded(3)))
    assert not torch.equal(y, stochastic_round(x, dtype, seeded(4)))
    assert stochastic_round(torch.zeros(()), dtype, seeded()).shape == ()
    assert stochastic_round(torch.zeros(0, 3), dtype, seeded()).shape == (0, 3)
    torch.manual_seed(3)
    default = stochastic_round(x, dtype)
    torch.manual_seed(3)
    assert torch.equal(default, stochastic_round(x, dtype))


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"dtype=torch\.float32; expected torch\.bfloat16 or"):
        stochastic_round(torch.ones(2), torch.float32, seeded())
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16; expected a float32"):
        stochastic_round(torch.ones(2, dtype=torch.bfloat16), torch.bfloat16, seeded())
    with pytest.raises(TypeError, match="x is float; expected"):
        stochastic_round(1.0, torch.bfloat16, seeded())


@every_half
def test_copy(dtype):
    x = torch.full((1000,), 1 + 0.25 * torch.finfo(dtype).eps)
    p = torch.zeros(1000, dtype=dtype, requires_grad=True)
    assert copy_rounded_(p, x) is p
    assert torch.equal(p, torch.ones(1000, dtype=dtype))
    assert copy_rounded_(p, x, seeded()) is p
    assert torch.equal(p, stochastic_round(x, dtype, seeded()))
    assert p.requires_grad and p.grad_fn is None
    copy_rounded_(p, torch.ones(1000, dtype=torch.bfloat16), seeded())  # nothing to round
    assert torch.equal(p, torch.ones(1000, dtype=dtype))
    for wide in (torch.float32, torch.float64):
        q = torch.zeros(1000, dtype=wide)
        g = seeded()
        before = g.get_state()
        assert torch.equal(copy_rounded_(q, x, g), x.to(wide))
        assert torch.equal(g.get_state(), before)


def test_small_steps_arrive():
    """A thousand steps of a thousandth, each lost by nearest rounding."""
    p, q = (torch.full((64,), 4.0, dtype=torch.bfloat16) for _ in range(2))
    g = seeded()
    for _ in range(1000):
        copy_rounded_(p, p.float() + 1e-3)
        copy_rounded_(q, q.float() + 1e-3, g)
    assert torch.equal(p, torch.full_like(p, 4.0))
    # each step's variance is at most that of one unit, 1/32, taken with probability 0.032
    assert abs(q.float().mean().item() - 5) < 5 * math.sqrt(1000 * 0.032) / 32 / 8


def test_seeded_generators():
    device = torch.device("cpu")
    numbers = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (3, 0)]
    draws = [torch.rand(2, generator=seeded_generator(device, *n)) for n in numbers]
    again = [torch.rand(2, generator=seeded_generator(device, *n)) for n in numbers]
    assert all(map(torch.equal, draws, again))
    assert len({tuple(d.tolist()) for d in draws}) == len(numbers)
