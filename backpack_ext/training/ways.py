"""Ways of training: each runs one small problem and returns what it finds there.

A way gets a new problem in float64. What it returns has to be what a plain step finds in float64,
or it has to raise; a way that ends somewhere else returns what has to be found there as well.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backpack_ext.context import backpack
from backpack_ext.dataset import collect
from backpack_ext.extend import extend
from backpack_ext.lowrank_ggn import LowRankGGN
from backpack_ext.training.problems import CLASSES, Problem
from backpack_ext.training.quantities import Quantity, Results, dense, forget, gradients, kept, step

Found = Results | tuple[Results, Results]


class Elsewhere(Exception):
    """Says what does in place of a way."""


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        name: What it is called in the table.
        run: Returns what was found, and what should have been if that is not what a plain step finds.
        dtype: The precision that the network computes in.
        kernel: Whether it makes sense for `NTK`, which has a backward pass of its own.
        prepare: Changes a problem once for all quantities.
        some: Whether only some of the results are there.
    """

    name: str
    run: Callable[[Problem, Quantity], Found]
    dtype: torch.dtype = torch.float64
    kernel: bool = False
    prepare: Callable[[Problem], None] | None = field(default=None, compare=False)
    some: bool = False


WAYS: dict[str, Way] = {}


def way(name: str, **options: object) -> Callable[[Callable], Callable]:
    """Enter a function into the table."""

    def enter(run: Callable[[Problem, Quantity], Found]) -> Callable:
        WAYS[name] = Way(name, run, **options)
        return run

    return enter


# -- precision -------------------------------------------------------------------------------------


def _in(dtype: torch.dtype, problem: Problem, quantity: Quantity) -> Results:
    return step(problem.to(dtype), quantity)


for _name, _dtype in (
    ("float64", torch.float64),
    ("float32", torch.float32),
    ("bfloat16", torch.bfloat16),
):
    way(_name, dtype=_dtype, kernel=True)(partial(_in, _dtype))


def _scaled(problem: Problem, quantity: Quantity) -> Results:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found = step(problem, quantity, lambda z: scaler.scale(z).backward(), grad_scaler=scaler)
    return {k: v.float() / 2.0**10 if k.startswith("grad ") else v for k, v in found.items()}


@way("float16, GradScaler", dtype=torch.float16)
def _float16(problem: Problem, quantity: Quantity) -> Results:
    return _scaled(problem.to(torch.float16), quantity)


class _Autocast:
    """Calls a model under autocast."""

    def __init__(self, problem: Problem, dtype: torch.dtype):
        self.call, self.dtype = problem.to(torch.float32).model, dtype

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.call(x).float()


@way("autocast bfloat16, backward outside", dtype=torch.bfloat16, kernel=False)
def _autocast(problem: Problem, quantity: Quantity) -> Results:
    problem.call = _Autocast(problem, torch.bfloat16)
    return step(problem, quantity)


@way("autocast bfloat16, loss and backward inside", dtype=torch.bfloat16, kernel=True)
def _autocast_inside(problem: Problem, quantity: Quantity) -> Results:
    problem.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        return step(problem, quantity)


@way("autocast bfloat16 without its cache", dtype=torch.bfloat16, kernel=True)
def _autocast_uncached(problem: Problem, quantity: Quantity) -> Results:
    problem.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return step(problem, quantity)


@way("autocast float16, GradScaler", dtype=torch.float16)
def _autocast_scaled(problem: Problem, quantity: Quantity) -> Results:
    problem.call = _Autocast(problem, torch.float16)
    return _scaled(problem, quantity)


@way("``channels_last``", kernel=True)
def _channels_last(problem: Problem, quantity: Quantity) -> Results:
    problem.model.to(memory_format=torch.channels_last)
    if problem.x.dim() == 4:
        problem.x = problem.x.to(memory_format=torch.channels_last)
    return step(problem, quantity)


# -- batches ---------------------------------------------------------------------------------------

PARTS = (slice(0, 3), slice(3, 6))


@way("accumulation, ``loss / k``, results added (per datum: ``cat``)")
def _accumulate(problem: Problem, quantity: Quantity) -> Results:
    if quantity.join is None:
        raise Elsewhere("``collect``")
    ext, parts = quantity.extension(), []
    for rows in PARTS:
        with backpack(ext):
            (problem.loss(rows) / len(PARTS)).backward()
        parts.append(kept(ext, problem.model))
    return dense({k: quantity.join([part[k] for part in parts]) for k in parts[0]}) | gradients(
        problem.model
    )


@way("``dataset.collect`` over micro batches", some=True)
def _collect(problem: Problem, quantity: Quantity) -> Results:
    ext = quantity.extension()

    def forward(model: nn.Module, loss_fn: nn.Module, rows: slice) -> Tensor:
        return problem.loss(rows)

    found = collect(problem.model, problem.loss_fn, PARTS, ext, forward=forward, progress=False)
    found = found[ext.savefield]
    if isinstance(ext, LowRankGGN):
        found = {"": next(iter(found.values()))}
    return dense(found)


# -- the forward pass ------------------------------------------------------------------------------


def _checkpointed(reentrant: bool, problem: Problem, quantity: Quantity) -> Results:
    problem.model.around = partial(checkpoint, use_reentrant=reentrant)
    return step(problem, quantity)


way("activation checkpointing, ``use_reentrant=False``", kernel=True)(partial(_checkpointed, False))
way("activation checkpointing, ``use_reentrant=True``", kernel=True)(partial(_checkpointed, True))


@way("dropout in a checkpoint, ``use_reentrant=False``")
def _dropout(problem: Problem, quantity: Quantity) -> Found:
    found = []
    problem.model.train()
    problem.model.drop.p = 0.0
    for how in (None, partial(checkpoint, use_reentrant=False)):
        problem.model.around = _Dropped(how)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            found.append(step(problem, quantity))
    return found[1], found[0]


class _Dropped:
    """Calls a module and dropout, in a checkpoint maybe."""

    def __init__(self, how: Callable | None):
        self.how = how

    def __call__(self, body: nn.Module, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return nn.functional.dropout(body(x))

        return run(x) if self.how is None else self.how(run, x)


@way("activations offloaded (``save_on_cpu``)", kernel=True)
def _offloaded(problem: Problem, quantity: Quantity) -> Results:
    with torch.autograd.graph.save_on_cpu():
        return step(problem, quantity)


def _compile_first(options: dict, problem: Problem) -> None:
    problem.call = extend(torch.compile(problem.model, **options))


def _extend_first(options: dict, problem: Problem) -> None:
    problem.call = torch.compile(problem.model, **options)


def _compile_part(options: dict, problem: Problem) -> None:
    problem.model.body.compile(**options)


_ORDERS = {
    "before ``extend``": _compile_first,
    "after ``extend``": _extend_first,
    "of a part": _compile_part,
}


def _compiled(donated: bool, problem: Problem, quantity: Quantity) -> Results:
    # what is compiled for one model must not count for the next
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 2**10}
    with torch._dynamo.config.patch(limits):
        if donated:
            return step(problem, quantity)
        with torch._functorch.config.patch(donated_buffer=False):
            return step(problem, quantity)


for _order, _prepare in _ORDERS.items():
    way(
        f"``torch.compile`` {_order}, backend eager",
        kernel=True,
        prepare=partial(_prepare, {"backend": "eager"}),
    )(partial(_compiled, True))
    way(
        f"``torch.compile`` {_order}, backend aot_eager, "
        "``torch._functorch.config.donated_buffer = False``",
        kernel=True,
        prepare=partial(_prepare, {"backend": "aot_eager", "dynamic": True}),
    )(partial(_compiled, False))
way(
    "``torch.compile``, backend aot_eager, dynamic shapes, donated buffers",
    kernel=True,
    prepare=partial(_extend_first, {"backend": "aot_eager", "dynamic": True}),
)(partial(_compiled, True))


@way("``functional_call`` with Parameters")
def _functional(problem: Problem, quantity: Quantity) -> Results:
    return _functional_call(problem, quantity, lambda p: nn.Parameter(p.detach().clone()))


@way("``functional_call`` with tensors")
def _functional_tensors(problem: Problem, quantity: Quantity) -> Results:
    return _functional_call(problem, quantity, lambda p: p.detach().clone().requires_grad_())


@way("``functional_call`` with computed tensors")
def _functional_computed(problem: Problem, quantity: Quantity) -> Results:
    return _functional_call(problem, quantity, lambda p: 1.0 * p)


def _functional_call(problem: Problem, quantity: Quantity, make: Callable[[Tensor], Tensor]) -> Results:
    given = {name: make(p) for name, p in problem.model.named_parameters()}
    for t in given.values():
        if not t.is_leaf:
            t.retain_grad()
    problem.call = partial(_with, problem.model, given)
    ext = quantity.extension()
    with backpack(ext):
        problem.loss().backward()
    found = kept(ext, problem.model)  # on what the tensors were computed from
    found |= {name: getattr(t, ext.savefield) for name, t in given.items() if hasattr(t, ext.savefield)}
    grads = {f"grad {k}": t.grad for k, t in given.items()}
    if isinstance(ext, LowRankGGN) and found:  # whose parameters come in another order
        block = next(iter(found.values()))
        return {"": _ordered(block.to_dense(), ext, list(given.values()))} | grads
    return dense(found) | grads


def _ordered(matrix: Tensor, ext: LowRankGGN, wanted: list[Tensor]) -> Tensor:
    """Bring the rows and columns of all parameters together into another order."""
    (own,) = ext._parameters.values()
    places, start = {}, 0
    for p in own:
        places[id(p)] = torch.arange(start, start + p.numel())
        start += p.numel()
    order = torch.cat([places[id(p)] for p in wanted])
    return matrix[order][:, order]


def _with(model: nn.Module, given: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(model, given, (x,))


# -- what is trained -------------------------------------------------------------------------------


def _only(problem: Problem, prefix: str) -> None:
    for name, p in problem.model.named_parameters():
        p.requires_grad_(name.startswith(prefix))


def _part(results: Results, *prefixes: str) -> Results:
    return {k: v for k, v in results.items() if k.removeprefix("grad ").startswith(prefixes)}


def _whole(quantity: Quantity) -> bool:
    """Whether results are of all trained parameters together."""
    return quantity.name in ("LowRankGGN", "NTK")


@way("frozen parameters", kernel=True)
def _frozen(problem: Problem, quantity: Quantity) -> Found:
    everything = step(problem, quantity)
    _only(problem, "body")
    found = step(problem, quantity)
    if not _whole(quantity):
        return found, _part(everything, "body")
    other = copy.deepcopy(problem)  # a plain one, frozen from the start
    extend(other.model)
    return found, step(other, quantity)


@way("``requires_grad_`` changed between steps", kernel=True)
def _toggled(problem: Problem, quantity: Quantity) -> Results:
    step(problem, quantity)
    for prefix in ("body", "head", "stem", ""):
        _only(problem, prefix)
        found = step(problem, quantity)
    return found


@way("layers added after ``extend``", kernel=True)
def _added(problem: Problem, quantity: Quantity) -> Found:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        added = nn.Sequential(nn.Tanh(), nn.Linear(CLASSES, CLASSES)).double()
    problem.model.head = nn.Sequential(problem.model.head, added)
    found = step(problem, quantity)
    extend(problem.model)
    return found, step(problem, quantity)


@way("``train()`` and ``eval()`` in between", kernel=True)
def _modes(problem: Problem, quantity: Quantity) -> Results:
    problem.model.train()
    with torch.random.fork_rng(devices=[]):
        step(problem, quantity)
    problem.model.eval()
    return step(problem, quantity)


# -- the backward pass -----------------------------------------------------------------------------


@way("``backward(inputs=...)``: for these", some=True)
def _inputs(problem: Problem, quantity: Quantity) -> Found:
    found = step(problem, quantity, lambda z: z.backward(inputs=list(problem.model.body.parameters())))
    missing = [name for name, _ in problem.model.named_parameters() if name.startswith("body")]
    if not _whole(quantity) and not set(missing) <= set(found):
        raise LookupError(f"nothing for {missing}")
    return found


@way("several backward passes over one graph (``retain_graph``)")
def _retained(problem: Problem, quantity: Quantity) -> Results:
    loss = problem.loss()
    for last in (False, False, True):
        ext = quantity.extension()
        forget(problem.model, ext)
        with backpack(ext):
            loss.backward(retain_graph=not last)
    return dense(kept(ext, problem.model)) | gradients(problem.model)


@way("``torch.autograd.grad``")
def _grad(problem: Problem, quantity: Quantity) -> Results:
    names = [name for name, _ in problem.model.named_parameters()]
    grads: dict[str, Tensor] = {}

    def backward(loss: Tensor) -> None:
        found = torch.autograd.grad(loss, list(problem.model.parameters()))
        grads.update((f"grad {k}", g) for k, g in zip(names, found, strict=True))

    return step(problem, quantity, backward) | grads


@way("``create_graph=True``")
def _double(problem: Problem, quantity: Quantity) -> Results:
    def backward(loss: Tensor) -> None:
        params = list(problem.model.parameters())
        grads = torch.autograd.grad(loss, params, create_graph=True)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.detach()

    return step(problem, quantity, backward)


@way("anomaly detection")
def _anomaly(problem: Problem, quantity: Quantity) -> Results:
    with torch.autograd.set_detect_anomaly(True):
        return step(problem, quantity)


@way("forward outside of the block")
def _forward_outside(problem: Problem, quantity: Quantity) -> Results:
    loss, ext = problem.loss(), quantity.extension()
    with backpack(ext):
        loss.backward()
    return dense(kept(ext, problem.model)) | gradients(problem.model)


@way("backward outside of the block")
def _backward_outside(problem: Problem, quantity: Quantity) -> Results:
    ext = quantity.extension()
    with backpack(ext):
        loss = problem.loss()
    loss.backward()
    return dense(kept(ext, problem.model)) | gradients(problem.model)


@way("evaluation between forward and backward (``no_grad``, ``inference_mode``)")
def _evaluation(problem: Problem, quantity: Quantity) -> Results:
    ext = quantity.extension()
    with backpack(ext):
        loss = problem.loss()
        with torch.no_grad():
            problem.loss(PARTS[0])
        with torch.inference_mode():
            problem.loss(PARTS[0])
        loss.backward()
    return dense(kept(ext, problem.model)) | gradients(problem.model)


# -- a loop ----------------------------------------------------------------------------------------


def _plain(problem: Problem, quantity: Quantity) -> Results:
    """Return what a model finds that has taken no step: a new one with the same parameters."""
    from backpack_ext.training.problems import problem as new

    other = new(problem.name)
    other.model.load_state_dict(problem.model.state_dict())
    return step(other, quantity)


def _loop(problem: Problem, quantity: Quantity, set_to_none: bool) -> Found:
    opt = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    ext = quantity.extension()
    for _ in range(3):
        opt.zero_grad(set_to_none)
        with backpack(ext):
            problem.loss().backward()
        opt.step()
    opt.zero_grad(set_to_none)
    fresh = quantity.extension()
    with backpack(fresh):
        problem.loss().backward()
    found = dense(kept(fresh, problem.model)) | gradients(problem.model)
    return found, _plain(problem, quantity)


way("optimizer steps, ``zero_grad(set_to_none=True)``")(partial(_loop, set_to_none=True))
way("optimizer steps, ``zero_grad(set_to_none=False)``")(partial(_loop, set_to_none=False))


@way("optimizer step between forward and backward")
def _stale(problem: Problem, quantity: Quantity) -> Results:
    opt, ext = torch.optim.SGD(problem.model.parameters(), lr=0.1), quantity.extension()
    problem.loss().backward()
    with backpack(ext):
        loss = problem.loss()
        opt.step()
        loss.backward()
    return dense(kept(ext, problem.model))


@way("optimizer steps inside of the backward pass (``register_post_accumulate_grad_hook``)")
def _fused(problem: Problem, quantity: Quantity) -> Results:
    grads: Results = {}

    def update(name: str, p: nn.Parameter) -> None:
        grads[f"grad {name}"] = p.grad.clone()
        torch.optim.SGD([p], lr=0.1).step()

    for name, p in problem.model.named_parameters():
        p.register_post_accumulate_grad_hook(partial(update, name))
    return step(problem, quantity) | grads


@way("a closure that is called several times")
def _closure(problem: Problem, quantity: Quantity) -> Found:
    opt = torch.optim.LBFGS(problem.model.parameters(), lr=0.1, max_iter=3)
    extensions = []

    def closure() -> Tensor:
        opt.zero_grad()
        extensions.append(quantity.extension())
        with backpack(extensions[-1]):
            loss = problem.loss()
            loss.backward()
        at.update(copy.deepcopy(problem.model.state_dict()))
        return loss

    at: dict[str, Tensor] = {}
    opt.step(closure)
    found = dense(kept(extensions[-1], problem.model)) | gradients(problem.model)
    problem.model.load_state_dict(at)
    return found, _plain(problem, quantity)


@way("a model copied by ``deepcopy`` in training", kernel=True)
def _copied(problem: Problem, quantity: Quantity) -> Results:
    step(problem, quantity)
    other = copy.deepcopy(problem)
    other.call = other.model
    return step(other, quantity)


@way("a model and loss pickled in training", kernel=True)
def _pickled(problem: Problem, quantity: Quantity) -> Results:
    step(problem, quantity)
    for p in problem.model.parameters():  # results are not pickled with a parameter
        p.grad = None
    problem.model = problem.call = pickle.loads(pickle.dumps(problem.model))
    problem.loss_fn = pickle.loads(pickle.dumps(problem.loss_fn))
    return step(problem, quantity)
