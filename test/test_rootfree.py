"""Square-root-free optimizers against dense float64 oracles, and as citizens of torch."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Generator, Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.functional import cross_entropy

from optim import rootfree
from optim.rootfree import RFAdamW, RFRMSProp, RFShampoo
from optim.rootfree_updates import shampoo_momenta, shampoo_precondition

pytestmark = pytest.mark.usefixtures("double")

SHAPES = [(), (5,), (1,), (4, 3), (3, 1), (2, 3, 4), (3, 2, 1, 4)]


def make_params(shapes: list = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def make_grads(params: list[nn.Parameter], steps: int, scale: float = 1.0) -> list[list[Tensor]]:
    return [[scale * torch.randn_like(p) for p in params] for _ in range(steps)]


def run(opt: torch.optim.Optimizer, params: list[nn.Parameter], data: list[list[Tensor]]) -> None:
    for grads in data:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.step()


def assert_close(params: list[Tensor], others: list[Tensor], rtol: float = 1e-10) -> None:
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=rtol, atol=rtol)


def assert_equal(params: list[Tensor], others: list[Tensor]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


# ---------------------------------------------------------------------- oracles, one parameter each


def rmsprop_oracle(p, gs, lr, alpha, lam, mu, wd, B, sign=1) -> Tensor:
    p, v, buf = p.clone(), torch.full_like(p, 1 / B), torch.zeros_like(p)
    for g in gs:
        g = sign * g
        v = alpha * v + (1 - alpha) * g**2
        u = g / (B * v + lam) + wd * p
        buf = mu * buf + u
        p = p - lr * buf
    return p


def adamw_oracle(p, gs, lr, b1, b2, eps, wd, B, sign=1) -> Tensor:
    p, m, v = p.clone(), torch.zeros_like(p), torch.full_like(p, 1 / B)
    for g in gs:
        g = sign * g
        p = p * (1 - lr * wd)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        p = p - lr * m / (B * v + eps)
    return p


def mask(structure, d: int) -> Tensor:
    """Which entries a structure keeps."""
    name, options = (structure, {}) if isinstance(structure, str) else structure
    i, j = torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij")
    if name == "dense":
        return torch.ones(d, d, dtype=torch.bool)
    if name == "diagonal":
        return i == j
    if name == "block-diagonal":
        return i // options["block"] == j // options["block"]
    if name == "hierarchical":
        k1, k2 = options["k1"], options["k2"]
        return (i == j) | (i < k1) | ((i >= d - k2) & (j >= k1))
    return i >= j if name.startswith("lower") else i <= j


def projected(M: Tensor, structure) -> Tensor:
    """P(M), by its definition."""
    d = len(M)
    if "toeplitz" in structure:
        mean = torch.zeros_like(M)
        for k in range(1 - d, d):
            mean += torch.diag(torch.full((d - abs(k),), M.diagonal(k).mean()), k)
        M = mean
    kept = mask(structure, d)
    return M * kept * (1 + (kept & ~kept.T))


def unfolded(G: Tensor, n: int) -> Tensor:
    return G.movedim(n, 0).reshape(G.shape[n], -1)


def kron(matrices: list[Tensor]) -> Tensor:
    out = torch.ones(1, 1)
    for M in matrices:
        out = torch.kron(out, M)
    return out


def shampoo_oracle(
    p, gs, structures, *, lr, mu, lam, a2, wd, b2, interval, B, sign=1
) -> tuple[Tensor, list[Tensor]]:
    """Return the parameter and its dense factors; every Kronecker product is formed."""
    shape = p.shape
    p = p.clone().reshape(shape or (1,))
    dims = p.shape
    Ks, ms = [torch.eye(d) for d in dims], [torch.zeros(d, d) for d in dims]
    buf, refreshes = torch.zeros_like(p), 0
    for t, g in enumerate(gs):
        G = sign * g.reshape(dims)
        if t % interval == 0:
            new = []
            for n, d in enumerate(dims):
                others = [j for j in range(len(dims)) if j != n]
                W = kron([Ks[j] @ Ks[j].T for j in others])
                Gn = unfolded(G, n)
                H = B / math.prod(dims[j] for j in others) * Ks[n].T @ Gn @ W @ Gn.T @ Ks[n]
                tr = math.prod((Ks[j].T @ Ks[j]).trace().item() / dims[j] for j in others)
                bracket = projected(H, structures[n]) - torch.eye(d)
                bracket += lam * tr * projected(Ks[n].T @ Ks[n], structures[n])
                new.append(a2 * ms[n] + (1 - a2) / 2 * bracket)
            ms = new
            size = b2(refreshes) if callable(b2) else b2
            Ks = [
                K - size / max(1, torch.linalg.matrix_norm(m).item()) * K @ m
                for K, m in zip(Ks, ms, strict=True)
            ]
            refreshes += 1
        U = (kron([K @ K.T for K in Ks]) @ G.flatten()).view(dims)
        buf = mu * buf + U + wd * p
        p = p - lr * buf
    return p.reshape(shape), Ks


STRUCTURES = {
    "dense": "dense",
    "diagonal": "diagonal",
    "block": ("block-diagonal", {"block": 2}),
    "lower": "lower-triangular",
    "upper": "upper-triangular",
    "hierarchical": ("hierarchical", {"k1": 1, "k2": 1}),
    "lower-toeplitz": "lower-toeplitz",
    "upper-toeplitz": "upper-toeplitz",
    "mixed": ["upper-triangular", "dense", ("block-diagonal", {"block": 3}), "diagonal"],
    "two": ("lower-triangular", "upper-toeplitz"),
}


def per_axis(structure) -> list:
    """The structure of each of four axes."""
    if isinstance(structure, str) or isinstance(structure[1], dict):
        return [structure] * 4
    return (list(structure) + [structure[-1]] * 4)[:4]


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("mu", [0.0, 0.8])
@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_rmsprop(foreach, mu, wd, maximize):
    params = make_params()
    start = [p.detach().clone() for p in params]
    data = make_grads(params, 6)
    kwargs = {"momentum": mu, "weight_decay": wd, "batch_size": 7, "maximize": maximize}
    run(RFRMSProp(params, 0.03, alpha=0.9, damping=0.2, foreach=foreach, **kwargs), params, data)
    expected = [
        rmsprop_oracle(p, gs, 0.03, 0.9, 0.2, mu, wd, 7, -1 if maximize else 1)
        for p, gs in zip(start, zip(*data, strict=True), strict=True)
    ]
    assert_close(params, expected)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw(foreach, wd, maximize):
    params = make_params()
    start = [p.detach().clone() for p in params]
    data = make_grads(params, 6)
    kwargs = {"weight_decay": wd, "batch_size": 7, "maximize": maximize, "foreach": foreach}
    run(RFAdamW(params, 0.03, (0.8, 0.95), 0.1, **kwargs), params, data)
    expected = [
        adamw_oracle(p, gs, 0.03, 0.8, 0.95, 0.1, wd, 7, -1 if maximize else 1)
        for p, gs in zip(start, zip(*data, strict=True), strict=True)
    ]
    assert_close(params, expected)


SHAMPOO = {"lr": 0.05, "mu": 0.7, "lam": 0.3, "a2": 0.4, "wd": 0.1, "b2": 0.5, "interval": 2, "B": 6}


def shampoo(params, structure, **changes) -> RFShampoo:
    o = {**SHAMPOO, **changes}
    return RFShampoo(
        params,
        o["lr"],
        o["mu"],
        o["lam"],
        o["a2"],
        o["wd"],
        lr_cov=o["b2"],
        interval=o["interval"],
        structure=structure,
        batch_size=o["B"],
        maximize=o.get("sign", 1) < 0,
    )


CHANGES = {
    "all": {},
    "plain": {"mu": 0.0, "wd": 0.0, "lam": 0.0, "a2": 0.0, "interval": 1},
    "schedule": {"b2": lambda k: 0.5 / (1 + k), "interval": 3},
    "maximize": {"sign": -1, "interval": 1},
    "large": {"B": 300, "b2": 0.9, "interval": 1},  # the norms exceed 1
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_shampoo(structure, changes):
    params = make_params()
    start = [p.detach().clone() for p in params]
    data = make_grads(params, 7)
    opt = shampoo(params, structure, **changes)
    run(opt, params, data)
    for p, q, gs in zip(params, start, zip(*data, strict=True), strict=True):
        expected, Ks = shampoo_oracle(q, gs, per_axis(structure), **{**SHAMPOO, **changes})
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)
        found = opt.factors(p)
        assert list(found) == [f"K{n}" for n in range(max(1, p.dim()))]
        for K, M in zip(found.values(), Ks, strict=True):
            torch.testing.assert_close(K.to_dense(), M, rtol=1e-9, atol=1e-9)
    K = opt.factors(params[3])["K0"].to_dense()
    assert structure != "lower-triangular" or not torch.allclose(K, K.T, atol=1e-3)


def test_factors_that_are_not_symmetric():
    """Any K and m, not only what training makes of the identity, which is close to symmetric."""
    dims, B, lam, a2 = (4, 3, 2), 5.0, 0.3, 0.4
    G = torch.randn(dims)
    for structure in STRUCTURES.values():
        names = per_axis(structure)
        kinds = [rootfree._parsed(name) for name in names[:3]]
        K = [c.from_dense(torch.randn(d, d), **o) for (c, o), d in zip(kinds, dims, strict=True)]
        m = [c.from_dense(torch.randn(d, d), **o) for (c, o), d in zip(kinds, dims, strict=True)]
        D = [k.to_dense() for k in K]
        found = shampoo_momenta(G, K, m, damping=lam, alpha2=a2, batch_size=B)
        for n, d in enumerate(dims):
            others = [j for j in range(3) if j != n]
            W, Gn = kron([D[j] @ D[j].T for j in others]), unfolded(G, n)
            H = B / math.prod(dims[j] for j in others) * D[n].T @ Gn @ W @ Gn.T @ D[n]
            tr = math.prod(D[j].square().sum().item() / dims[j] for j in others)
            M = projected(H + lam * tr * D[n].T @ D[n], names[n]) - torch.eye(d)
            expected = a2 * m[n].to_dense() + (1 - a2) / 2 * M
            torch.testing.assert_close(found[n].to_dense(), expected)
        U = (kron([k @ k.T for k in D]) @ G.flatten()).view(dims)
        torch.testing.assert_close(shampoo_precondition(G, K), U)


def test_layouts_in_memory():
    """Gradients with other strides than their parameters."""
    p, q = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.empty(4, 3, 2, 2))
    with torch.no_grad():
        q.data = p.detach().clone(memory_format=torch.channels_last)
    one, two = shampoo([p], "dense"), shampoo([q], "dense")
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone().to(memory_format=torch.channels_last)
        one.step()
        two.step()
    assert_close([p], [q.detach()])


def test_long_axes_are_diagonal():
    params = make_params([(4, 3), (5,)])
    start = [p.detach().clone() for p in params]
    data = make_grads(params, 4)
    opt = RFShampoo(params, 0.1, max_dim=3, batch_size=2, lr_cov=0.5, interval=1, structure="dense")
    run(opt, params, data)
    assert [K.name for p in params for K in opt.factors(p).values()] == ["diagonal", "dense", "diagonal"]
    options = {"lr": 0.1, "mu": 0.9, "lam": 1e-3, "a2": 0.5, "wd": 0, "b2": 0.5, "interval": 1, "B": 2}
    for p, q, gs, names in zip(
        params, start, zip(*data, strict=True), [["diagonal", "dense"], ["diagonal"]], strict=True
    ):
        assert_close([p], [shampoo_oracle(q, gs, names, **options)[0]])


def test_inverse_is_tracked():
    """With the same gradient all the time (K K^T)^-1 comes to its fixed point."""
    g = torch.tensor([0.5, -0.3, 0.2])
    p = nn.Parameter(torch.zeros(3))
    opt = RFShampoo([p], 0.0, damping=0.1, alpha2=0.0, lr_cov=0.2, interval=1, batch_size=4)
    run(opt, [p], [[g]] * 600)
    K = opt.factors(p)["K0"].to_dense()
    expected = torch.linalg.inv(4 * torch.outer(g, g) + 0.1 * torch.eye(3))
    torch.testing.assert_close(K @ K.T, expected, rtol=1e-6, atol=1e-6)


def test_interval_as_function():
    p, asked = nn.Parameter(torch.zeros(2)), []
    opt = RFShampoo(
        [p], 0.1, batch_size=1, interval=lambda t: asked.append(t) or (1 if t < 3 else 4), lr_cov=0.1
    )
    refreshed = []
    for t in range(12):
        before = opt.state[p].get("refreshes", 0)
        run(opt, [p], [[torch.randn(2)]])
        if opt.state[p]["refreshes"] > before:
            refreshed.append(t)
    assert refreshed == [0, 1, 2, 6, 10]
    assert asked == list(range(1, 12))


def test_products_are_kept_between_refreshes():
    (p,) = params = make_params([(4, 3)])
    opt = shampoo(params, "dense", interval=2)
    run(opt, params, make_grads(params, 1))
    first = opt._matrices[p].products
    assert first is not None
    run(opt, params, make_grads(params, 1))
    assert opt._matrices[p].products is first
    run(opt, params, make_grads(params, 1))
    assert opt._matrices[p].products is not first
    opt = shampoo(params, "dense", interval=1)
    run(opt, params, make_grads(params, 2))
    assert opt._matrices[p].products is None


def test_batch_size_of_a_smaller_batch():
    """Each step's squares are scaled by their own number of terms."""
    p = nn.Parameter(torch.zeros(1))
    opt = RFRMSProp([p], 0.1, alpha=0.5, batch_size=8)
    run(opt, [p], [[torch.ones(1)]])
    opt.batch_size = 3
    run(opt, [p], [[torch.full((1,), 2.0)]])
    assert opt.state[p]["curvature"].item() == 0.5 * (0.5 + 0.5 * 8) + 0.5 * 3 * 4
    assert opt.batch_size == 3
    opt.add_param_group({"params": make_params([(2,)]), "batch_size": 5})
    with pytest.raises(ValueError, match=r"groups have batch sizes \[3, 5\]"):
        _ = opt.batch_size
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="batch_size="):
            opt.batch_size = bad


def test_groups():
    params = make_params([(3, 2), (4,), (2, 2)])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    data = make_grads(params, 3)
    opt = RFShampoo(
        [{"params": params[:1], "lr": 0.1}, {"params": params[1:2], "structure": "diagonal"}],
        momentum=0.5,
        batch_size=3,
        lr_cov=0.3,
    )
    opt.add_param_group({"params": params[2:], "batch_size": 9, "momentum": 0.0, "interval": 1})
    run(opt, params, data)
    options = {"lr_cov": 0.3, "momentum": 0.5, "batch_size": 3}
    each = [{"lr": 0.1}, {"structure": "diagonal"}, {"batch_size": 9, "momentum": 0.0, "interval": 1}]
    for k, own in enumerate(each):
        run(
            RFShampoo([others[k]], **{**options, **own}),
            [others[k]],
            [grads[k : k + 1] for grads in data],
        )
    assert_equal(params, others)
    assert "momentum_buffer" not in opt.state[params[2]]


# ---------------------------------------------------------------------- behaviour of optimizers

MAKE = {
    "rmsprop": lambda ps, **kw: RFRMSProp(ps, 0.1, momentum=0.9, weight_decay=0.1, batch_size=4, **kw),
    "adamw": lambda ps, **kw: RFAdamW(ps, 0.1, batch_size=4, **kw),
    "shampoo": lambda ps, **kw: RFShampoo(ps, 0.1, batch_size=4, lr_cov=0.5, interval=2, **kw),
    "structured": lambda ps, **kw: RFShampoo(
        ps,
        0.1,
        batch_size=4,
        lr_cov=lambda k: 0.5 / (k + 1),
        interval=lambda t: 1 + t // 2,
        structure=["upper-triangular", ("hierarchical", {"k1": 1, "k2": 1}), "lower-toeplitz"],
        **kw,
    ),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


@every
def test_training_with_closure_and_scheduler(make):
    x = torch.randn(40, 4)
    y = x[:, :3].argmax(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    opt = make(model)
    opt.batch_size = 40
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 60)

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(60):
        losses.append(opt.step(closure).item())
        schedule.step()
    assert losses[-1] < 0.8 * losses[0]


@every
def test_a_tensor_as_learning_rate(make):
    params = make_params()
    others = copy.deepcopy(params)
    data = make_grads(params, 3)
    opt, other = make(params), make(others)
    other.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    run(opt, params, data)
    run(other, others, data)
    assert_equal(params, others)


@every
def test_parameters_without_gradient_are_left_alone(make):
    p, q, empty = (
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(0, 2)),
    )
    opt = make([p, q, empty])
    p.grad, empty.grad = torch.ones(3), torch.zeros(0, 2)
    opt.step()
    assert torch.equal(q, torch.ones(3)) and not torch.equal(p, torch.ones(3))
    assert list(opt.state) == [p]
    opt.zero_grad()
    opt.step()  # nothing to do


@every
def test_autocast_and_scaler(make):
    """Neither a step inside of autocast nor a scaled loss changes what a step does."""
    x, y = torch.randn(8, 4).float(), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).float()
    other = copy.deepcopy(model)
    opt, again = make(model), make(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(4):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()
        again.zero_grad()
        loss = cross_entropy(other(x), y) * (math.inf if k == 2 else 1.0)
        scaler.scale(loss).backward()
        if k == 2:  # skipped by the scaler
            scaler.step(again)
            again.zero_grad()
            scaler.update(1024.0)
            scaler.scale(cross_entropy(other(x), y)).backward()
        with torch.autocast("cpu", torch.bfloat16):
            scaler.step(again)
        scaler.update()
    assert again.skipped == 0
    assert_equal(list(model.parameters()), list(other.parameters()))


def by_torch(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rounding", [False, True])
def test_resume_gives_the_same_bits(make, dtype, rounding):
    params = make_params(dtype=dtype)
    data = make_grads(params, 9)
    data[2] = [math.nan * g for g in data[2]]
    opt = make(params, stochastic_rounding=rounding)
    run(opt, params, data[:4])
    state = opt.state_dict()
    for entries in state["state"].values():
        assert all(isinstance(v, Tensor | int) for v in entries.values())
    saved, others = by_torch(state), clones(params)
    again = make(others, stochastic_rounding=rounding)
    again.load_state_dict(saved)
    assert again.skipped == 1
    data[6] = data[2]
    run(opt, params, data[4:])
    run(again, others, data[4:])
    assert opt.skipped == again.skipped == 2
    assert_equal(params, others)
    for p, q in zip(params, others, strict=True):
        for name, value in opt.state[p].items():
            other = again.state[q][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
            if isinstance(value, Tensor):
                least = torch.float32 if name == "step" else torch.promote_types(dtype, torch.float32)
                assert value.dtype == other.dtype == least


@every
def test_states_without_skipped(make):
    """Earlier versions neither saved the number nor had it in groups, only in pickles."""
    params = make_params()
    opt = make([{"params": [p]} for p in params])
    run(opt, params, make_grads(params, 2))
    opt.skipped = 3
    state, pickled = opt.state_dict(), opt.__getstate__()
    for group in (*state["param_groups"], *pickled["param_groups"]):
        del group["skipped"]
    opt.load_state_dict(state)
    assert opt.skipped == 0
    other = object.__new__(type(opt))
    other.__setstate__({**pickled, "skipped": 3})
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert {group["skipped"] for group in other.param_groups} == {3}


@every
def test_deepcopy_and_pickle(make):
    params = make_params()
    opt = make(params, generator=Generator().manual_seed(3))
    data = make_grads(params, 6)
    run(opt, params, data[:3])
    opt.skipped = 2
    copies = [copy.deepcopy((opt, params))]
    if not callable(opt.param_groups[0].get("interval")):  # a lambda, which pickle refuses
        copies.append(pickle.loads(pickle.dumps((opt, params))))
    run(opt, params, data[3:])
    for other, its in copies:
        assert other.skipped == 2
        assert torch.equal(other.generator.get_state(), opt.generator.get_state())
        run(other, its, data[3:])
        assert_equal(params, its)


def new_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        g = Generator().manual_seed(k)
        opt.zero_grad()
        cross_entropy(model(torch.randn(6, 4, generator=g)), torch.tensor([0, 1, 2] * 2)).backward()
        opt.step()


@every
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint(make, flat, tmp_path):
    """A new optimizer gets its state from a step of size zero."""
    options = dcp.state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = new_model()
    opt = make(model)
    train(model, opt, range(4))
    state = {
        "model": model.state_dict(),
        "opt": get_optimizer_state_dict(model, opt, options=options),
    }
    other = new_model()
    again = make(other)
    template = {
        "model": other.state_dict(),
        "opt": get_optimizer_state_dict(other, again, options=options),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
        dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(template["model"])
    set_optimizer_state_dict(other, again, template["opt"], options=options)
    train(model, opt, range(4, 9))
    train(other, again, range(4, 9))
    assert_equal(list(model.parameters()), list(other.parameters()))


@every
def test_step_of_size_zero_without_gradient_changes_nothing(make):
    """What `get_optimizer_state_dict` does with a new optimizer leaves no trace."""
    torch.manual_seed(1)
    model = new_model()
    other = copy.deepcopy(model)
    opt, again = make(model), make(other)
    get_optimizer_state_dict(other, again)
    assert all("step" in again.state[p] for p in other.parameters())
    train(model, opt, range(4))
    train(other, again, range(4))
    assert_equal(list(model.parameters()), list(other.parameters()))
    for p in other.parameters():  # in the middle of training too
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(again.state_dict()["state"])
    again.param_groups[0]["lr"] = 0.0
    again.step()
    for k, entries in again.state_dict()["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[k][name]))


@every
def test_step_of_size_zero_with_gradient_counts(make):
    """Warm-up may start at zero."""
    params = make_params()
    opt = make(params)
    before = [p.detach().clone() for p in params]
    opt.param_groups[0]["lr"] = 0.0
    run(opt, params, make_grads(params, 1))
    assert_equal(params, before)
    assert all(opt.state[p]["step"] == 1 for p in params)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_steps_that_are_not_finite_are_skipped(make, bad):
    params = make_params()
    others = clones(params)
    data = make_grads(params, 6)
    opt, other = make(params), make(others)
    bad_grads = [g.clone() for g in data[2]]
    bad_grads[3][1, 2] = bad
    run(opt, params, [bad_grads])
    assert opt.skipped == 1 and not opt.state
    run(opt, params, data[:3])
    run(opt, params, [bad_grads, bad_grads])
    run(opt, params, data[3:])
    run(other, others, data)
    assert opt.skipped == 3 and other.skipped == 0
    assert_equal(params, others)


def test_statistics_that_are_not_finite_skip_the_step():
    """Squares that fit, and a norm of their sums that does not."""
    params = make_params([(3, 2), (4, 3)], torch.float32)
    opt = RFShampoo(params, 0.1, batch_size=1, interval=1)
    run(opt, params, make_grads(params, 2))
    before = copy.deepcopy((opt.state_dict()["state"], params))
    torch.set_default_dtype(torch.float32)
    run(opt, params, [[torch.ones(3, 2), torch.full((4, 3), 1e19)]])
    assert opt.skipped == 1
    state, saved = before
    assert_equal(params, saved)
    for k, entries in opt.state_dict()["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[k][name]))


@every
def test_other_gradients_are_refused(make):
    embedding = nn.Embedding(4, 3, sparse=True)
    p = nn.Parameter(torch.ones(2))
    opt = make([p, *embedding.parameters()])
    embedding(torch.tensor([1])).sum().backward()
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"a parameter of shape \(4, 3\) has a sparse gradient"):
        opt.step()
    assert torch.equal(p, torch.ones(2)) and not opt.state
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(TypeError, match=r"a parameter of shape \(2,\) has a complex gradient"):
        make([z]).step()


BAD = {
    RFRMSProp: {
        "lr": [-1, math.nan, math.inf],
        "alpha": [-0.1, 1.0, math.nan],
        "damping": [-1, math.inf],
        "momentum": [-1, math.nan],
        "weight_decay": [-1, math.nan],
        "batch_size": [0, -1, math.nan, math.inf],
    },
    RFAdamW: {
        "lr": [-1, torch.tensor([1.0, 2.0])],
        "betas": [(1.0, 0.9), (0.9, -1), (0.9,), (math.nan, 0)],
        "eps": [-1, math.inf],
        "weight_decay": [-1],
        "batch_size": [0],
    },
    RFShampoo: {
        "lr": [-1],
        "momentum": [-1],
        "damping": [-1, math.nan],
        "alpha2": [1.0, -1],
        "weight_decay": [math.inf],
        "lr_cov": [-1, math.nan],
        "interval": [0, 1.5, -2],
        "max_dim": [0, 2.5],
        "structure": ["dens", ["dense", "x"], ("block-diagonal", {"block": 0}), [], 3],
        "batch_size": [-1],
    },
}


@pytest.mark.parametrize("cls, name, value", [(c, n, v) for c in BAD for n in BAD[c] for v in BAD[c][n]])
def test_options_out_of_range(cls, name, value):
    p, q = make_params([(2,), (3,)])
    with pytest.raises(ValueError, match=r"expected"):
        cls([p], **{"batch_size": 1, name: value})
    opt = cls([p], batch_size=1)
    with pytest.raises(ValueError, match=r"expected"):
        opt.add_param_group({"params": [q], name: value})
    assert len(opt.param_groups) == 1


def test_more_errors():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="batch_size"):
        RFRMSProp([p])
    with pytest.raises(ValueError, match=r"unknown structure 'dens'; expected one of dense, diagonal"):
        RFShampoo([p], structure="dens", batch_size=1)
    with pytest.raises(TypeError, match="unknown option 'size'"):
        RFShampoo([p], structure=("block-diagonal", {"size": 3}), batch_size=1)
    for name, value in (("interval", 0), ("lr_cov", -1.0)):
        opt = RFShampoo([p], batch_size=1, **{name: lambda k, value=value: value})
        with pytest.raises(ValueError, match=rf"{name}\(\d\)={value}; expected"):
            run(opt, [p], [[torch.ones(2)]] * 2)


def test_checkpoints_that_do_not_fit():
    params = make_params([(4, 3)])
    shampoo_state = trained("shampoo", params)
    other = RFShampoo(make_params([(3, 4)]), batch_size=1)
    with pytest.raises(ValueError, match=r"entry 'momentum_buffer' of parameter 0, \(3, 4\), has shape"):
        other.load_state_dict(shampoo_state)
    assert not other.state
    with pytest.raises(ValueError, match=r"has no entry 'curvature'.*saved by another optimizer"):
        RFRMSProp(params, batch_size=1).load_state_dict(shampoo_state)
    with pytest.raises(ValueError, match="has no entry 'refreshes'"):
        RFShampoo(params, batch_size=1).load_state_dict(trained("rmsprop", params))
    with pytest.raises(ValueError, match="was a function when the checkpoint was made"):
        RFShampoo(params, batch_size=1).load_state_dict(trained("structured", params))
    with pytest.raises(ValueError):  # of torch
        RFShampoo([{"params": params}, {"params": make_params([(2,)])}], batch_size=1).load_state_dict(
            shampoo_state
        )
    adam = torch.optim.Adam(params)
    run(adam, params, make_grads(params, 1))
    with pytest.raises(ValueError, match="has no entry 'curvature'"):
        RFAdamW(params, batch_size=1).load_state_dict(adam.state_dict())


def trained(name: str, params: list[nn.Parameter]) -> dict:
    opt = MAKE[name](params)
    run(opt, params, make_grads(params, 2))
    return opt.state_dict()


def test_loading_into_an_optimizer_in_use():
    """Its matrices are those of the checkpoint then, and so is its structure."""
    params = make_params([(4, 3)])
    others = clones(params)
    data = make_grads(params, 6)
    opt, other = shampoo(params, "dense", interval=4), shampoo(others, "diagonal", interval=4)
    run(opt, params, data[:2])
    run(other, others, data[4:])
    with torch.no_grad():
        others[0].copy_(params[0])
    other.load_state_dict(opt.state_dict())
    run(opt, params, data[2:])
    run(other, others, data[2:])
    assert_equal(params, others)
    assert opt.factors(params[0])["K1"].name == other.factors(others[0])["K1"].name == "dense"


@pytest.mark.parametrize("in_place", [False, True])
def test_state_written_by_hand_counts(in_place):
    params = make_params([(4, 3)])
    (p,) = params
    opt = shampoo(params, "dense", interval=9, mu=0.0, wd=0.0)
    run(opt, params, make_grads(params, 2))
    before, g, K = p.detach().clone(), torch.randn(4, 3), torch.randn(4, 4)
    if in_place:
        opt.state[p]["K0.0"].copy_(K)
    else:
        opt.state[p]["K0.0"] = K
    run(opt, params, [[g]])
    K1 = opt.factors(p)["K1"].to_dense()
    assert_close([p], [before - 0.05 * K @ K.T @ g @ K1 @ K1.T])


def test_distributed_tensors():
    """Elementwise optimizers take them, whole matrices are none."""
    data = make_grads(make_params([(4, 3), (2,)]), 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("rmsprop", "adamw"):
            params = make_params([(4, 3), (2,)])
            others = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh)) for p in params]
            opt, other = MAKE[name](params), MAKE[name](others)
            run(opt, params, data)
            split = [[distribute_tensor(g, mesh) for g in grads] for grads in data]
            run(other, others, split)
            run(other, others, [[g / 0 for g in grads] for grads in split[:1]])
            assert other.skipped == 1
            assert_equal(params, [p.full_tensor() for p in others])
        with pytest.raises(TypeError, match="got a distributed tensor"):
            MAKE["shampoo"](others)
    finally:
        dist.destroy_process_group()


def test_momentum_switched_on_later():
    params = make_params([(3, 2)])
    for opt in (RFRMSProp(params, batch_size=1), RFShampoo(params, momentum=0.0, batch_size=1)):
        run(opt, params, make_grads(params, 1))
        opt.param_groups[0]["momentum"] = 0.9
        run(opt, params, make_grads(params, 2))
        assert opt.state[params[0]]["momentum_buffer"].abs().min() > 0


def test_no_damping_and_no_gradient():
    """0 / 0 is 0 here."""
    p = nn.Parameter(torch.ones(2))
    for opt in (
        RFRMSProp([p], 0.1, 0.0, 0.0, batch_size=1),
        RFAdamW([p], 0.1, (0, 0), 0.0, batch_size=1),
    ):
        run(opt, [p], [[torch.tensor([0.0, 2.0])]] * 3)
        assert p.isfinite().all()


# ---------------------------------------------------------------------- half precision


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(make, dtype):
    """One step from state in float32 equals that of a float32 parameter, rounded."""
    params = make_params(dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    data = make_grads(params, 5)
    opt, other = make(params), make(wide)
    for grads in data:
        with torch.no_grad():
            for p, q in zip(params, wide, strict=True):
                q.copy_(p)
        run(opt, params, [grads])
        run(other, wide, [[g.float() for g in grads]])
        assert_equal(params, [q.detach().to(dtype) for q in wide])
        for p, q in zip(params, wide, strict=True):
            for name, value in opt.state[p].items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, other.state[q][name])


@every
def test_stochastic_rounding_moves_parameters_by_small_steps(make):
    """The mean of many parameters follows a float32 one, which nearest rounding does not."""
    start, steps = 4.0, 40
    nearest, rounded, drawn = (nn.Parameter(torch.full((2000,), start).bfloat16()) for _ in range(3))
    wide = nn.Parameter(torch.full((2000,), start, dtype=torch.float32))
    opts = [make([p]) for p in (nearest, wide)]
    opts.append(make([rounded], stochastic_rounding=True))
    opts.append(make([drawn], stochastic_rounding=True, generator=Generator().manual_seed(1)))
    for p, opt in zip((nearest, wide, rounded, drawn), opts, strict=True):
        opt.param_groups[0].update(lr=1e-3, weight_decay=0.0, max_dim=10)
        if "momentum" in opt.param_groups[0]:
            opt.param_groups[0]["momentum"] = 0.0
        run(opt, [p], [[torch.full_like(p, 0.5)]] * steps)
    assert torch.equal(nearest, torch.full_like(nearest, start))
    moved = start - wide[0].item()
    assert 0.005 < moved < 0.1
    # the variance is at most that of draws of one unit, 1/64 below 4, with mean `moved`
    bound = 5 * math.sqrt(moved / 64 / 2000)
    for p in (rounded, drawn):
        assert abs(start - p.double().mean().item() - moved) < bound
        assert set(p.tolist()) <= {start - k / 64 for k in range(20)}
    assert not torch.equal(rounded, drawn)


def test_rounding_differs_between_parameters_and_steps():
    params = [nn.Parameter(torch.full((200,), 4.0).bfloat16()) for _ in range(2)]
    opt = RFRMSProp(params, 1e-3, alpha=0.0, batch_size=1, stochastic_rounding=True)
    found = []
    for _ in range(2):
        for p in params:
            p.data.fill_(4.0)
        run(opt, params, [[torch.ones_like(p) for p in params]])
        found += [p.detach().clone() for p in params]
    assert not any(torch.equal(found[i], found[j]) for i in range(4) for j in range(i))
