"""What several processes do in `test_data_parallel.py`: each case runs on every process of a group."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch
from backpack import extensions as backpack_extensions
from models import CASES as PROBLEMS
from models import Problem
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from backpack_ext import (
    BL89,
    EKFAC,
    KFAC,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    Extension,
    HesScale,
    LowRankGGN,
    ProcessGroupError,
    RecordingError,
    SumGradSquared,
    UnsupportedError,
    Variance,
    attach_diagonal,
    backpack,
    extend,
    unextend,
)
from backpack_ext.dataset import collect
from backpack_ext.loss_call import LossCall
from backpack_ext.processes import Processes

# Networks of four kinds; char_gpt has tied weights and ignored targets, cnn class weights.
NETS = ("mlp", "mlp_bce", "cnn", "vit_params", "char_gpt")
# Data of each process, by their number: unequal.
SHARES = {2: (2, 7), 4: (1, 4, 2, 2)}
# float64 sums in another order
TOLERANCE = 1e-9
LIMIT = 20.0

CASES: dict[str, Callable[[dist.ProcessGroup], None]] = {}


def case(run: Callable[[dist.ProcessGroup], None]) -> Callable[[dist.ProcessGroup], None]:
    """Register a case under its own name."""
    CASES[run.__name__] = run
    return run


def problem_of(name: str, reduction: str = "mean") -> Problem:
    """Return a problem with nine data; all processes make the same."""
    parts = [PROBLEMS[name](seed, reduction=reduction) for seed in range(3)]
    whole = parts[0]
    rows = len(whole.target) // whole.batch_size  # of the target, per datum
    whole.inputs = (torch.cat([p.inputs[0] for p in parts])[:9],)
    whole.target = torch.cat([p.target for p in parts])[: 9 * rows]
    return whole


def own_data(problem: Problem, group: dist.ProcessGroup) -> slice:
    """Cut a problem down to the data of this process; return which these are."""
    shares, rank = SHARES[dist.get_world_size(group)], dist.get_rank(group)
    start = sum(shares[:rank])
    mine = slice(start, start + shares[rank])
    target = problem.target.reshape(problem.batch_size, -1, *problem.target.shape[1:])[mine]
    problem.target = target.flatten(0, 1)
    problem.inputs = (problem.inputs[0][mine],)
    return mine


def factors() -> list[Extension]:
    return [
        KFAC("expand", "exact", savefield="expanded"),
        KFAC("reduce", "exact", bias="separate", savefield="reduce", norm="diagonal"),
        KFAC("reduce", "mc", savefield="sampled"),
        KFAC("expand", "empirical", savefield="empirical"),
        KFAC("reduce", "forward", savefield="forward"),
    ]


def sums() -> list[Extension]:
    return [DiagGGN(), DiagGGN("mc"), SumGradSquared(), Variance(), HesScale(), BL89()]


def per_datum() -> list[Extension]:
    return [BatchGrad(), BatchL2Grad(), HesScale(batch=True)]


def run(problem: Problem, exts: list[Extension], model: nn.Module | None = None, **options) -> None:
    """Run one backward pass."""
    model = problem.model if model is None else model
    extend(problem.loss_fn)
    with backpack(*exts, **options):
        problem.loss_fn(problem.readout(model(*problem.inputs)), problem.target).backward()


def dense(value) -> Tensor:
    return value if isinstance(value, Tensor) else value.to_dense()


def results(model: nn.Module, exts: list[Extension]) -> dict[tuple[str, str], Tensor]:
    found = {}
    for name, p in model.named_parameters():
        for ext in exts:
            found[name, ext.savefield] = dense(getattr(p, ext.savefield))
    return found


def compare(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        size = value.abs().max().item()
        error = (found[key] - value).abs().max().item()
        assert error <= TOLERANCE * max(size, 1e-6), (key, error, size)


def sample_rows(call: LossCall, generator: torch.Generator) -> Tensor:
    """Stand in for random samples: a function of each row alone, so that it can be had in any batch."""
    return (9 * call.z).sin()


# -- values ----------------------------------------------------------------------------------------


def values(net: str, reduction: str, group: dist.ProcessGroup) -> None:
    LossCall.sample, saved = sample_rows, LossCall.sample
    try:
        tied = net == "char_gpt"
        summed = [*factors(), *sums()]
        if not tied:
            summed.append(KFAC("expand", "exact", bias="joint", savefield="joint"))
        whole = problem_of(net, reduction)
        run(whole, summed + per_datum(), extend(whole.model))
        own = problem_of(net, reduction)
        mine = own_data(own, group)
        run(own, summed + per_datum(), extend(own.model), process_group=group, timeout=LIMIT)
        compare(results(own.model, summed), results(whole.model, summed))
        expected = results(whole.model, per_datum())
        compare(results(own.model, per_datum()), {key: v[mine] for key, v in expected.items()})
        for p, q in zip(own.model.parameters(), whole.model.parameters(), strict=True):
            assert getattr(p.expanded, "rows", None) == getattr(q.expanded, "rows", None)
        if not tied:  # eigenvalues in the bases of all processes
            for problem, options in ((whole, {}), (own, {"process_group": group, "timeout": LIMIT})):
                pairs = zip(problem.model.parameters(), whole.model.parameters(), strict=True)
                basis = {p: q.expanded for p, q in pairs}  # where eigenvalues repeat there are others
                run(problem, [EKFAC(fisher="exact", basis=basis)], **options)
            names = [n for n, _ in own.model.named_parameters()]
            found, expected = (results(p.model, [EKFAC()]) for p in (own, whole))
            assert len(names) == len(found)
            compare(found, expected)
    finally:
        LossCall.sample = saved


for net in NETS:
    for reduction in ("mean", "sum"):
        CASES[f"values_{net}_{reduction}"] = lambda group, net=net, reduction=reduction: values(
            net, reduction, group
        )


@case
def samples_differ_between_processes(group):
    """Processes that are seeded alike draw different samples of the same data."""
    torch.manual_seed(0)
    problem = problem_of("mlp", "sum")
    extend(problem.model), extend(problem.loss_fn)
    alone, together = DiagGGN("mc"), DiagGGN("mc")
    together._order = alone._order
    run(problem, [alone])
    expected = results(problem.model, [alone])
    run(problem, [together], process_group=group, timeout=LIMIT)
    size = dist.get_world_size(group)
    for key, value in results(problem.model, [together]).items():
        assert not torch.allclose(value, size * expected[key])


@case
def half_precision_sums(group):
    problem = problem_of("mlp").to(torch.bfloat16)
    whole = problem_of("mlp").to(torch.bfloat16).to(torch.float64)
    run(whole, [DiagGGN()], extend(whole.model))
    own_data(problem, group)
    run(problem, [DiagGGN()], extend(problem.model), process_group=group, timeout=LIMIT)
    for p, q in zip(problem.model.parameters(), whole.model.parameters(), strict=True):
        assert p.diag_ggn_exact.dtype == torch.float32
        expected = q.diag_ggn_exact
        # 2^-8 per rounding; logits of a few units lose a few of them
        assert (p.diag_ggn_exact - expected).abs().max() < 0.05 * expected.abs().max()


# -- processes that do not do the same ---------------------------------------------------------------


class Experts(nn.Module):
    """A choice between two experts, and a norm: one is skipped by each process."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))])
        self.choice = 0

    def forward(self, x):
        return self.experts[self.choice](torch.tanh(self.body(x)))


@case
def skipped_modules(group):
    """Each process uses one expert; all end with the factors of both."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    model, loss_fn = Experts().double(), nn.CrossEntropyLoss()
    counts = SHARES[size]
    data = [(torch.randn(n, 4).double(), torch.randint(3, (n,)), k % 2) for k, n in enumerate(counts)]

    def forward(model, loss_fn, batch):
        x, y, model.choice = batch
        return loss_fn(model(x), y)

    exts = [KFAC(fisher="exact"), KFAC(fisher="forward", savefield="f"), DiagGGN(), Variance(), BL89()]
    extend(model), extend(loss_fn)
    found = collect(model, loss_fn, data, *exts, forward=forward, progress=False)
    expected = {(name, f): dense(v) for f, named in found.items() for name, v in named.items()}
    messages: list[int] = []
    send = Processes._all_reduce
    Processes._all_reduce = lambda self, m, stage: (messages.append(len(m)), send(self, m, stage))[1]
    try:
        for _ in range(2):
            messages.clear()
            for p in model.parameters():
                for ext in exts:
                    p.__dict__.pop(ext.savefield, None)
            with backpack(*exts, process_group=group, timeout=LIMIT):
                forward(model, loss_fn, data[rank]).backward()
            compare(results(model, exts), expected)
    finally:
        Processes._all_reduce = send
    # the second time it is known what the others have: an agreement, then values and counts
    assert messages == [1, 2]


@case
def a_model_without_a_common_parameter(group):
    model = extend(nn.Sequential(*[nn.Linear(3, 3) for _ in range(1 + dist.get_rank(group))]))
    loss_fn = extend(nn.MSELoss())
    x = torch.ones(2, 3)
    refused("has results for the parameter", group, lambda: loss_fn(model(x), x), [DiagGGN()])


@case
def other_shapes(group):
    model = extend(nn.Sequential(nn.Linear(3, 3 + dist.get_rank(group)), nn.ReLU()))
    loss_fn, x = extend(nn.MSELoss()), torch.ones(2, 3)
    refused("other shapes", group, lambda: loss_fn(model(x), model(x).detach() + 1), [DiagGGN()])


@case
def other_options(group):
    """What differs without other shapes or names."""
    problem = problem_of("mlp")
    extend(problem.model), extend(problem.loss_fn)
    rank = dist.get_rank(group)
    for ext, option in (
        (KFAC("reduce" if rank else "expand", "empirical"), "approx"),
        (KFAC(fisher="exact" if rank else "empirical"), "fisher"),
        (DiagGGN("mc", mc_samples=1 + rank), "vectors"),
        (HesScale(gauss_newton=rank > 0, savefield="hesscale"), "gauss_newton"),
    ):
        refused(option, group, problem.loss, [ext])


@case
def frozen_on_one_process(group):
    problem = problem_of("mlp")
    extend(problem.model), extend(problem.loss_fn)
    next(problem.model.parameters()).requires_grad_(dist.get_rank(group) > 0)
    refused("is frozen on rank 0", group, problem.loss, [DiagGGN()])


@case
def other_extensions(group):
    ext = DiagGGN() if dist.get_rank(group) else SumGradSquared()
    model, loss_fn, x = extend(nn.Linear(3, 3)), extend(nn.MSELoss()), torch.ones(2, 3)
    refused("the same extensions", group, lambda: loss_fn(model(x), x), [ext])


@case
def other_reductions(group):
    loss_fn = extend(nn.MSELoss(reduction="sum" if dist.get_rank(group) else "mean"))
    model, x = extend(nn.Linear(3, 3)), torch.ones(2, 3)
    refused("losses of different reductions", group, lambda: loss_fn(model(x), x), [DiagGGN()])


@case
def other_bases(group):
    problem = problem_of("mlp")
    run(problem, [KFAC(fisher="exact")], extend(problem.model))
    shift = 1.0 + dist.get_rank(group)
    basis = {}
    for p in problem.model.parameters():
        B, A = p.kfac
        tilt = torch.diag(torch.linspace(0.0, shift, len(B)).to(B))
        basis[p] = type(p.kfac)(B + tilt, A, p.kfac.axes)
    ext = EKFAC(basis=basis)
    refused("different eigenbases", group, problem.loss, [ext], kind=ValueError)


def refused(message, group, loss, exts, kind=(ProcessGroupError, UnsupportedError)):
    """Check that a pass raises, where it has to."""
    try:
        with backpack(*exts, process_group=group, timeout=LIMIT):
            loss().backward()
    except kind as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError("nothing was raised")


# -- failures ----------------------------------------------------------------------------------------


def fails(kind: str, group: dist.ProcessGroup) -> None:
    """Have the last process fail: all others raise within the time limit."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    problem = problem_of("mlp")
    own_data(problem, group)
    if kind == "forward" and last:
        problem.model.register_forward_hook(raise_error)
    if kind == "backward" and last:
        problem.model[2].register_full_backward_hook(raise_error)
    start = time.time()
    try:
        if kind != "absent" or not last:
            exts = [KFAC(), DiagGGN()]
            run(problem, exts, extend(problem.model), process_group=group, timeout=1.0)
    except (ProcessGroupError, ArithmeticError) as error:
        assert isinstance(error, ArithmeticError) == last, error
        if not last:
            assert "Another process probably failed" in str(error)
            assert "agreeing on what is to be summed" in str(error)
    else:
        assert kind == "absent" and last
    assert time.time() - start < 10


def raise_error(*args):
    raise ArithmeticError("this process fails")


for kind in ("forward", "backward", "absent"):
    CASES[f"fails_{kind}"] = lambda group, kind=kind: fails(kind, group)


@case
def steps_that_were_missed(group):
    """A process that failed and goes on meets others that wait for its last step."""
    rank = dist.get_rank(group)
    problem = problem_of("mlp")
    extend(problem.model)
    try:
        for step in range(2):
            with backpack(DiagGGN(), process_group=group, timeout=LIMIT):
                if rank == 0 and step == 0:
                    continue
                extend(problem.loss_fn)(problem.forward(), problem.target).backward()
    except ProcessGroupError as error:
        assert "are in different steps" in str(error)
    else:
        raise AssertionError("nothing was raised")


@case
def not_a_number(group):
    """It arrives everywhere, and nobody waits."""
    problem = problem_of("mlp")
    if dist.get_rank(group) == 0:
        problem.inputs[0][0, 0] = float("nan")
    run(problem, [DiagGGN()], extend(problem.model), process_group=group, timeout=LIMIT)
    assert all(p.diag_ggn_exact.isnan().any() for p in problem.model.parameters())


# -- errors ------------------------------------------------------------------------------------------


@case
def errors_before_the_pass(group):
    for exts, message in (
        ([BatchDotGrad()], "gather the gradients"),
        ([LowRankGGN()], "KFAC or DiagGGN over processes"),
        ([EKFAC()], "run KFAC with process_group, then EKFAC"),
        ([backpack_extensions.DiagGGNExact()], "an extension of BackPACK's"),
    ):
        try:
            backpack(*exts, process_group=group)
        except UnsupportedError as error:
            assert message in str(error), str(error)
        else:
            raise AssertionError(f"{exts}: nothing was raised")
    for options, kind in (({"process_group": "all"}, TypeError), ({"timeout": 0}, ValueError)):
        try:
            backpack(DiagGGN(), **{"process_group": group, **options})
        except kind:
            pass
        else:
            raise AssertionError(f"{options}: nothing was raised")


@case
def a_loss_that_is_not_known(group):
    model, x = extend(nn.Linear(3, 3)), torch.ones(2, 3)
    kind = RecordingError
    refused("needs the loss", group, lambda: model(x).square().sum(), [SumGradSquared()], kind=kind)

    def attached():
        z = model(x)
        return attach_diagonal(z, torch.ones_like(z), z.square().sum() / 2)

    refused("more of a loss than attach_diagonal", group, attached, [HesScale()], kind=kind)


@case
def losses_of_different_scale(group):
    model, loss_fn, x = extend(nn.Linear(3, 3)), extend(nn.MSELoss()), torch.ones(4, 3)

    def total():
        z = model(x)
        return loss_fn(z, x) + 2 * loss_fn(z, x + 1)

    refused("divides by the scale of the loss", group, total, [DiagGGN()])


@case
def a_parameter_without_a_module(group):
    w = nn.Parameter(torch.ones(3, 3))
    model, loss_fn, x = extend(nn.Linear(3, 3)), extend(nn.MSELoss()), torch.ones(4, 3)
    refused("belongs to no extended module", group, lambda: loss_fn(model(x) @ w, x), [DiagGGN()])


# -- DistributedDataParallel -------------------------------------------------------------------------


def wrapped(net: str, outside: bool, group: dist.ProcessGroup, **options) -> None:
    exts = [KFAC("reduce", "exact"), DiagGGN(), SumGradSquared(), HesScale()]
    whole = problem_of(net, "sum")
    run(whole, exts, extend(whole.model))
    own = problem_of(net, "sum")
    own_data(own, group)
    size = dist.get_world_size(group)
    model = own.model if outside else extend(own.model)
    model = DistributedDataParallel(model, process_group=group, **options)
    if outside:
        extend(model)
    for step in range(3):
        wait = step == 0 and "static_graph" not in options  # gradients of the second step add up
        with model.no_sync() if wait else nullcontext():
            run(own, exts, model, process_group=group, timeout=LIMIT)
        compare(results(own.model, exts), results(whole.model, exts))
        if step == 2 or wait:
            continue
        steps = 2 if "static_graph" not in options else 1
        for p, q in zip(own.model.parameters(), whole.model.parameters(), strict=True):
            assert (p.grad - steps * q.grad / size).abs().max() < 1e-9 * q.grad.abs().max()
        model.zero_grad()


for place in ("inside", "outside"):
    for net, options in (
        ("mlp", {}),
        ("cnn", {"gradient_as_bucket_view": True}),
        ("vit_params", {"find_unused_parameters": True}),
        ("char_gpt", {"static_graph": True}),
    ):
        CASES[f"wrapped_{place}_{net}"] = lambda group, net=net, place=place, options=options: wrapped(
            net, place == "outside", group, **options
        )


@case
def wrapped_and_unwrapped_names(group):
    """A process that wraps its model agrees with one that does not."""
    problem = problem_of("mlp")
    own_data(problem, group)
    model = extend(problem.model)
    if dist.get_rank(group):
        unextend(model)
        model = extend(nn.Sequential())
        model.module = problem.model
        model.forward = problem.model.forward
    run(problem, [DiagGGN()], model, process_group=group, timeout=LIMIT)
    whole = problem_of("mlp")
    run(whole, [DiagGGN()], extend(whole.model))
    compare(results(problem.model, [DiagGGN()]), results(whole.model, [DiagGGN()]))


# -- sharded parameters ------------------------------------------------------------------------------


def gradients_only() -> list[Extension]:
    return [
        KFAC("expand", "empirical"),
        KFAC("reduce", "empirical", savefield="reduced"),
        KFAC("expand", "forward", savefield="forward"),
        SumGradSquared(),
        Variance(),
        BatchGrad(),
        BatchL2Grad(),
    ]


def sharded(net: str, children: bool, group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    summed, listed = gradients_only()[:-2], gradients_only()[-2:]
    whole, own = problem_of(net), problem_of(net)
    run(whole, summed + listed, extend(whole.model))
    mine = own_data(own, group)
    extend(own.model)
    if children:
        for child in own.model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
    fully_shard(own.model, mesh=mesh)
    for _ in range(2):  # the second pass finds what the first has made
        run(own, summed + listed, process_group=group, timeout=LIMIT)
    compare(results(own.model, summed), results(whole.model, summed))
    expected = {key: value[mine] for key, value in results(whole.model, listed).items()}
    compare(results(own.model, listed), expected)


for net, children in (("mlp", True), ("cnn", True), ("cnn", False), ("vit", True), ("char_gpt", False)):
    CASES[f"sharded_{net}_{children}"] = lambda group, net=net, children=children: sharded(
        net, children, group
    )


@case
def sharded_parameters_without_sweeps(group):
    for net, ext, message in (
        ("mlp", DiagGGN("mc"), 'DiagGGN with fisher="mc" sends vectors through the graph'),
        ("mlp", KFAC(fisher="exact"), 'KFAC with fisher="exact" sends vectors through the graph'),
        ("mlp", HesScale(), "HesScale sends vectors through the graph"),
        ("vit_params", BatchGrad(), "which leaves only layers with a rule"),
    ):
        problem = problem_of(net)
        own_data(problem, group)
        fully_shard(problem.model, mesh=DeviceMesh.from_group(group, "cpu"))
        extend(problem.model), extend(problem.loss_fn)
        refused(message, group, problem.loss, [ext])


# -- running them ------------------------------------------------------------------------------------


def work(rank: int, world: int, store: str, out: str) -> None:
    """Run all cases, those of two processes on two pairs at once; note what went wrong."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit
    )
    found: dict[str, str | None] = {}
    for name, run_case in CASES.items():
        for size in (2, 4):
            groups = [dist.new_group(list(range(k, k + size))) for k in range(0, world, size)]
            try:
                run_case(groups[rank // size])
                found[f"{name} {size}"] = None
            except Exception:
                found[f"{name} {size}"] = traceback.format_exc()
            torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
