"""Actor-critic learning with AdaHesScale, with and without step-size scaling, at several step sizes.

Advantage actor-critic (A2C) on a classic control task of gymnasium, nothing to download: policy and
value are networks of two layers of 64 tanh units, eight environments take eight steps each between
updates. Every update is one backward pass of three losses, whose Hessian diagonals come from
``backpack_ext.policy``. Step-size scaling, ``optim.HesScaleStep``, shortens a step if the diagonal
predicts too large a change.

Run it with ``python examples/actor_critic.py --out out``; a minute and a half on two cores.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import gymnasium
import numpy as np
import torch
from digits_plots import BLUE, RED, STYLE
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm.auto import tqdm

from backpack_ext import backpack, extend, policy
from optim import AdaHesScale, HesScaleStep

OPTIMIZERS = ("Adam", "AdaHesScale", "AdaHesScale, scaled")
COLORS = ("0.5", RED, BLUE)
ENVIRONMENTS, LENGTH = 8, 8  # environments, and their steps between updates
GAMMA, LAMBDA = 0.99, 0.95  # discount, and decay of generalized advantage estimates
POINTS = 30  # of a learning curve
FIRST_SEED = 100  # the defaults were chosen by runs with smaller ones


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        environment: A name known to gymnasium, with a discrete set of actions.
        optimizer: One of ``OPTIMIZERS``.
        lr: Its step size.
        delta: Bound on the predicted second-order change of the loss, for step-size scaling.
        seed: Of networks, actions and environments.
        steps: Steps of the environments, all together.
    """

    environment: str
    optimizer: str
    lr: float
    delta: float
    seed: int
    steps: int


def network(inputs: int, outputs: int) -> nn.Module:
    """Return two hidden layers of 64 tanh units; small outputs at first."""
    last = nn.Linear(64, outputs)
    nn.init.normal_(last.weight, std=0.01)
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), last)


class Environments:
    """Several environments side by side, which start anew when an episode ends.

    Args:
        name: Known to gymnasium.
        seed: Of the first.
    """

    def __init__(self, name: str, seed: int):
        self.all = [gymnasium.make(name) for _ in range(ENVIRONMENTS)]
        first = [env.reset(seed=1000 * seed + i)[0] for i, env in enumerate(self.all)]
        self.states = torch.tensor(np.stack(first))
        self.totals = [0.0] * ENVIRONMENTS
        self.returns: list[float] = []  # of the episodes that ended

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take one step in each.

        Returns:
            Rewards; the states that were reached, before a new start; whether they are final; and
            whether an episode ended there, by a time limit perhaps.
        """
        rewards, reached, final, ended, states = [], [], [], [], []
        for i, (env, action) in enumerate(zip(self.all, actions.tolist(), strict=True)):
            state, reward, terminated, truncated, _ = env.step(action)
            self.totals[i] += reward
            reached.append(state)
            if terminated or truncated:
                self.returns.append(self.totals[i])
                self.totals[i], state = 0.0, env.reset()[0]
            rewards.append(reward), final.append(terminated), ended.append(terminated or truncated)
            states.append(state)
        self.states = torch.tensor(np.stack(states))
        return torch.tensor(rewards), torch.tensor(np.stack(reached)), *map(torch.tensor, (final, ended))


def optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Return the optimizer of a run."""
    if run.optimizer == "Adam":
        return torch.optim.Adam(model.parameters(), lr=run.lr)
    opt = AdaHesScale(model, lr=run.lr)
    return HesScaleStep(opt, delta=run.delta) if run.optimizer.endswith("scaled") else opt


@torch.no_grad()
def collect(
    environments: Environments, actor: nn.Module, critic: nn.Module
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Act for a while; return states, actions, advantages and returns, of all steps in one axis."""
    steps = []
    for _ in range(LENGTH):
        states = environments.states
        actions = policy.Categorical(actor(states)).sample()
        steps.append((states, actions, *environments.step(actions)))
    states, actions, rewards, reached, final, ended = map(torch.stack, zip(*steps, strict=True))
    values, after = critic(torch.stack((states, reached))).squeeze(-1)

    errors = rewards + GAMMA * after * ~final - values
    advantages, advantage = torch.empty_like(errors), torch.zeros(ENVIRONMENTS)
    for t in reversed(range(LENGTH)):
        advantage = errors[t] + GAMMA * LAMBDA * advantage * ~ended[t]
        advantages[t] = advantage
    return tuple(t.flatten(0, 1) for t in (states, actions, advantages, advantages + values))


def train(run: Run) -> tuple[list[float], float]:
    """Train.

    Returns:
        The learning curve, the mean return of the episodes that ended in each of ``POINTS`` parts of
        the run (of the part before if none did); and the share of steps that were shortened.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    environments = Environments(run.environment, run.seed)
    inputs, actions = environments.states.shape[1], int(environments.all[0].action_space.n)
    actor, critic = network(inputs, actions), network(inputs, 1)
    opt, mse = optimizer(nn.ModuleList((actor, critic)), run), extend(nn.MSELoss())
    scaled = isinstance(opt, HesScaleStep)

    updates = max(run.steps // (ENVIRONMENTS * LENGTH), POINTS)
    curve, seen, shortened = [], 0, 0
    for k in range(updates):
        states, actions, advantages, returns = collect(environments, actor, critic)
        opt.zero_grad()
        with nullcontext() if run.optimizer == "Adam" else backpack(*opt.extensions()):
            pi = policy.Categorical(actor(states))
            loss = policy.log_prob_loss(pi, actions, advantages) - 0.01 * policy.entropy(pi)
            (loss + 0.5 * mse(critic(states).squeeze(1), returns)).backward()
        opt.step()
        shortened += scaled and float(opt.factor) < 1
        if (k + 1) * POINTS // updates > len(curve):
            new = environments.returns[seen:]
            seen = len(environments.returns)
            curve.append(float(np.mean(new)) if new else curve[-1] if curve else float("nan"))
    return curve, shortened / updates


def train_all(runs: Sequence[Run], jobs: int) -> Iterator[tuple[list[float], float]]:
    """Train every run, several at a time; yield the results in order."""
    if jobs == 1:
        yield from map(train, runs)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(train, runs)


def at_the_end(curves: np.ndarray) -> np.ndarray:
    """Return the mean of the last fifth of each learning curve."""
    return np.nanmean(curves[..., -POINTS // 5 :], axis=-1)


def draw(curves: dict[tuple[str, float], np.ndarray], args: argparse.Namespace) -> Path:
    """Draw learning curves by step size, and what is reached against step size."""
    x, count = args.steps * np.arange(1, POINTS + 1) / POINTS, len(args.lrs)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, count + 1, figsize=(2.4 * count + 3, 2.8), sharey=True)
        for color, name in zip(COLORS, OPTIMIZERS, strict=True):
            for axis, lr in zip(axes[:-1], args.lrs, strict=True):
                mean, spread = np.nanmean(curves[name, lr], 0), np.nanstd(curves[name, lr], 0)
                axis.plot(x, mean, color=color, label=name)
                axis.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
                axis.set_title(f"lr = {lr:g}")
                axis.set_xlabel("environment steps")
            ends = np.stack([at_the_end(curves[name, lr]) for lr in args.lrs])
            axes[-1].errorbar(args.lrs, ends.mean(1), ends.std(1), color=color, capsize=3, label=name)
        axes[-1].set_xscale("log")
        axes[-1].set_xlabel("lr")
        axes[-1].set_title("last fifth")
        axes[0].set_ylabel(f"return, mean and std of {args.seeds} seeds")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        path = args.out / "actor_critic.png"
        figure.savefig(path)
        plt.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--environment", default="CartPole-v1", help="name of a discrete environment")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--delta", type=float, default=1e-3, help="bound of the step-size scaling")
    parser.add_argument("--seeds", type=int, default=5, help="runs per setting")
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps per run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--quick", action="store_true", help="train hardly at all, to try it out")
    args = parser.parse_args(argv)
    if args.quick:
        args.lrs, args.seeds, args.steps, args.jobs = [3e-3, 3e-2], 2, 2_000, 1
    args.out.mkdir(parents=True, exist_ok=True)

    settings = list(product(OPTIMIZERS, args.lrs))
    runs = [
        Run(args.environment, name, lr, args.delta, seed, args.steps)
        for name, lr in settings
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)
    ]
    found = list(tqdm(train_all(runs, args.jobs), total=len(runs), desc="training", unit="run"))
    curves, shortened = (np.array(part) for part in zip(*found, strict=True))
    curves = dict(zip(settings, curves.reshape(len(settings), args.seeds, POINTS), strict=True))
    shortened = dict(zip(settings, shortened.reshape(len(settings), -1).mean(1), strict=True))

    print(f"\n{args.environment}: return in the last fifth of {args.steps} steps")
    print(f"mean and standard deviation over {args.seeds} seeds, and the worst seed\n")
    print(f"  {'optimizer':20}  {'lr':>6}  {'mean':>6}  {'std':>5}  {'worst':>6}  shortened steps")
    for name, lr in settings:
        ends = at_the_end(curves[name, lr])
        share = f"{shortened[name, lr]:.0%}" if name.endswith("scaled") else "-"
        cells = f"{ends.mean():6.1f}  {ends.std():5.1f}  {ends.min():6.1f}  {share:>15}"
        print(f"  {name:20}  {lr:>6g}  {cells}")
    print(f"\nPlot:\n  {draw(curves, args)}")


if __name__ == "__main__":
    main()
