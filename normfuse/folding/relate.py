"""The first two steps of folding: every operation is matched by a rule, and the matches relate the scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from .gauge import Facts, Gauge, Options
from .program import Program
from .relations import Relations
from .results import Matches
from .rules import Match, Opaque, match
from .rules.base import MeanRole
from .scales import Scales
from .zeros import zero_rows


def match_all(facts: Facts) -> Mapping[Node, Match]:
    """The match of every operation; what no rule knows stays exactly as it is."""
    return MappingProxyType(
        {
            node: match(node, facts) or Opaque(node)
            for node in facts.program.graph.nodes
            if not facts.program.is_constant(node) and node.op not in ("get_attr", "placeholder", "output")
        }
    )


def relate(program: Program, options: Options) -> Gauge:
    """Match every operation, and let the matches say which scales are equal, positive or fixed."""
    matches = match_all(Facts(program, options))
    scale_of: dict[Node, Any] = {}
    gauge = Gauge(program, options, Scales(options.max_scale_range), Matches(matches, MappingProxyType(scale_of)))
    if options.zero_rows:
        matches = zero_rows(gauge)
        gauge = gauge.knowing(matches=Matches(matches, MappingProxyType(scale_of)))
    relations = Relations(gauge, scale_of)
    for node in program.graph.nodes:
        if node in matches:
            scale = matches[node].relate(relations)
            if scale is not None:
                scale_of[node] = scale
            relations.bound(node)
        elif node.op == "output":
            for operand in node.all_input_nodes:
                relations.pin(operand, "the model's output")
        elif node.op == "placeholder" and not program.is_constant(node):
            relations.pin(node, "the model's input")
    if relations.mixing:
        return relate(program, replace(options, mixing=options.mixing.union(relations.mixing)))
    related = {node: found for node, found in matches.items() if node in scale_of}
    return gauge.knowing(
        matches=Matches(
            of=matches,
            scale_of=MappingProxyType(scale_of),
            affine=MappingProxyType(
                {node: m.coefficients for node, m in related.items() if m.coefficients is not None}
            ),
            demands=tuple(node for node, m in related.items() if m.asks_ratio),
            equations=tuple(relations.equations),
            dynamic=tuple(node for node, m in related.items() if m.mean is MeanRole.MEASURES),
            stored=tuple(relations.stored),
            free_constants=tuple(relations.free_constants),
        )
    )
