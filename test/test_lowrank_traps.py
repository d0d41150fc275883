"""Low-rank GGNs and tangent kernels where a number could be silently wrong: what a review found."""

import copy
import gc
import io

import pytest
import torch
from models import CASES
from torch import nn

from backpack_ext import KFAC, NTK, LowRankGGN, RecordingError, UnsupportedError, backpack, extend
from backpack_ext.dataset import collect
from curvature import BlockDiagonalOperator, DenseFactor, LowRank

pytestmark = pytest.mark.usefixtures("double")

N = 4


class Two(nn.Module):
    """Two modules, one after the other, registered in the order that is asked for."""

    def __init__(self, first: nn.Module, second: nn.Module, swapped: bool = False):
        super().__init__()
        pairs = [("first", first), ("second", second)]
        for name, module in reversed(pairs) if swapped else pairs:
            self.add_module(name, module)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def data(width: int = 3, classes: int = 3):
    torch.manual_seed(1)
    return torch.randn(N, width), torch.randint(classes, (N,))


def passed(model, loss_fn, x, y, **options) -> LowRankGGN:
    ggn = LowRankGGN(**options)
    with backpack(ggn):
        loss_fn(model(x), y).backward()
    return ggn


def linear() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(3, 3), nn.Linear(3, 3)


def test_order_does_not_follow_other_models():
    """Layers of equal shapes: the order of parameters is the model's own."""
    x, y = data()
    first, second = linear()
    loss_fn = extend(nn.CrossEntropyLoss())
    other = extend(Two(first, second, swapped=True))
    other(x)  # is known first, and has them in another order
    model = extend(Two(first, second))
    ntk = NTK(model)
    before = ntk.features(x)
    block = passed(model, loss_fn, x, y).block
    del other
    gc.collect()
    after = ntk.features(x)
    torch.testing.assert_close(ntk.gram(before, after), ntk.gram(before))
    later = passed(model, loss_fn, x, y).block
    if block.keys == later.keys:
        torch.testing.assert_close((block + later).eigvalsh()[0], 2 * block.eigvalsh()[0])
    else:
        with pytest.raises(ValueError, match="same order"):
            block + later


def test_sums_need_the_same_parameters():
    x, y = data()
    loss_fn = extend(nn.CrossEntropyLoss())
    one, two = (passed(extend(layer), loss_fn, x, y).block for layer in linear())
    with pytest.raises(ValueError, match="different parameters"):
        one + two
    with pytest.raises(ValueError, match="one per parameter"):
        LowRank(DenseFactor(torch.ones(2, 3)), keys=(1, 2))


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear()

    def forward(self, x):
        return self.a(x) if bool(x.sum() > 0) else self.b(x)


def test_inputs_that_reach_different_parameters():
    model, ones = Chooses(), torch.ones(2, 3)
    with pytest.raises(ValueError, match="different parameters"):
        NTK(model).gram(ones, -ones)
    loader = [(ones, torch.tensor([0, 1])), (-ones, torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="different parameters"):
        collect(model, nn.CrossEntropyLoss(), loader, LowRankGGN(), progress=False)


def test_layers_of_several_models_are_blocks_of_their_own():
    x, y = data()
    a, b = (extend(nn.Sequential(layer)) for layer in linear())
    loss_fn, ggn = extend(nn.CrossEntropyLoss()), LowRankGGN(param_groups="layers")
    with backpack(ggn):
        loss_fn(b(a(x).tanh()), y).backward()
    groups = [{id(p) for p in group} for group in ggn.parameters.values()]
    assert sorted(map(len, groups)) == [2, 2]
    assert {frozenset(map(id, m.parameters())) for m in (a, b)} == set(map(frozenset, groups))


@pytest.mark.parametrize("order", ["reversed", "sorted"])
def test_operator_knows_the_parameters(order: str):
    x, y = data()
    model = extend(Two(*linear()))
    ggn = passed(model, extend(nn.CrossEntropyLoss()), x, y)
    named = list(model.named_parameters())
    named = list(reversed(named)) if order == "reversed" else sorted(named, key=lambda p: p[0][::-1])
    found = BlockDiagonalOperator.of_parameters(named, "low_rank_ggn").diagonal()
    for p, diagonal in zip(ggn.parameters["all"], ggn.block.diagonal(), strict=True):
        name = next(n for n, q in named if q is p)
        torch.testing.assert_close(found[name], diagonal)


# -- closures --------------------------------------------------------------------------------------


def recomputed(change, **options):
    """A block that recomputes; ``change(model, x, y)`` happens before its first product."""
    x, y = data()
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)))
    loss_fn = extend(nn.CrossEntropyLoss())
    holder = {"x": x, "y": y}

    def closure():
        return loss_fn(model(holder["x"]), holder["y"])

    with pytest.warns(UserWarning, match="max_memory"):
        ggn = passed(model, loss_fn, x, y, closure=closure, max_memory=1, **options)
    change(model, holder)
    return ggn


def next_batch(model, holder):
    holder["x"] = holder["x"] + 1e-4


def other_labels(model, holder):
    holder["y"] = (holder["y"] + 1) % 3


def one_step(model, holder):
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def nothing(model, holder):
    pass


@pytest.mark.parametrize("change", [next_batch, one_step])
def test_closures_that_compute_something_else(change):
    ggn = recomputed(change)
    with pytest.raises(RecordingError, match="closure"):
        ggn.eigvalsh()


def test_closures_with_other_labels():
    """The exact GGN of a cross-entropy does not depend on labels, the slopes do."""
    with pytest.raises(RecordingError, match="closure"):
        recomputed(other_labels).newton_step(0.1)


def test_closures_after_a_pass_that_failed():
    x, y = data()
    model, loss_fn = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    ggn = LowRankGGN("mc", closure=lambda: loss_fn(model(x), y), max_memory=1)

    def fail(grad):
        raise ArithmeticError("boom")

    with pytest.raises(ArithmeticError), backpack(ggn):
        z = model(x)
        loss = loss_fn(z, y)
        z.register_hook(fail)
        loss.backward()
    with pytest.raises(RecordingError, match="failed"):
        ggn.trace()
    with pytest.warns(UserWarning, match="max_memory"), backpack(ggn):
        loss_fn(model(x), y).backward()
    assert float(ggn.trace()) > 0


def test_closures_with_samples_of_others():
    x, y = data()
    model, loss_fn = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    generator = torch.Generator()
    ggn = LowRankGGN("mc", generator=generator, closure=lambda: loss_fn(model(x), y), max_memory=1)
    with (
        pytest.raises(UnsupportedError, match="generator of its own"),
        backpack(KFAC(generator=generator), ggn),
    ):
        loss_fn(model(x), y).backward()


def test_closures_keep_the_data_type():
    x = torch.randn(N, 3)
    model, loss_fn = extend(nn.LayerNorm(3)), extend(nn.MSELoss())
    plain = passed(model, loss_fn, x, x + 1).block.to_dense()
    with pytest.warns(UserWarning, match="max_memory"):
        ggn = passed(model, loss_fn, x, x + 1, closure=lambda: loss_fn(model(x), x + 1), max_memory=1)
    assert ggn.block.dtype == torch.float64
    torch.testing.assert_close(ggn.block.to_dense(), plain)


def test_closures_run_no_more_than_they_have_to():
    """With k parts the pairs of parts, each of them once, and k passes for the gradient per part."""
    x, y = data()
    model, loss_fn = extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss())
    runs = []

    def closure():
        runs.append(1)
        return loss_fn(model(x), y)

    for options, expected in (({"gradients": False}, 0), ({}, N + N * N)):
        with pytest.warns(UserWarning, match="max_memory"):
            ggn = passed(model, loss_fn, x, y, closure=closure, max_memory=1, **options)
        runs.clear()
        ggn.block.gram()
        assert len(runs) == N * (N + 1) // 2 + expected


def test_inputs_are_counted_once():
    x = torch.randn(64, 200)
    model, loss_fn = extend(nn.Linear(200, 1)), extend(nn.MSELoss())
    passed(model, loss_fn, x, torch.randn(64, 1), max_memory=1.1 * 8 * x.numel())


# -- data types, copies ----------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 12).float(), nn.Linear(12, 12).double()

    def forward(self, x):
        return self.b(self.a(x).double())


def test_the_cut_follows_the_least_precise():
    model, x = extend(Mixed()), torch.randn(40, 12).float()
    ggn = passed(model, extend(nn.MSELoss()), x, torch.randn(40, 12))
    E = torch.cat([t.double().flatten(1) for t in ggn.eigh().vectors.explicit()], 1)
    assert ggn.block.rtol == 1e-6
    assert (E @ E.T - torch.eye(len(E))).abs().max() < 1e-3


def test_questions_under_autocast():
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 3))).float()
    x, y = torch.randn(N, 2, 5, 5).float(), torch.tensor([0, 1, 2, 0])
    ggn = passed(model, extend(nn.CrossEntropyLoss()), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = ggn.newton_step(0.1)
    expected = passed(model, extend(nn.CrossEntropyLoss()), x, y).newton_step(0.1)
    for p, step in expected.items():
        torch.testing.assert_close(found[p], step)
    features = NTK(model).features(x)
    with torch.autocast("cpu", torch.bfloat16):
        K = NTK(model).gram(features)
    torch.testing.assert_close(K, NTK(model).gram(features))


def test_copies_of_blocks():
    x = torch.empty(N, 3).normal_()  # of a version above 0
    model = extend(nn.Linear(3, 3))
    block = passed(model, extend(nn.CrossEntropyLoss()), x, data()[1]).block
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other.to_dense(), block.to_dense())


def test_results_do_not_share_what_is_kept():
    block = passed(extend(nn.Linear(3, 3)), extend(nn.CrossEntropyLoss()), *data()).block
    values, gamma = block.eigvalsh(), block.eigh().directional_gradients()
    pairs = block.eigh()
    pairs.directional_gradients().zero_(), pairs.values.zero_()
    torch.testing.assert_close(block.eigh().values, values)
    torch.testing.assert_close(block.eigh().directional_gradients(), gamma)


def test_masks_that_change():
    from backpack_ext import sharing

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 3)

        def forward(self, t, mask):
            return self.head((self.embed(t) * mask[..., None]).sum(1))

    torch.manual_seed(0)
    model, loss_fn = extend(Bag()), extend(nn.CrossEntropyLoss())
    t, mask = torch.randint(7, (N, 5)), torch.rand(N, 5) > 0.4
    ggn = LowRankGGN()
    with sharing(mask={"": None, "embed": mask}), backpack(ggn):
        loss_fn(model(t, mask), data()[1]).backward()
    expected = ggn.block.to_dense()
    mask.logical_not_()
    try:
        torch.testing.assert_close(ggn.block.to_dense(), expected)
    except RecordingError as error:
        assert "modified" in str(error)


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1.7], torch.tensor([True, False]), [True], 2, "01", []])
def test_indices(values):
    with pytest.raises(ValueError, match="indices"):
        LowRankGGN(subsample=values)
    with pytest.raises(ValueError, match="outputs"):
        NTK(nn.Linear(2, 2), values)


def test_groups_as_for_an_optimizer():
    x, y = data()
    model, loss_fn = extend(Two(*linear())), extend(nn.CrossEntropyLoss())
    for groups in (model.parameters(), [{"params": model.first.weight}], [[model.first.weight]]):
        ggn = passed(model, loss_fn, x, y, param_groups=groups)
        assert len(ggn.blocks) == 1
    with pytest.raises(ValueError, match="param_groups"):
        LowRankGGN(param_groups=model)
    with pytest.raises(TypeError, match="by parameter"):
        ggn.matvec([torch.ones(3, 3)])
    for options in ({"max_memory": "1GB"}, {"max_memory": -1}, {"dtype": torch.int32}, {"rtol": 2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LowRankGGN(**options)


def test_nothing_to_differentiate_by():
    x, y = data()
    model = extend(nn.Linear(3, 3)).requires_grad_(False)
    ggn = passed(model, extend(nn.CrossEntropyLoss()), x.requires_grad_(), y)
    with pytest.raises(RecordingError, match=r"no trainable parameter|no backward pass"):
        ggn.trace()


def test_kernel_leaves_buffers_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    given = {k: v.clone() for k, v in state.items()}
    ntk = NTK(model)
    for parameters in (None, given):
        with pytest.raises(UnsupportedError, match="couples"):
            ntk.features(torch.randn(N, 3), parameters)
        for found in (model.state_dict(), given):
            for name, value in state.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_kernel_of_tied_parameters_with_two_values():
    problem = CASES["char_gpt"]()
    names = [k for k, _ in problem.model.named_parameters(remove_duplicate=False)]
    own = {k for k, _ in problem.model.named_parameters()}
    tied = next(k for k in names if k not in own)
    p = dict(problem.model.named_parameters(remove_duplicate=False))[tied]
    first = next(k for k, q in problem.model.named_parameters() if q is p)
    with pytest.raises(ValueError, match="are one tensor"):
        NTK(problem.model).features(*problem.inputs, {first: p, tied: p + 1})
