"""Graph Transformer layers with BatchNorm over the nodes and edges of packed graphs (Dwivedi & Bresson, 2020)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from normfuse.nn import MaskedBatchNorm, UnifiedNorm
from normfuse.onnx import export

from .checks import assert_nothing_left, folded, operations
from .networks import look_trained


class GraphLayer(nn.Module):
    """Nodes [N, d], edges [E, d] and their ends [E]: attention over incoming edges, then feed-forward, post-norm."""

    def __init__(self, width: int, heads: int, norm) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.e = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.out = nn.ModuleDict({kind: nn.Linear(width, width) for kind in ("node", "edge")})
        self.mlp = nn.ModuleDict(
            {k: nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for k in self.out}
        )
        self.norms = nn.ModuleDict({f"{kind}{i}": norm(width) for kind in self.out for i in (1, 2)})

    def attend(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1))

        q, k, v, e = heads(self.q(nodes)), heads(self.k(nodes)), heads(self.v(nodes)), heads(self.e(edges))
        score = k.index_select(0, source) * q.index_select(0, target) / q.shape[-1] ** 0.5 * e
        weight = torch.exp(score.sum(-1, keepdim=True).clamp(-5, 5))
        total = torch.zeros_like(v[..., :1]).index_add(0, target, weight)
        mixed = torch.zeros_like(v).index_add(0, target, v.index_select(0, source) * weight)
        return (mixed / (total + 1e-6)).flatten(1), score.flatten(1)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        results = self.attend(nodes, edges, source, target)
        streams = {}
        for kind, x, branch in zip(self.out, (nodes, edges), results, strict=True):
            x = self.norms[f"{kind}1"](x + self.out[kind](branch))
            streams[kind] = self.norms[f"{kind}2"](x + self.mlp[kind](x))
        return streams["node"], streams["edge"]


class GraphTransformer(nn.Module):
    """Atoms [N] with positional features [N, 3], bonds [E] with their ends [2, E], and each atom's graph [N]."""

    def __init__(self, norm, depth: int = 2, width: int = 8, heads: int = 4, graphs: int = 4) -> None:
        super().__init__()
        self.atoms, self.bonds, self.positions = nn.Embedding(9, width), nn.Embedding(4, width), nn.Linear(3, width)
        self.layers = nn.ModuleList(GraphLayer(width, heads, norm) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.graphs = graphs

    def forward(self, atoms: Tensor, positions: Tensor, bonds: Tensor, ends: Tensor, graph: Tensor) -> Tensor:
        nodes, edges = self.atoms(atoms) + self.positions(positions), self.bonds(bonds)
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, ends[0], ends[1])
        sums = nodes.new_zeros(self.graphs, nodes.shape[1]).index_add(0, graph, nodes)
        sizes = nodes.new_zeros(self.graphs, 1).index_add(0, graph, torch.ones_like(nodes[:, :1]))
        return self.head(sums / sizes)


NORMS = {"torch": nn.BatchNorm1d, "masked": MaskedBatchNorm, "unified": UnifiedNorm}
SHAPES = {
    "atoms": {0: (nodes := Dim("nodes", min=4, max=512))},
    "positions": {0: nodes},
    "bonds": {0: (edges := Dim("edges", min=4, max=4096))},
    "ends": {1: edges},
    "graph": {0: nodes},
}


def packed(nodes: int, edges: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Four graphs in one batch; edges stay within a graph."""
    graph = torch.arange(nodes) * 4 // nodes
    source = torch.randint(nodes, (edges,))
    same = (graph[None] == graph[source][:, None]).to(torch.float64)
    target = torch.multinomial(same, 1).flatten()
    positions = torch.randn(nodes, 3, dtype=dtype)
    return torch.randint(9, (nodes,)), positions, torch.randint(4, (edges,)), torch.stack([source, target]), graph


@pytest.fixture(scope="module")
def without_norms() -> list[str]:
    """The operations of the same network without norms."""
    return operations(folded(GraphTransformer(lambda width: nn.Identity()), packed(14, 40), SHAPES)[0])


@pytest.mark.parametrize("kind", NORMS)
def test_every_norm_of_nodes_and_edges_vanishes(kind: str, without_norms: list[str]) -> None:
    torch.manual_seed(0)
    model = look_trained(GraphTransformer(NORMS[kind]))
    program, report = folded(model, packed(14, 40), SHAPES)
    assert_nothing_left(program, report)
    # The last layer's edges are read by nobody, so their norms are not in the program.
    assert len(report.norms) == 2 * 4 - 2
    assert operations(program) == without_norms
    for sizes in ((8, 17), (30, 99)):
        inputs = packed(*sizes)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_at_its_authors_size_every_norm_vanishes() -> None:
    model = look_trained(GraphTransformer(nn.BatchNorm1d, depth=10, width=64, heads=8))
    program, report = folded(model, packed(14, 40), SHAPES)
    assert_nothing_left(program, report)
    assert len(report.norms) == 10 * 4 - 2


@pytest.mark.slow
def test_the_file_agrees_with_the_model(tmp_path) -> None:
    model = look_trained(GraphTransformer(nn.BatchNorm1d))
    result = export(model, tmp_path / "graph.onnx", example_inputs=packed(14, 40, torch.float32))
    assert not result.report.remaining and not result.graph.norms
    assert result.verification.worst("ONNX file") < 1e-4
