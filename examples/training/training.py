"""One training run: what is measured, and what is not."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from backpack_ext import backpack, extend
from examples.training.data import Batch
from examples.training.optimizers import OPTIMIZERS, Config, schedule
from examples.training.tasks import TASKS
from optim import CurvatureOptimizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A run is over when its validation loss is so many times that before the first step. At the end it has
# to be smaller than that.
LOST = 100.0


@dataclass(frozen=True)
class Run:
    """What is trained, and how; equal runs have equal results but for their seconds.

    Attributes:
        task: Name of the task.
        optimizer: Name of the optimizer.
        config: Its settings.
        seed: Of the data, the parameters and the order of the batches. All optimizers get the same.
        dtype: ``"float32"`` or ``"bfloat16"``, of parameters, inputs and what the optimizers
            keep in the parameters' type: all of AdamW and SGD, K and C, but not the momentum of ours.
        steps: Number of steps.
        evaluations: How many times the validation loss is measured.
    """

    task: str
    optimizer: str
    config: Config
    seed: int
    dtype: str
    steps: int
    evaluations: int


@dataclass
class Curve:
    """What came of a run; lists have an entry per evaluation.

    Attributes:
        steps: Steps taken.
        seconds: Time of all steps up to here: batch, passes, optimizer and schedule, no evaluation.
        train: Mean training loss of the steps since the evaluation before.
        loss: Validation loss.
        accuracy: Share of validation targets that are predicted.
        failure: How the run diverged; empty if it did not.
        skipped: Number of steps that the optimizer skipped, for values that are not finite.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    failure: str = ""
    skipped: int = 0

    @property
    def best(self) -> float:
        """The smallest validation loss; infinite if the run diverged."""
        return float("inf") if self.failure else min(self.loss)

    def as_dict(self) -> dict[str, Any]:
        """Return the entries, rounded for a file."""
        return {
            key: [float(f"{x:.5g}") for x in value]
            if key not in ("failure", "skipped", "steps")
            else value
            for key, value in asdict(self).items()
        }


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return the validation loss, of logits in float32, and the accuracy."""
    model.eval()
    logits = model(*batch.inputs).float()
    model.train()
    loss = F.cross_entropy(logits, batch.target)
    return float(loss), float((logits.argmax(1) == batch.target).float().mean())


def train(run: Run) -> Curve:
    """Train a network in this process, with one thread."""
    torch.set_num_threads(1)
    task, entry, dtype = TASKS[run.task], OPTIMIZERS[run.optimizer], DTYPES[run.dtype]
    data, validation = task.data(run.seed)
    held_out = validation[torch.arange(len(validation))].to(dtype)
    batches = data.batches(task.batch, run.seed)

    torch.manual_seed(run.seed)
    model = task.network().to(dtype)
    config = dict(run.config)
    shape = schedule(config.pop("schedule"), run.steps)
    opt = entry.make(model, config, task)
    scheduler = LambdaLR(opt, shape)
    loss_fn: nn.Module = nn.CrossEntropyLoss()
    if isinstance(opt, CurvatureOptimizer):
        extend(loss_fn)

    marks = {round(run.steps * (k + 1) / run.evaluations) for k in range(run.evaluations)}
    curve, seconds, losses = Curve(), 0.0, []
    first = evaluate(model, held_out)[0]
    for step in range(1, run.steps + 1):
        start = perf_counter()
        try:
            losses.append(iterate(model, loss_fn, opt, next(batches).to(dtype)))
        except torch.linalg.LinAlgError as error:
            curve.failure = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            break
        scheduler.step()
        seconds += perf_counter() - start
        if step not in marks:
            continue
        loss, accuracy = evaluate(model, held_out)
        if not isfinite(loss) or loss > (LOST if step < run.steps else 1.0) * first:
            curve.failure = f"validation loss {loss:.3g} at step {step}"
            break
        curve.steps.append(step)
        curve.seconds.append(seconds)
        curve.train.append(float(torch.stack(losses).float().mean()))
        curve.loss.append(loss)
        curve.accuracy.append(accuracy)
        losses = []
    curve.skipped = getattr(opt, "skipped", 0)
    return curve


def iterate(model: nn.Module, loss_fn: nn.Module, opt: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """Take one step; return the training loss before it."""
    opt.zero_grad()
    extensions = opt.extensions() if isinstance(opt, CurvatureOptimizer) else ()
    with ExitStack() as blocks:
        if extensions:
            blocks.enter_context(backpack(*extensions))
            blocks.enter_context(batch.sharing())
        loss = loss_fn(model(*batch.inputs), batch.target)
        loss.backward()
    opt.step()
    return loss.detach()
