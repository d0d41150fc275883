"""What processes do in `test_natural_parallel.py`: each case runs on every process of a group."""

from __future__ import annotations

import io
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from backpack_ext import UnsupportedError, backpack, extend
from optim import IKFAC, INGD, KFAC, SINGD
from optim.exchange import Exchange

SIZES = (2, 4)
# Data of each process: as many, and not.
EQUAL = {2: (4, 4), 4: (2, 2, 2, 2)}
UNEQUAL = {2: (2, 6), 4: (1, 3, 2, 2)}
PLACEMENTS = ("communication", "memory")
STEPS = 5
# float64 sums in another order
TOLERANCE = 1e-10
# seconds that a process waits for another one
LIMIT = 20.0

FOLDER = ""  # for checkpoints

CASES: dict[str, Callable[[dist.ProcessGroup], None]] = {}


def case(run: Callable[[dist.ProcessGroup], None]) -> Callable[[dist.ProcessGroup], None]:
    """Register a case under its own name."""
    CASES[run.__name__] = run
    return run


# -- a network with layers of all kinds ----------------------------------------------------------------


class Net(nn.Module):
    """Layers of many kinds, two of equal shape, experts, and a parameter of no layer.

    Attributes:
        choice: Which expert is used; None for none.
    """

    def __init__(self, frozen_bias: bool = False, attention: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if attention else None
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(4, 6, 2, groups=2)
        self.shift = nn.Parameter(torch.zeros(6))
        self.same = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.experts = nn.ModuleList([nn.Linear(6, 6), attention, nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)
        self.choice: int | None = None
        self.head.bias.requires_grad_(not frozen_bias)
        self.same[0].bias.requires_grad_(not frozen_bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[n, 3]`` of tokens ``[n, 4]``."""
        x = self.embedding(tokens)
        if self.attention is not None:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x)
        x = self.conv(x.mT.unflatten(2, (2, 2))).flatten(1) + self.shift
        return self.head(self._expert(self.same(x)))

    def _expert(self, x: Tensor) -> Tensor:
        if self.choice is None:
            return x
        expert = self.experts[self.choice]
        if isinstance(expert, nn.Linear):
            return x + expert(x).tanh()
        x = x.unflatten(1, (2, 3))
        return (x + expert(x, x, x, need_weights=False)[0]).flatten(1)


def new_net(experts: bool = False, **options: bool) -> Net:
    """Return a network, the same on all processes."""
    torch.manual_seed(0)
    net = Net(**options).double()
    if not experts:
        del net.experts
    return net


def data_of(step: int) -> tuple[Tensor, Tensor]:
    """Return the eight data of a step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(7, (8, 4), generator=generator)
    return tokens, torch.randint(3, (8,), generator=generator)


def shares_of(counts: tuple[int, ...]) -> list[slice]:
    """Return which data each process has."""
    stops = [sum(counts[: k + 1]) for k in range(len(counts))]
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


# The expert for a batch, by the step and the place of the batch's first datum
Experts = Callable[[int, int], int | None]


def trained(
    model: nn.Module,
    opt,
    reduction: str = "mean",
    batches: Sequence[slice] = (slice(0, 8),),
    factor: float = 1.0,
    experts: Experts | None = None,
    steps: Iterable[int] = range(STEPS),
    inputs: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Train; yield after each step.

    Args:
        model: The network, maybe wrapped.
        opt: The optimizer.
        reduction: Of the loss.
        batches: Which of the eight data there are here, in which batches.
        factor: Of the loss: the number of processes if their average is taken.
        experts: Which experts are used; none by default.
        steps: Which steps.
        inputs: Changes the input of a step.
    """
    loss_fn = extend(nn.CrossEntropyLoss(reduction=reduction))
    net = model.module if isinstance(model, DistributedDataParallel) else model
    for step in steps:
        tokens, target = data_of(step)
        tokens = tokens if inputs is None else inputs(step, tokens)
        opt.zero_grad()
        for where in batches:
            part = (where.stop - where.start) / 8 if reduction == "mean" else 1
            net.choice = None if experts is None else experts(step, where.start)
            wait = where is not batches[-1] and isinstance(model, DistributedDataParallel)
            with model.no_sync() if wait else nullcontext(), backpack(*opt.extensions()):
                (factor * part * loss_fn(model(tokens[where]), target[where])).backward()
        opt.step()
        yield step


def halves(part: slice) -> list[slice]:
    """Cut a slice into two."""
    middle = (part.start + part.stop) // 2
    return [slice(part.start, middle), slice(middle, part.stop)]


def values(model: nn.Module) -> Tensor:
    """Return all parameters in a row."""
    found = [p.detach() for p in model.parameters()]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in found])


def check_alike(value: Tensor, group: dist.ProcessGroup) -> None:
    """Check that a tensor is the same, bit by bit, on all processes."""
    found = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, value.contiguous(), group=group)
    assert all(torch.equal(other, value) for other in found), "processes have different parameters"


def check_close(found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max().item()
    assert error <= TOLERANCE, f"error {error}"


# -- equal to one process with all data --------------------------------------------------------------

COMMON = {"lr": 0.05, "damping": 0.1, "interval": 1}
FAST = {**COMMON, "lr_cov": 0.2}
HIERARCHICAL = ("hierarchical", {"k1": 2, "k2": 1})
OPTIMIZERS: dict[str, Callable] = {
    "singd_dense": lambda m, **o: SINGD(m, **{**FAST, **o}),
    "singd_diagonal": lambda m, **o: SINGD(m, structure="diagonal", **{**FAST, **o}),
    "singd_hierarchical": lambda m, **o: SINGD(m, structure=HIERARCHICAL, **{**FAST, **o}),
    "singd_plain": lambda m, **o: SINGD(m, alpha1=0.0, weight_decay=0.01, **{**FAST, **o}),
    "singd_normalized": lambda m, **o: SINGD(m, normalize=True, approx="expand", **{**FAST, **o}),
    "singd_separate": lambda m, **o: SINGD(m, joint_bias=False, momentum=0.0, **{**FAST, **o}),
    "ingd": lambda m, **o: INGD(m, **{**FAST, **o}),
    "ikfac": lambda m, **o: IKFAC(m, structure=("diagonal", "dense"), **{**FAST, **o}),
    "kfac_pi": lambda m, **o: KFAC(m, decay=0.7, **{**COMMON, **o}),
    "kfac_exact": lambda m, **o: KFAC(m, inverse="exact", kl_clip=1e-3, **{**COMMON, **o}),
    "kfac_seldom": lambda m, **o: KFAC(
        m, inverse_interval=2, structure=("block-diagonal", {"block": 3}), **{**COMMON, **o}
    ),
}


def equal_to_one(
    name: str,
    group: dist.ProcessGroup,
    *,
    counts: dict = EQUAL,
    micro: bool = False,
    apart: bool = False,
    outside: bool = False,
    frozen_bias: bool = False,
    experts: Experts | None = None,
    by_parameters: bool = False,
    options: dict | None = None,
    reduction: str = "mean",
) -> None:
    """Train on all processes in both ways of placement, and on rank 0 alone with all data.

    Args:
        name: Of the optimizer.
        group: The processes.
        counts: How many data each process has.
        micro: Whether these come in two batches.
        apart: Whether also the single process takes the data of the others in batches of their own.
        outside: Whether `DistributedDataParallel` wraps the model before it is extended.
        frozen_bias: Whether some biases are not trained.
        experts: Which experts are used.
        by_parameters: Whether the optimizer is given parameters instead of a model.
        options: Of the optimizer.
        reduction: Of the loss.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    make, options = OPTIMIZERS[name], options or {}
    shares = shares_of(counts[size])
    setting = {"reduction": reduction, "experts": experts}
    expected = []
    if rank == 0:
        net = extend(new_net(experts is not None, frozen_bias=frozen_bias))
        start = values(net)
        opt = make(net, **options)
        batches = shares if apart else [slice(0, 8)]
        expected = [values(net) for _ in trained(net, opt, batches=batches, **setting)]
        assert (expected[-1] - start).abs().max() > 1e-3
    last = {}
    for placement in PLACEMENTS:
        net = new_net(experts is not None, frozen_bias=frozen_bias)
        model = DistributedDataParallel(
            net if outside else extend(net),
            process_group=group,
            find_unused_parameters=experts is not None,
        )
        if outside:
            extend(model)
        given = list(model.parameters()) if by_parameters else model
        opt = make(given, process_group=group, placement=placement, **options)
        batches = halves(shares[rank]) if micro else [shares[rank]]
        for k in trained(model, opt, batches=batches, factor=size, **setting):
            check_alike(values(net), group)
            if rank == 0:
                check_close(values(net), expected[k])
        last[placement] = values(net)
        assert opt.skipped == 0
    check_close(*last.values())


SETTINGS: dict[str, dict] = {
    "equal": {},
    "equal_3": {"options": {"interval": 3}},
    "unequal": {"counts": UNEQUAL, "outside": True},
    "sum": {"reduction": "sum", "counts": UNEQUAL, "options": {"lr": 0.005}},
    "micro": {"micro": True, "options": {"interval": 3}, "by_parameters": True},
    "micro_sum": {"micro": True, "reduction": "sum", "options": {"lr": 0.005}},
    "frozen": {"frozen_bias": True, "options": {"interval": 3}},
}


def sometimes(step: int, first: int) -> int | None:
    """Use one expert at a time, the first not before the second step, at last none."""
    return [1, 0, 1, 2, None][step]


def on_one_process(step: int, first: int) -> int:
    """Use an expert on the first process, another one on the others."""
    return (step + (first > 0)) % 3


SETTINGS["sometimes"] = {"experts": sometimes}
SETTINGS["sometimes_3"] = {"experts": sometimes, "options": {"interval": 3}}
SETTINGS["one_process"] = {"experts": on_one_process, "apart": True}
SETTINGS["one_process_3"] = {
    "experts": on_one_process,
    "apart": True,
    "counts": UNEQUAL,
    "options": {"interval": 3},
}

for name, setting in (
    *(("singd_dense", setting) for setting in SETTINGS),
    ("singd_diagonal", "unequal"),
    ("singd_diagonal", "sometimes"),
    ("singd_hierarchical", "sum"),
    ("singd_plain", "micro"),
    ("singd_normalized", "unequal"),
    ("singd_normalized", "micro_sum"),
    ("singd_separate", "equal_3"),
    ("ingd", "micro_sum"),
    ("ikfac", "unequal"),
    ("ikfac", "one_process"),
    ("kfac_pi", "equal"),
    ("kfac_pi", "micro_sum"),
    ("kfac_pi", "one_process"),
    ("kfac_exact", "unequal"),
    ("kfac_exact", "frozen"),
    ("kfac_seldom", "equal_3"),
    ("kfac_seldom", "sometimes"),
):
    CASES[f"{name}_{setting}"] = lambda group, name=name, setting=setting: equal_to_one(
        name, group, **SETTINGS[setting]
    )


# -- the same on all processes -----------------------------------------------------------------------


def parallel(group: dist.ProcessGroup, net: nn.Module, **options) -> DistributedDataParallel:
    return DistributedDataParallel(extend(net), process_group=group, **options)


def batch_of(group: dist.ProcessGroup, counts: dict = EQUAL) -> dict:
    """Return which data this process has, and the factor of its loss."""
    size = dist.get_world_size(group)
    return {"batches": [shares_of(counts[size])[dist.get_rank(group)]], "factor": size}


def not_finite(where: str, interval: int, placement: str, group: dist.ProcessGroup) -> None:
    """Have one process's gradient, or its statistics alone, be not finite at two steps."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    bad = (1, 3)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model, loss_fn = parallel(group, net), extend(nn.CrossEntropyLoss())
    opt = SINGD(model, process_group=group, placement=placement, **{**FAST, "interval": interval})
    for step in range(STEPS):
        torch.manual_seed(step)
        x, y = torch.randn(4, 4).double(), torch.randint(3, (4,))
        if last and step in bad:
            # the square of the second overflows; tanh has no slope there
            x[0] = float("nan") if where == "gradient" else 1e160
        before = values(net)
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(model(x), y).backward()
        if where == "statistics" and step in bad:
            assert all(p.grad.isfinite().all() for p in net.parameters())
        opt.step()
        check_alike(values(net), group)
        assert torch.equal(values(net), before) == (step in bad)
    assert opt.skipped == 2
    assert [g["step"] for g in opt.param_groups] == [STEPS - 2]


for where, interval in (("gradient", 1), ("gradient", 2), ("statistics", 1)):
    for placement in PLACEMENTS:
        CASES[f"not_finite_{where}_{interval}_{placement}"] = (
            lambda group, where=where, interval=interval, placement=placement: not_finite(
                where, interval, placement, group
            )
        )


class TwoWays(nn.Module):
    """A square matrix, which is read as it is, and maybe transposed too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.eye(4) + 0.1)
        self.both = False

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.first(x), self.weight)
        return nn.functional.linear(x.tanh(), self.weight.T) if self.both else x


@case
def two_ways_on_one_process(group):
    """A weight that one process reads in two ways has no factors on any."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    loss_fn = extend(nn.CrossEntropyLoss())
    found = {}
    for world, placement in ((1, None), *((size, placement) for placement in PLACEMENTS)):
        net = TwoWays().double()
        torch.manual_seed(0)
        for p in net.parameters():
            p.data = torch.randn_like(p)
        extend(net)
        model, together = net, {}
        if world > 1:
            model = DistributedDataParallel(net, process_group=group)
            together = {"process_group": group, "placement": placement}
        opt = SINGD(model, **FAST, **together)
        for step in range(3):
            torch.manual_seed(step)
            x, y = torch.randn(size, 2, 4).double(), torch.randint(4, (size, 2))
            opt.zero_grad()
            for k in range(size) if world == 1 else [rank]:
                net.both = step > 0 and k == size - 1
                with backpack(*opt.extensions()):
                    (loss_fn(model(x[k]), y[k]) * (world / size)).backward()
            opt.step()
        found[placement] = values(net)
        assert "exp_avg" in opt.state[net.weight]
    for placement in PLACEMENTS:
        check_close(found[placement], found[None])
        check_alike(found[placement], group)


@case
def one_way_each(group):
    """Processes that read a weight in different ways are told, all of them."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4).double())
    loss_fn, x = extend(nn.MSELoss()), torch.randn(2, 4).double()
    opt = SINGD([weight], process_group=group)
    net = extend(nn.Tanh())
    read = weight if dist.get_rank(group) else weight.T
    with backpack(*opt.extensions()):
        loss_fn(net(nn.functional.linear(x.requires_grad_(), read)), torch.zeros_like(x)).backward()
    raises(ValueError, "in different ways", opt.step)


def raises(kind: type[Exception], message: str, run: Callable[[], Any]) -> None:
    """Check that something raises."""
    try:
        run()
    except kind as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"nothing was raised; expected: {message}")


# -- who does what -----------------------------------------------------------------------------------


def stack_of_layers() -> nn.Module:
    """Return four large layers, and many small ones."""
    torch.manual_seed(0)
    large = [nn.Linear(40, 40) for _ in range(4)]
    small = [nn.Linear(40, 5), *(nn.Linear(5, 5) for _ in range(6))]
    layers = [layer for pair in zip(large, [nn.Tanh() for _ in large], strict=True) for layer in pair]
    return nn.Sequential(*layers, *small).double()


def train_stack(model: nn.Module, opt, group: dist.ProcessGroup, steps: int = 1) -> None:
    loss_fn = extend(nn.MSELoss())
    for step in range(steps):
        torch.manual_seed(10 * step + dist.get_rank(group))
        opt.zero_grad()
        with backpack(*opt.extensions()):
            loss_fn(model(torch.randn(3, 40).double()), torch.randn(3, 5).double()).backward()
        opt.step()


def state_bytes(opt, without: str = "") -> int:
    """Return the bytes of matrices, but for some names."""
    states = opt.state.values()
    return sum(t.nbytes for s in states for k, t in s.items() if "." in k and k[0] not in tuple(without))


def gathered(value: Any, group: dist.ProcessGroup) -> list:
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


@case
def work_is_divided(group):
    """Each layer is refreshed once, by its owner; large layers are shared out."""
    size = dist.get_world_size(group)
    for placement in PLACEMENTS:
        model = parallel(group, stack_of_layers())
        opt = SINGD(model, process_group=group, placement=placement, **FAST)
        done: list[int] = []
        numbers = {p: k for k, p in enumerate(model.parameters())}
        refresh = opt._refresh

        def counted(bucket, options, plans, A, B, refresh=refresh, done=done, numbers=numbers):
            done.extend(numbers[layer.weight] for layer in plans)
            refresh(bucket, options, plans, A, B)

        opt._refresh = counted
        train_stack(model, opt, group)
        found = gathered(done, group)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert sorted(k for part in found for k in part) == sorted(numbers[m.weight] for m in layers)
        owners = [opt.state[m.weight]["owner"] for m in layers]
        assert all(numbers[m.weight] in found[owner] for m, owner in zip(layers, owners, strict=True))
        assert gathered(owners, group) == size * [owners]
        large, small = owners[:4], owners[4:]
        assert [large.count(rank) for rank in range(size)] == size * [4 // size]
        assert min(map(small.count, range(size))) > 0


@case
def memory_is_divided(group):
    """With placement="memory" processes together keep KFAC's factors once, and SINGD's momenta."""
    size = dist.get_world_size(group)
    for make, everywhere in (
        (lambda m, **o: SINGD(m, **FAST, **o), "KC"),  # its moments are projected with them
        (lambda m, **o: IKFAC(m, **FAST, **o), "KC"),
        (lambda m, **o: KFAC(m, **COMMON, **o), ""),
        (lambda m, **o: KFAC(m, inverse="exact", **COMMON, **o), ""),
    ):
        totals = {}
        for placement in PLACEMENTS:
            model = parallel(group, stack_of_layers())
            opt = make(model, process_group=group, placement=placement)
            train_stack(model, opt, group, 2)
            check_alike(values(model), group)
            mine = state_bytes(opt, everywhere)
            totals[placement] = gathered((mine, state_bytes(opt) - mine), group)
        whole, common = totals["communication"][0]
        assert totals["communication"] == size * [(whole, common)]
        assert sum(mine for mine, _ in totals["memory"]) == whole
        assert all(mine <= 1.4 * whole / size for mine, _ in totals["memory"]), totals
        assert all(part == common for _, part in totals["memory"])


# -- checkpoints -------------------------------------------------------------------------------------


def through_file(state: dict) -> dict:
    """`torch.save` and `torch.load` with its safe default."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def from_rank_0(state: dict, group: dist.ProcessGroup) -> dict:
    found = [through_file(state)]
    dist.broadcast_object_list(found, group=group, group_src=0)
    return found[0]


def copy_of(net: nn.Module) -> Net:
    other = new_net()
    other.load_state_dict(net.state_dict())
    return extend(other)


def resumed(name: str, placement: str, group: dist.ProcessGroup) -> None:
    """Save after three steps: what is loaded goes on just so, on as many processes and on one."""
    make, where = OPTIMIZERS[name], {"process_group": group, "placement": placement}
    net = new_net()
    model = parallel(group, net)
    opt = make(model, interval=2, **where)
    mine = batch_of(group)
    list(trained(model, opt, steps=range(3), **mine))
    state = opt.state_dict()
    saved = through_file(state) if placement == "memory" else from_rank_0(state, group)
    start = copy_of(net)
    list(trained(model, opt, steps=range(3, 6), **mine))

    again = DistributedDataParallel(copy_of(start), process_group=group)
    new = make(again, interval=2, **where)
    new.load_state_dict(saved)
    list(trained(again, new, steps=range(3, 6), **mine))
    check_alike(values(again), group)
    check_close(values(again), values(model))  # DDP sums in another order in its first step

    if placement == "communication":
        alone = copy_of(start)
        new = make(alone, interval=2)
        new.load_state_dict(saved)
        list(trained(alone, new, steps=range(3, 6)))
        check_close(values(alone), values(model))
    else:
        other = from_rank_0(state, group)
        new = make(copy_of(start), interval=2, **where)
        if dist.get_rank(group):
            raises(ValueError, "Was it saved by another process", lambda: new.load_state_dict(other))
        else:
            new.load_state_dict(other)


for name, placement in (
    *(("singd_dense", placement) for placement in PLACEMENTS),
    *(("kfac_pi", placement) for placement in PLACEMENTS),
    ("kfac_exact", "memory"),
    ("ikfac", "communication"),
):
    CASES[f"resumed_{name}_{placement}"] = lambda group, name=name, placement=placement: resumed(
        name, placement, group
    )


def from_one_process(name: str, placement: str, group: dist.ProcessGroup) -> None:
    """Several processes go on with what one has saved; each keeps its part only."""
    make = OPTIMIZERS[name]
    alone = extend(new_net())
    opt = make(alone, interval=2)
    list(trained(alone, opt, steps=range(3)))
    saved, start = through_file(opt.state_dict()), copy_of(alone)
    list(trained(alone, opt, steps=range(3, 6)))
    model = DistributedDataParallel(copy_of(start), process_group=group)
    new = make(model, interval=2, process_group=group, placement=placement)
    new.load_state_dict(saved)
    list(trained(model, new, steps=range(3, 6), **batch_of(group, UNEQUAL)))
    check_alike(values(model), group)
    check_close(values(model), values(alone))
    total = sum(gathered(state_bytes(new, "KC"), group))
    whole = state_bytes(opt, "KC")
    assert total == whole * (1 if placement == "memory" else dist.get_world_size(group))


for name in ("singd_dense", "kfac_pi"):
    for placement in PLACEMENTS:
        CASES[f"from_one_process_{name}_{placement}"] = lambda group, name=name, placement=placement: (
            from_one_process(name, placement, group)
        )


@case
def one_process_finds_a_loaded_layer(group):
    """The first pass after loading, between refreshes, shows attention's layers to one process only."""
    start, where = shares_of(EQUAL[dist.get_world_size(group)]), batch_of(group)
    for placement in PLACEMENTS:
        found = []
        for world in ("one", "all"):
            net, state = extend(new_net(experts=True)), None
            for steps in ((0,), (1, 2, 3)):
                model, together, data = net, {}, {"batches": start}
                if world == "all":
                    model = DistributedDataParallel(
                        net, process_group=group, find_unused_parameters=True
                    )
                    together, data = {"process_group": group, "placement": placement}, where
                opt = SINGD(model, **{**FAST, "interval": 3}, **together)
                if state is not None:
                    opt.load_state_dict(state)
                list(trained(model, opt, experts=on_one_process, steps=steps, **data))
                state = through_file(opt.state_dict())
                copy = new_net(experts=True)
                copy.load_state_dict(net.state_dict())
                net = extend(copy)
            found.append(values(net))
        check_alike(found[1], group)
        check_close(*found)


@case
def processes_change_in_number(group):
    """All processes save, one goes on and saves, and the state fits any number."""
    size = dist.get_world_size(group)
    model = parallel(group, stack_of_layers())
    opt = SINGD(model, process_group=group, **FAST)
    train_stack(model, opt, group)
    alone = SINGD(extend(stack_of_layers()), **FAST)
    alone.load_state_dict(opt.state_dict())
    assert not any("owner" in state for state in alone.state.values())
    new = SINGD(extend(stack_of_layers()), process_group=group, placement="memory", **FAST)
    new.load_state_dict(alone.state_dict())
    assert len({state["owner"] for state in new.state.values() if "owner" in state}) == size


@case
def fewer_processes(group):
    """A state of four processes does not fit two."""
    rank = dist.get_rank(group)
    halves_of_it = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for placement in PLACEMENTS:
        model = parallel(group, stack_of_layers())
        opt = SINGD(model, process_group=group, placement=placement, **FAST)
        train_stack(model, opt, group)
        state = opt.state_dict()
        where = {"process_group": halves_of_it[rank // 2], "placement": placement}
        new = SINGD(extend(stack_of_layers()), **where, **FAST)
        raises(ValueError, "Load it with as many processes", lambda n=new, s=state: n.load_state_dict(s))


# -- samples -----------------------------------------------------------------------------------------


@case
def samples_differ_between_processes(group):
    """Processes that are seeded alike, and have the same data, draw different samples; also resumed."""
    saved, found = None, []
    reduced = Exchange.reduced

    def noted(self, moments):
        found.append(next(m.B for layer, m in moments.items() if layer.weight is net.head.weight))
        return reduced(self, moments)

    Exchange.reduced = noted
    try:
        for placement in (*PLACEMENTS, "communication"):  # the last goes on with what rank 0 has saved
            torch.manual_seed(0)
            net = new_net()
            model = parallel(group, net)
            opt = SINGD(model, process_group=group, placement=placement, fisher="mc", **FAST)
            if placement == "communication" and saved is not None:
                opt.load_state_dict(saved)
            found.clear()
            for _ in trained(model, opt, steps=range(2)):
                check_alike(values(net), group)
            for B in found:
                others = gathered(B.to_dense(), group)
                pairs = [(k, j) for k in range(len(others)) for j in range(k)]
                assert not any(torch.allclose(others[k], others[j]) for k, j in pairs), "they draw alike"
            if saved is None:
                saved = from_rank_0(opt.state_dict(), group)
                own = through_file(opt.state_dict())
                opt.load_state_dict(own)
                again = opt.state_dict()
                assert torch.equal(*(state["param_groups"][0]["generator"] for state in (own, again)))
    finally:
        Exchange.reduced = reduced


# -- sharded parameters ------------------------------------------------------------------------------


def sharded(group: dist.ProcessGroup, net: nn.Module, children: bool = False) -> nn.Module:
    """Shard a network's parameters, maybe those of each child apart."""
    mesh = DeviceMesh.from_group(group, "cpu")
    extend(net)
    if children:
        for child in net.children():
            if next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def sharded_equal_to_one(
    name: str, group: dist.ProcessGroup, counts: dict = EQUAL, children: bool = False, **options
) -> None:
    expected = []
    if dist.get_rank(group) == 0:
        net = extend(new_net(attention=False))
        opt = OPTIMIZERS[name](net, **options)
        expected = [values(net) for _ in trained(net, opt)]
    for placement in PLACEMENTS:
        # without attention, whose weights pass through functional calls
        net = sharded(group, new_net(attention=False), children)
        opt = OPTIMIZERS[name](net, process_group=group, placement=placement, **options)
        for step in trained(net, opt, **batch_of(group, counts)):
            found = values(net)
            if expected:
                check_close(found, expected[step])
        assert opt.skipped == 0


for name, setting in (
    ("singd_dense", {"interval": 2}),
    ("singd_diagonal", {"counts": UNEQUAL, "children": True}),
    ("ikfac", {"children": True}),
    ("kfac_exact", {}),
    ("kfac_seldom", {"counts": UNEQUAL}),
):
    CASES[f"sharded_{name}"] = lambda group, name=name, setting=setting: sharded_equal_to_one(
        name, group, **setting
    )


@case
def sharded_to_nothing(group):
    """A process that holds no part of any parameter takes part, also in steps of length zero."""
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 1)).double()
        net = sharded(group, net) if together else extend(net)
        loss_fn = extend(nn.MSELoss())
        options = {"process_group": group} if together else {}
        opt = SINGD(net, **{**FAST, "interval": 2}, **options)
        for step, lr in enumerate((0.0, 0.1, 0.1)):
            torch.manual_seed(step)
            x, y = torch.randn(8, 5).double(), torch.randn(8, 1).double()
            if together:
                where = batch_of(group)["batches"][0]
                x, y = x[where], y[where]
            for options in opt.param_groups:
                options["lr"] = lr
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss_fn(net(x), y).backward()
            opt.step()
        found.append(values(net))
    check_close(*found)


@case
def sharded_not_finite(group):
    """A part that is not finite on one process stops all, also between refreshes."""
    net = sharded(group, new_net(attention=False))
    opt = SINGD(net, process_group=group, **{**FAST, "interval": 2})
    mine = batch_of(group)
    list(trained(net, opt, steps=range(1), **mine))
    before = values(net)

    def spoil(*args) -> None:
        next(net.parameters()).grad.to_local().fill_(float("nan"))

    if dist.get_rank(group) == 0:
        opt.register_step_pre_hook(spoil)
    for step in (1, 2):
        list(trained(net, opt, steps=range(step, step + 1), **mine))
        assert torch.equal(values(net), before)
    assert opt.skipped == 2


# -- torch.distributed.checkpoint --------------------------------------------------------------------


def wrapped(kind: str, group: dist.ProcessGroup, net: nn.Module) -> nn.Module:
    return sharded(group, net) if kind == "sharded" else parallel(group, net)


def through_dcp(kind: str, name: str, group: dist.ProcessGroup) -> None:
    """Save and load by torch.distributed.checkpoint, into new objects."""
    make, mine = OPTIMIZERS[name], batch_of(group)
    attention = kind == "wrapped"
    model = wrapped(kind, group, new_net(attention=attention))
    opt = make(model, interval=2, process_group=group)
    list(trained(model, opt, steps=range(3), **mine))
    folder = f"{FOLDER}/{kind}-{name}-{dist.get_world_size(group)}-{dist.get_process_group_ranks(group)}"
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.save(state, checkpoint_id=folder, process_group=group)
    list(trained(model, opt, steps=range(3, 6), **mine))

    net = new_net(attention=attention)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    again = wrapped(kind, group, net)
    new = make(again, interval=2, process_group=group)
    # attention's layers show in a pass only: torch could not ask for their state otherwise
    for options in new.param_groups:
        options["lr"] = 0.0
    list(trained(again, new, steps=range(1), **mine))
    state = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, new)}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, new, state["optimizer"])
    assert {options["lr"] for options in new.param_groups} == {opt.param_groups[0]["lr"]}
    list(trained(again, new, steps=range(3, 6), **mine))
    check_close(values(again), values(model))


for kind, name in (("wrapped", "singd_dense"), ("sharded", "kfac_pi")):
    CASES[f"dcp_{kind}_{name}"] = lambda group, kind=kind, name=name: through_dcp(kind, name, group)


def fresh_dcp(kind: str, group: dist.ProcessGroup) -> None:
    """A new optimizer of layers with modules needs no pass before: torch takes a step of its own."""

    def new() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
        model = wrapped(kind, group, net)
        return model, SINGD(model, process_group=group, **{**FAST, "interval": 2})

    def train(model: nn.Module, opt, steps: range) -> None:
        loss_fn = extend(nn.CrossEntropyLoss())
        for step in steps:
            torch.manual_seed(10 * step + dist.get_rank(group))
            opt.zero_grad()
            with backpack(*opt.extensions()):
                loss_fn(model(torch.randn(4, 4).double()), torch.randint(3, (4,))).backward()
            opt.step()

    model, opt = new()
    train(model, opt, range(3))
    folder = f"{FOLDER}/{kind}-{dist.get_world_size(group)}-{dist.get_process_group_ranks(group)}"
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.save(state, checkpoint_id=folder, process_group=group)
    train(model, opt, range(3, 6))
    again, fresh = new()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    state = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, fresh)}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, fresh, state["optimizer"])
    train(again, fresh, range(3, 6))
    check_close(values(again), values(model))


for kind in ("wrapped", "sharded"):
    CASES[f"fresh_dcp_{kind}"] = lambda group, kind=kind: fresh_dcp(kind, group)


# -- bfloat16, and the group of all -------------------------------------------------------------------


@case
def rounded_at_random(group):
    """Processes round their copies alike."""
    for placement in PLACEMENTS:
        model = parallel(group, new_net().bfloat16())
        opt = SINGD(
            model,
            process_group=group,
            placement=placement,
            stochastic_rounding=True,
            factor_dtype=torch.bfloat16,
            **FAST,
        )
        for _ in trained(model, opt, **batch_of(group)):
            check_alike(values(model), group)
        assert opt.skipped == 0 and values(model).isfinite().all()


@case
def world(group):
    """The group of all processes, as it is given by torch."""
    equal_to_one("singd_dense", dist.group.WORLD, options={"interval": 2})


# -- errors ------------------------------------------------------------------------------------------


@case
def wrong_arguments(group):
    net = extend(new_net())
    raises(TypeError, "expected a torch.distributed.ProcessGroup", lambda: SINGD(net, process_group="x"))
    raises(TypeError, "expected a torch.distributed.ProcessGroup", lambda: KFAC(net, process_group=2))
    message = "placement='everywhere'; expected one of ('communication', 'memory')"
    raises(ValueError, message, lambda: SINGD(net, process_group=group, placement="everywhere"))
    raises(ValueError, message, lambda: SINGD(net, placement="everywhere"))
    opt = SINGD(net, process_group=group)
    message = "Pass process_group=torch.distributed.group.WORLD"
    model = DistributedDataParallel(net, process_group=group)
    raises(ValueError, message, lambda: SINGD(model))
    shards = sharded(group, new_net(attention=False))
    raises(ValueError, message, lambda: KFAC(shards.parameters()))
    message = "Pass process_group to the optimizer, and none to backpack(...)"
    raises(UnsupportedError, message, lambda: backpack(*opt.extensions(), process_group=group))


# -- running them ------------------------------------------------------------------------------------

# Which cases run on how many processes: those of a table take turns, as each takes a second.
EVERYWHERE = (
    *("singd_dense_unequal", "singd_dense_micro", "singd_dense_one_process", "work", "memory"),
    *("samples", "two_ways", "one_way", "sharded_to", "sharded_not"),
)
OF_FOUR = ("fewer_processes", "world")
RUNS = [
    (name, size)
    for k, name in enumerate(CASES)
    for size in SIZES
    if name.startswith(EVERYWHERE) or size == (4 if name in OF_FOUR else SIZES[k % 2])
]


def work(rank: int, world: int, path: str) -> None:
    """Run all cases, those of two processes on either pair in turn; note what went wrong."""
    global FOLDER
    FOLDER = path
    torch.set_num_threads(1)
    warnings.filterwarnings("error", ".*the model was not extended")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    # processes may start long after each other where others use the machine
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=2),
    )
    limit = timedelta(seconds=LIMIT)
    found: dict[str, str | None] = {}
    for k, (name, size) in enumerate(RUNS):
        first = k % (world // size) * size
        group = dist.new_group(list(range(first, first + size)), timeout=limit)
        found[f"{name} {size}"] = None
        try:
            if first <= rank < first + size:
                CASES[name](group)
        except Exception:
            found[f"{name} {size}"] = traceback.format_exc()
        torch.save(found, f"{path}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
