"""Streaming actor-critic on CartPole: how large may the step size be?

One network for the policy and one for the values, 64-64 tanh each, learn from one transition at a time:
batch 1, no replay, no target network, the setting in which large steps are most harmful. Both are
trained by ``AdaHesScale``, with and without step-size scaling (``HesScaleStep``), for several step
sizes and seeds.

Run it with ``python examples/actor_critic.py --out out``; it needs no download. Three minutes on two
cores, ``--quick`` a few seconds.
"""

import argparse
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import gymnasium
import torch
from torch import Tensor, nn

from backpack_ext import backpack, extend, policy
from optim import AdaHesScale, HesScaleStep

GAMMA = 0.99
# bounds on the predicted second-order change of one transition's losses, in a step
DELTAS = {"actor": 1e-3, "critic": 1e-2}


def mlp(inputs: int, outputs: int) -> nn.Module:
    """Return a 64-64 tanh network."""
    return nn.Sequential(
        *(nn.Linear(inputs, 64), nn.Tanh()),
        *(nn.Linear(64, 64), nn.Tanh()),
        nn.Linear(64, outputs),
    )


def optimizer(network: nn.Module, lr: float, delta: float | None):
    """Return AdaHesScale, with its steps bounded if a ``delta`` is given."""
    inner = AdaHesScale(network.parameters(), lr=lr)
    return inner if delta is None else HesScaleStep(inner, delta=delta)


class Agent:
    """An actor and a critic that learn from each transition as it comes.

    Args:
        inputs: Size of an observation.
        actions: Number of actions.
        lr: Step size of both.
        scaled: Whether steps are scaled.
    """

    def __init__(self, inputs: int, actions: int, lr: float, scaled: bool):
        self.actor, self.critic = mlp(inputs, actions), mlp(inputs, 1)
        self.mse = extend(nn.MSELoss())
        self.optimizers = [
            optimizer(self.actor, lr, DELTAS["actor"] if scaled else None),
            optimizer(self.critic, lr, DELTAS["critic"] if scaled else None),
        ]

    def act(self, state: Tensor) -> Tensor:
        """Draw an action."""
        with torch.no_grad():
            return torch.distributions.Categorical(logits=self.actor(state)).sample()

    def learn(self, state: Tensor, action: Tensor, reward: float, after: Tensor, ended: bool) -> None:
        """Take one step along the policy gradient and one towards the temporal-difference target."""
        with torch.no_grad():
            target = reward + (0.0 if ended else GAMMA * self.critic(after))
            target = torch.as_tensor(target).reshape(1, 1)
        for opt in self.optimizers:
            opt.zero_grad()
        # two networks, two losses, one backward pass: one extension for all parameters would do as well
        with backpack(*self.optimizers[0].extensions()):
            value = self.critic(state)
            advantage = (target - value.detach()).reshape(1)
            pi = policy.Categorical(self.actor(state))
            loss = policy.log_prob_loss(pi, action, advantage) - 0.01 * policy.entropy(pi)
            (loss + self.mse(value, target)).backward()
        for opt in self.optimizers:
            opt.step()


def train(task: tuple[float, bool, int, int]) -> list[tuple[int, float]]:
    """Train an agent.

    Args:
        task: Step size, whether steps are scaled, seed, number of transitions.

    Returns:
        For each episode, when it ended and the sum of its rewards.
    """
    lr, scaled, seed, steps = task
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    env = gymnasium.make("CartPole-v1")
    agent = Agent(env.observation_space.shape[0], int(env.action_space.n), lr, scaled)
    state, _ = env.reset(seed=seed)
    state, total, episodes = _row(state), 0.0, []
    for step in range(steps):
        action = agent.act(state)
        after, reward, terminated, truncated, _ = env.step(int(action))
        after, total = _row(after), total + float(reward)
        agent.learn(state, action, float(reward), after, terminated)
        state = after
        if terminated or truncated:
            episodes.append((step, total))
            state, total = _row(env.reset()[0]), 0.0
    return episodes or [(steps, total)]


def _row(observation) -> Tensor:
    return torch.as_tensor(observation, dtype=torch.float32).unsqueeze(0)


def last(episodes: list[tuple[int, float]], steps: int) -> float:
    """Return the mean return over the last fifth of the training."""
    late = [total for step, total in episodes if step >= 0.8 * steps]
    return mean(late or [episodes[-1][1]])


def main(argv: Sequence[str] | None = None) -> None:
    """Train all agents, print a table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20_000, help="transitions of a run")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--quick", action="store_true", help="one step size, two seeds, few steps")
    args = parser.parse_args(argv)
    if args.quick:
        args.lrs, args.seeds, args.steps = [1e-3], 2, 300
    tasks = [
        (lr, scaled, seed, args.steps)
        for lr in args.lrs
        for scaled in (False, True)
        for seed in range(args.seeds)
    ]
    with get_context("spawn").Pool(args.workers) as pool:
        runs = dict(zip(tasks, pool.map(train, tasks, chunksize=1), strict=True))
    print(f"CartPole-v1, {args.steps} transitions, {args.seeds} seeds: return at the end, mean (std)")
    print(f"{'step size':>10}  {'AdaHesScale':>16}  {'scaled':>16}")
    for lr in args.lrs:
        cells = []
        for scaled in (False, True):
            found = [last(runs[lr, scaled, seed, args.steps], args.steps) for seed in range(args.seeds)]
            cells.append(f"{mean(found):7.1f} ({stdev(found):5.1f})")
        print(f"{lr:>10g}  {cells[0]:>16}  {cells[1]:>16}")
    print(f"plot: {draw(runs, args)}")


def draw(runs: dict, args: argparse.Namespace) -> Path:
    """Draw the learning curves, a panel per step size: mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(args.lrs), figsize=(3.4 * len(args.lrs), 3), sharey=True, squeeze=False
    )
    grid = torch.linspace(0, args.steps, 41)[1:]
    for axis, lr in zip(axes[0], args.lrs, strict=True):
        for scaled, color in ((False, "tab:orange"), (True, "tab:blue")):
            curves = torch.tensor(
                [curve(runs[lr, scaled, seed, args.steps], grid) for seed in range(args.seeds)]
            )
            label = "scaled" if scaled else "AdaHesScale"
            axis.plot(grid, curves.mean(0), color=color, label=label)
            axis.fill_between(grid, curves.amin(0), curves.amax(0), color=color, alpha=0.2, lw=0)
        axis.set(title=f"step size {lr:g}", xlabel="transitions")
    axes[0, 0].set_ylabel("return (mean of 10 episodes)")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "actor_critic.png"
    figure.savefig(path, dpi=120)
    return path


def curve(episodes: list[tuple[int, float]], grid: Tensor) -> list[float]:
    """Return the mean return of the ten episodes before each point in time."""
    found = []
    for point in grid.tolist():
        before = [total for step, total in episodes if step <= point]
        found.append(mean(before[-10:]) if before else 0.0)
    return found


if __name__ == "__main__":
    main()
