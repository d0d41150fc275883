"""Synthetic molecules, and a graph network that counts functional groups in them.

Atoms are C, N, O and F, with four, three, two and one bonds; what a molecule's bonds leave free are
its hydrogens. The class of a molecule is the number of its carbon atoms (0, 1, more) which have a double
bond to an O and a single bond to an N or an O with a hydrogen: acids and amides. A network sees no
hydrogens, it has to count bonds at the N or O, and then look from the C: two rounds of messages.
"""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.training.data import Batch, Data

C, N, O = 0, 1, 2
VALENCES = (4, 3, 2, 1)
ATOMS, BONDS, CLASSES = 4, 3, 3
TRAINING, VALIDATION = 2000, 600


class GraphNet(nn.Module):
    """Rounds of messages along bonds, a sum over atoms, and a head.

    Args:
        dim: Width of the atoms' states.
        rounds: Number of rounds.
    """

    def __init__(self, dim: int = 32, rounds: int = 3):
        super().__init__()
        self.atoms, self.bonds = nn.Embedding(ATOMS, dim), nn.Embedding(BONDS, dim)
        self.messages = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(rounds))
        self.updates = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(rounds))
        self.hidden, self.head = nn.Linear(dim, dim), nn.Linear(dim, CLASSES)

    def forward(self, atoms: Tensor, bonds: Tensor, edges: Tensor, graph: Tensor, count: int) -> Tensor:
        """Map molecules to logits.

        Args:
            atoms: Kinds of atoms, ``[A]``.
            bonds: Kinds of bonds, ``[E]``, each bond in both directions.
            edges: The atoms that they come from and lead to, ``[2, E]``.
            graph: The molecule of each atom, ``[A]``.
            count: Number of molecules.

        Returns:
            Logits ``[count, classes]``.
        """
        x, bonds = self.atoms(atoms), self.bonds(bonds)
        source, target = edges
        for message, update, norm in zip(self.messages, self.updates, self.norms, strict=True):
            sent = F.relu(message(torch.cat([x[source], bonds], dim=1)))
            received = torch.zeros_like(x).index_add(0, target, sent)
            x = x + F.relu(update(torch.cat([norm(x), received], dim=1)))
        whole = x.new_zeros(count, x.shape[1]).index_add(0, graph, x)
        return self.head(F.relu(self.hidden(whole)))


@dataclass(frozen=True)
class Molecule:
    """A molecule.

    Attributes:
        atoms: Kinds of atoms.
        bonds: Pairs of atoms, with one less than the number of bonds between them.
    """

    atoms: list[int]
    bonds: dict[tuple[int, int], int]


class Builder:
    """A molecule that grows; ``free`` has the bonds that each atom may still have."""

    def __init__(self):
        self.atoms, self.free, self.bonds = [C], [VALENCES[C]], {}

    def add(self, kind: int, at: int, order: int) -> int:
        """Bind a new atom to one that is there, by as many bonds as both allow; return its number."""
        order = min(self.free[at], VALENCES[kind], order)
        new = len(self.atoms)
        self.bonds[at, new] = order - 1
        self.free[at] -= order
        self.atoms.append(kind)
        self.free.append(VALENCES[kind] - order)
        return new

    def open(self) -> list[int]:
        """Return the atoms which can have more bonds."""
        return [i for i, f in enumerate(self.free) if f > 0]

    def close(self, i: int, j: int) -> None:
        """Close a ring by a single bond between two atoms."""
        if (i, j) not in self.bonds:
            self.bonds[i, j] = 0
            self.free[i], self.free[j] = self.free[i] - 1, self.free[j] - 1


def molecule(random: Random) -> Molecule:
    """Return a random tree of about 6 to 16 atoms, carbonyls among them, with up to two rings."""
    built, size = Builder(), random.randint(6, 16)
    while len(built.atoms) < size and (places := built.open()):
        at = random.choice(places)
        if random.random() < 0.15:
            carbon = built.add(C, at, 1)
            built.add(O, carbon, 2)
            built.add(random.choice((C, N, O)), carbon, 1)
        else:
            kind = random.choices(range(ATOMS), weights=(55, 20, 22, 3))[0]
            built.add(kind, at, random.choices((1, 2, 3), weights=(75, 22, 3))[0])
    for _ in range(2):
        if len(places := built.open()) > 1:
            built.close(*sorted(random.sample(places, 2)))
    return Molecule(built.atoms, built.bonds)


def groups(found: Molecule) -> int:
    """Return the number of carbon atoms of acids and amides."""
    free = [VALENCES[kind] for kind in found.atoms]
    neighbours: list[list[tuple[int, int]]] = [[] for _ in found.atoms]
    for (i, j), bond in found.bonds.items():
        for a, b in ((i, j), (j, i)):
            free[a] -= bond + 1
            neighbours[a].append((b, bond))
    return sum(
        kind == C
        and any(found.atoms[j] == O and bond == 1 for j, bond in around)
        and any(found.atoms[j] in (N, O) and bond == 0 and free[j] > 0 for j, bond in around)
        for kind, around in zip(found.atoms, neighbours, strict=True)
    )


class Molecules(Data):
    """Molecules, joined to one graph per batch, whose atoms and bonds are ragged rows."""

    def __init__(self, found: list[Molecule]):
        self.classes = torch.tensor([min(groups(m), CLASSES - 1) for m in found])
        self.parts = []
        for m in found:
            pairs = torch.tensor(list(m.bonds)).T
            edges = torch.cat([pairs, pairs.flip(0)], dim=1)
            bonds = torch.tensor(list(m.bonds.values())).repeat(2)
            self.parts.append((torch.tensor(m.atoms), bonds, edges))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Tensor) -> Batch:
        atoms, bonds, edges = zip(*(self.parts[i] for i in index.tolist()), strict=True)
        sizes, counts = (torch.tensor([len(p) for p in parts]) for parts in (atoms, bonds))
        numbers = torch.arange(len(index))
        graph, graph_of_bond = numbers.repeat_interleave(sizes), numbers.repeat_interleave(counts)
        offsets = (sizes.cumsum(0) - sizes)[graph_of_bond]
        inputs = (
            torch.cat(atoms),
            torch.cat(bonds),
            torch.cat(edges, dim=1) + offsets,
            graph,
            len(index),
        )
        return Batch(inputs, self.classes[index], [graph, graph_of_bond])


@lru_cache(maxsize=2)
def molecules(seed: int) -> tuple[Molecules, Molecules]:
    """Return training and validation data."""
    random = Random(seed)
    found = [molecule(random) for _ in range(TRAINING + VALIDATION)]
    return Molecules(found[:TRAINING]), Molecules(found[TRAINING:])
