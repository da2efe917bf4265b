"""Graphs: what a network computes, before anything is fused.

:mod:`.ir` defines them, :mod:`.modules` makes them of this package's modules. Plans of inference
(:mod:`threshnet_fast.plan.fuse`) and of training (:mod:`threshnet_fast.plan.raw`) are made from a
graph and from nothing else.
"""

from .ir import (
    Activate,
    Add,
    Concat,
    Conv,
    Dropout,
    Flatten,
    Foreign,
    Graph,
    Linear,
    Mean,
    Node,
    Norm,
    Pool,
    UnsupportedModule,
)
from .modules import graph_of_network, graph_of_stages, split_stages

__all__ = [
    "Activate",
    "Add",
    "Concat",
    "Conv",
    "Dropout",
    "Flatten",
    "Foreign",
    "Graph",
    "Linear",
    "Mean",
    "Node",
    "Norm",
    "Pool",
    "UnsupportedModule",
    "graph_of_network",
    "graph_of_stages",
    "split_stages",
]
