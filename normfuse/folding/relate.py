"""The first two steps of folding: every operation gets its rule, and the rules relate the scales."""

from __future__ import annotations

from torch.fx import Node

from .gauge import Gauge, Options
from .program import Program
from .results import Matches
from .rules import find_rule
from .scales import Scales


def relate(program: Program, options: Options) -> Gauge:
    """Match every operation with a rule, and let it say which scales are equal, positive or fixed."""
    gauge = Gauge(program, options, Scales(options.max_scale_range), Matches())
    for node in program.graph.nodes:
        if program.is_constant(node) or node.op == "get_attr":
            continue
        if node.op == "output":
            for operand in node.all_input_nodes:
                gauge.pin(operand, "the model's output")
        elif node.op == "placeholder":
            gauge.pin(node, "the model's input")
        else:
            _relate(node, gauge)
    return gauge


def _relate(node: Node, gauge: Gauge) -> None:
    rule = gauge.matches.rule_of[node] = find_rule(node, gauge)
    rule.relate(node, gauge)
    gauge.bound(node)
