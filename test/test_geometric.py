"""Graph networks of the package torch_geometric: message passing that nobody here wrote."""

import warnings
from functools import partial

import pytest
import torch
from hesscale_oracle import exact_diagonal
from models import Problem
from oracle import (
    close,
    factors_of,
    ggn_blocks,
    is_layer,
    normal_forms,
    output_hessian,
    per_sample_grads,
)
from others import without_torchvision
from torch import Tensor, nn

from backpack_ext import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGN,
    HesScale,
    RecordingError,
    UnsupportedError,
    backpack,
    extend,
    register_rule,
    sharing,
)
from backpack_ext.rules import RULES, base
from curvature import DenseBlock, Kronecker

with without_torchvision():
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import (
        GATv2Conv,
        GCNConv,
        GINConv,
        SAGEConv,
        global_max_pool,
        global_mean_pool,
    )
    from torch_geometric.nn import Linear as GeometricLinear

D, H, CLASSES = 4, 6, 3
FIELDS = {"expand": "kfac_expand", "reduce": "kfac_reduce"}


def gin(inputs: int, outputs: int) -> nn.Module:
    """A convolution with torch's own layers, and a bare parameter `eps`."""
    net = nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, outputs))
    return GINConv(net, train_eps=True)


# GCN and SAGE use a Linear of torch_geometric's own
CONVS = {"gcn": GCNConv, "sage": SAGEConv, "gin": gin}
every_conv = pytest.mark.parametrize("conv", CONVS)
EDGES = (
    torch.tensor([[0, 1, 1, 2, 3, 4, 4, 0], [1, 0, 2, 1, 4, 3, 0, 4]]),
    torch.tensor([[0, 1, 2, 3, 3, 2], [1, 2, 3, 4, 2, 3]]),
    torch.tensor([[0, 1, 1, 2, 3, 0], [1, 0, 2, 1, 0, 3]]),
)


@pytest.fixture
def linear_rule():
    """Their Linear computes what torch's does, so its rule fits."""
    register_rule(GeometricLinear)(type(RULES[nn.Linear]))
    yield
    del RULES[GeometricLinear]
    base._lookup.clear()


class Nodes(nn.Module):
    """Classifies nodes, `[..., nodes, D] -> [..., nodes, CLASSES]`."""

    def __init__(self, conv: str):
        super().__init__()
        self.first, self.second = CONVS[conv](D, H), CONVS[conv](H, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).tanh(), edge_index)


class Graphs(nn.Module):
    """Classifies graphs, `[all nodes, D] -> [N, CLASSES]`."""

    def __init__(self, conv: str):
        super().__init__()
        self.first, self.second = CONVS[conv](D, H), CONVS[conv](H, H)
        self.head = nn.Linear(H, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor) -> Tensor:
        x = self.second(self.first(x, edge_index).tanh(), edge_index).tanh()
        return self.head(global_mean_pool(x, graph))


class EqualGraphs(Graphs):
    """Graphs of equal size, `[N, nodes, D]`: the first argument says how many there are."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        n, nodes, _ = x.shape
        graph = torch.arange(n).repeat_interleave(nodes)
        return super().forward(x.flatten(0, 1), edge_index, graph)


class DataGraphs(Graphs):
    """Takes torch_geometric's own batches, in which no tensor is found."""

    def forward(self, data: Batch) -> Tensor:
        return super().forward(data.x, data.edge_index, data.batch)


def randomized(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.data.normal_(std=0.5)
    return model


def rows(output: Tensor) -> Tensor:
    return output.reshape(-1, CLASSES)


def nodes_as_one_datum(conv: str) -> Problem:
    """One graph, one datum, all nodes of which have a label: `[1, nodes, D]`."""
    torch.manual_seed(0)
    model, x = randomized(Nodes(conv)), torch.randn(1, 5, D)
    target = torch.randint(CLASSES, (5,))
    problem = Problem(model, (x, EDGES[0]), nn.CrossEntropyLoss(), target, {}, rows)
    return problem.to(torch.float64)


def equal_graphs(conv: str) -> Problem:
    """Three graphs of five nodes each."""
    torch.manual_seed(0)
    model, x = randomized(EqualGraphs(conv)), torch.randn(3, 5, D)
    edges = torch.cat([EDGES[n % 2] + 5 * n for n in range(3)], dim=1)
    problem = Problem(model, (x, edges), nn.CrossEntropyLoss(), torch.randint(CLASSES, (3,)))
    return problem.to(torch.float64)


def run(problem: Problem, *exts, **options) -> None:
    extend(problem.model, **options), extend(problem.loss_fn)
    with backpack(*exts):
        problem.loss().backward()


def check_everything(build, layers: int) -> None:
    """Compare all quantities of a problem with plain autograd on dense definitions."""
    problem, plain = build(), build()
    kfacs = [KFAC(approx, "exact", savefield=field) for approx, field in FIELDS.items()]
    run(problem, BatchGrad(), BatchL2Grad(), DiagGGN(), *kfacs)
    G, blocks = per_sample_grads(plain), ggn_blocks(plain)
    forms, hessian = normal_forms(plain), output_hessian(plain)
    for key, p in problem.model.named_parameters():
        close(p.grad, G[key].sum(0))
        close(p.grad_batch, G[key])
        close(p.batch_l2, G[key].square().flatten(1).sum(1))
        close(p.diag_ggn_exact.flatten(), blocks[key].diagonal())
        for field in FIELDS.values():
            if isinstance(getattr(p, field), DenseBlock):
                close(getattr(p, field).to_dense(), blocks[key])
    count = 0
    for path, module in problem.model.named_modules():
        for approx, field in FIELDS.items():
            if is_layer(module) and isinstance(getattr(module.weight, field), Kronecker):
                count += 1
                B, A = factors_of(*forms[path], hessian, approx)
                close(getattr(module.weight, field).B, B)
                close(getattr(module.weight, field).A, A)
    assert count == layers * len(FIELDS)


# -- labels of nodes -------------------------------------------------------------------------------


@pytest.mark.parametrize("ext", [BatchGrad, DiagGGN, KFAC, partial(KFAC, fisher="exact")])
@every_conv
def test_nodes_as_data_are_mixed(linear_rule, conv, ext):
    """With nodes as data, message passing mixes data: no quantity per datum is defined."""
    problem = nodes_as_one_datum(conv)
    problem.inputs = (problem.inputs[0][0], EDGES[0])
    with pytest.raises(UnsupportedError, match="quantities per datum are undefined"):
        run(problem, ext())


@every_conv
def test_a_graph_is_a_datum(linear_rule, conv):
    """With a leading axis of size 1 the nodes are positions of a single datum."""
    check_everything(partial(nodes_as_one_datum, conv), {"gcn": 2, "sage": 4, "gin": 4}[conv])


@pytest.mark.montecarlo
@every_conv
def test_samples_with_nodes_as_data(linear_rule, conv):
    """Sampled vectors of different nodes are independent: their mixing averages out in "expand"."""
    problem, exact = nodes_as_one_datum(conv), nodes_as_one_datum(conv)
    problem.inputs = (problem.inputs[0][0], EDGES[0])
    run(problem, KFAC("expand", "mc", mc_samples=4000), check_layers=False)
    run(exact, KFAC("expand", "exact"))
    for module, other in zip(problem.model.modules(), exact.model.modules(), strict=True):
        if is_layer(module):
            (B, A), (B_exact, A_exact) = module.weight.kfac, other.weight.kfac
            close(A, A_exact)
            assert (B - B_exact).norm() < 0.1 * B_exact.norm()


# -- labels of graphs ------------------------------------------------------------------------------


@every_conv
def test_graphs_of_equal_size(linear_rule, conv):
    check_everything(partial(equal_graphs, conv), {"gcn": 3, "sage": 5, "gin": 5}[conv])


@pytest.mark.parametrize("conv", ["gcn", "sage"])
def test_without_a_rule(conv):
    """Their Linear is no torch.nn.Linear: its products are found in the graph."""
    check_everything(partial(equal_graphs, conv), {"gcn": 3, "sage": 5}[conv])


@every_conv
def test_the_first_argument_decides(conv):
    """Called with all nodes first, a model seems to have as many data as nodes; the error says so."""
    plain = equal_graphs(conv)
    model, (x, edges) = randomized(Graphs(conv)).double(), plain.inputs
    graph = torch.arange(3).repeat_interleave(5)
    problem = Problem(model, (x.flatten(0, 1), edges, graph), plain.loss_fn, plain.target)
    with pytest.raises(UnsupportedError, match=r"(?s)find the 15 data.*leads with it as first argument"):
        run(problem, BatchGrad())


def test_a_batch_object_decides_nothing():
    """No tensor is found in it: each layer says how many data it sees."""
    graphs = [Data(x=torch.randn(5, D), edge_index=edges) for edges in EDGES[:2]]
    data, target = Batch.from_data_list(graphs), torch.randint(CLASSES, (2,))
    problem = Problem(DataGraphs("gin"), (data,), nn.CrossEntropyLoss(), target)
    with pytest.raises(RecordingError, match="disagree about the batch size"):
        run(problem, BatchGrad())


@pytest.mark.parametrize("conv", ["gcn", "sage"])
def test_graphs_of_different_sizes_without_a_rule(conv):
    """Nodes of different graphs are apart once they are pooled, and from there autograd carries on."""
    torch.manual_seed(0)
    model, loss_fn = randomized(DataGraphs(conv)).double(), nn.CrossEntropyLoss()
    sizes, target = (5, 7, 4), torch.randint(CLASSES, (3,))
    graphs = [
        Data(x=torch.randn(size, D).double(), edge_index=edges)
        for size, edges in zip(sizes, EDGES, strict=True)
    ]
    named = dict(model.named_parameters())
    G = [
        torch.autograd.grad(
            loss_fn(model(Batch.from_data_list([graph])), target[n : n + 1]) / 3, named.values()
        )
        for n, graph in enumerate(graphs)
    ]
    run(Problem(model, (Batch.from_data_list(graphs),), loss_fn, target), BatchGrad(), KFAC())
    for p, *rows_of_p in zip(named.values(), *G, strict=True):
        close(p.grad_batch, torch.stack(rows_of_p))
        assert isinstance(p.kfac, (DenseBlock, Kronecker))


# -- graphs of different sizes, whose rows are told apart by segments -------------------------------


def ragged_graphs(conv: str) -> tuple[nn.Module, list[Data], Tensor]:
    """Three graphs of 5, 7 and 4 nodes."""
    torch.manual_seed(0)
    model, target = randomized(DataGraphs(conv)).double(), torch.randint(CLASSES, (3,))
    graphs = [
        Data(x=torch.randn(size, D).double(), edge_index=edges)
        for size, edges in zip((5, 7, 4), EDGES, strict=True)
    ]
    return model, graphs, target


def run_shared(model: nn.Module, batch: Batch, target: Tensor, *exts) -> None:
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    extend(model)
    with backpack(*exts), sharing(segments=batch.batch):
        loss_fn(model(batch), target).backward()


@every_conv
def test_segments(conv):
    """All quantities of a batch of graphs, each graph alone being the reference."""
    model, graphs, target = ragged_graphs(conv)
    named = dict(model.named_parameters())
    G, blocks = [], dict.fromkeys(named, 0)
    for n, graph in enumerate(graphs):
        z = model(Batch.from_data_list([graph]))
        loss = nn.functional.cross_entropy(z, target[n : n + 1], reduction="sum")
        G.append(torch.autograd.grad(loss, named.values(), retain_graph=True))
        q = z[0].detach().softmax(0)
        J = [torch.autograd.grad(z[0, c], named.values(), retain_graph=True) for c in range(CLASSES)]
        for key, columns in zip(named, zip(*J, strict=True), strict=True):
            j = torch.stack(columns).flatten(1)
            blocks[key] = blocks[key] + j.T @ (q.diag() - q.outer(q)) @ j
    exts = BatchGrad(), BatchL2Grad(), DiagGGN(), KFAC("reduce", "exact"), KFAC(savefield="k_mc")
    run_shared(model, Batch.from_data_list(graphs), target, *exts)
    for (key, p), rows_of_p in zip(named.items(), zip(*G, strict=True), strict=True):
        close(p.grad_batch, torch.stack(rows_of_p))
        close(p.batch_l2, torch.stack(rows_of_p).flatten(1).square().sum(1))
        close(p.diag_ggn_exact.flatten(), blocks[key].diagonal())
        if p.dim() == 1:  # biases, and GIN's eps: exact in reduce
            close(p.kfac.to_dense(), blocks[key])
        else:
            assert isinstance(p.kfac, Kronecker) and isinstance(p.k_mc, Kronecker)


@every_conv
@pytest.mark.parametrize("approx", FIELDS)
def test_segments_add_up_over_graphs(conv, approx):
    """B is a sum over graphs, A a mean over nodes (expand) or graphs (reduce)."""
    model, graphs, target = ragged_graphs(conv)
    weights = [p for p in model.parameters() if p.dim() == 2]
    alone = []
    for n, graph in enumerate(graphs):
        run_shared(model, Batch.from_data_list([graph]), target[n : n + 1], KFAC(approx, "exact"))
        alone.append([p.kfac for p in weights])
    run_shared(model, Batch.from_data_list(graphs), target, KFAC(approx, "exact"))
    for p, *parts in zip(weights, *alone, strict=True):
        total = parts[0] + parts[1] + parts[2]
        assert p.kfac.rows == total.rows
        close(p.kfac.B, total.B)
        close(p.kfac.A, total.A)


@pytest.mark.parametrize("make", [*CONVS.values(), partial(SAGEConv, aggr="max"), GATv2Conv])
@pytest.mark.usefixtures("double")
def test_hessian_diagonals(make):
    """No operation of message passing or pooling is unknown; the last layer is exact."""
    first, second, head = make(D, H), make(H, H), nn.Linear(2 * H, CLASSES)
    graph, y = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 2])
    z = second(first(torch.randn(5, D), EDGES[0]).tanh(), EDGES[0])
    z = torch.cat([global_mean_pool(z, graph), global_max_pool(z, graph)], 1)
    with warnings.catch_warnings(), backpack(HesScale(on_curved_glue="raise")):
        warnings.simplefilter("error", UserWarning)
        extend(nn.CrossEntropyLoss())(head(z), y).backward()

    def value(W: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy(nn.functional.linear(z.detach(), W, b), y)

    for p, expected in zip(head.parameters(), exact_diagonal(value, [*head.parameters()]), strict=True):
        close(p.hesscale, expected)
    for p in (*first.parameters(), *second.parameters()):
        assert p.hesscale.shape == p.shape and p.hesscale.isfinite().all()
