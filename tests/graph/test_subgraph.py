"""Functions of graphs: equal graphs share one, and no literal is taken for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from lora_lite_fx.graph.subgraph import extract, function_between, function_of, function_of_nodes


def graph_of(function: Any, *args: Any, **kwargs: Any) -> fx.Graph:
    """Return the graph of a call with one input, which stands for `...` among the arguments."""
    graph = fx.Graph()
    x = graph.placeholder("any_name")
    result = graph.call_function(function, tuple(x if arg is ... else arg for arg in args), kwargs)
    graph.output(result)
    return graph


def test_equal_graphs_have_one_function() -> None:
    first, second = (graph_of(torch.add, ..., 2.0, alpha=3) for _ in range(2))
    function = function_of(first)
    assert function_of(second) is function
    assert torch.equal(function(None, torch.ones(2)), torch.full((2,), 7.0))


LITERALS: list[Any] = [1, 1.0, True, 0, 0.0, -0.0, 1j, None, "1", (1, 2), [1, 2], (1.0, 2), slice(0, 1), slice(0, True)]


@pytest.mark.parametrize("keyword", [False, True])
def test_other_literals_have_other_functions(keyword: bool) -> None:
    functions = [
        function_of(graph_of(dict, ..., value=value) if keyword else graph_of(isinstance, ..., value))
        for value in LITERALS
    ]
    assert len({id(function) for function in functions}) == len(LITERALS)


def test_other_operands_and_functions_have_other_functions() -> None:
    graphs = [graph_of(torch.add, ..., ...), graph_of(torch.mul, ..., ...), graph_of(torch.add, ..., 0)]
    two = fx.Graph()
    x, y = two.placeholder("x"), two.placeholder("y")
    two.output(two.call_function(torch.add, (x, y)))
    swapped = fx.Graph()
    x, y = swapped.placeholder("x"), swapped.placeholder("y")
    swapped.output(swapped.call_function(torch.add, (y, x)))
    functions = [function_of(graph) for graph in (*graphs, two, swapped)]
    assert len({id(function) for function in functions}) == 5


def test_functions_of_a_part_and_of_its_copy_are_one() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    total = graph.call_function(torch.add, (x, y))
    scaled = graph.call_function(torch.mul, (total, 2.0))
    graph.output(graph.call_function(torch.neg, (scaled,)))
    function = function_between([y, x], [scaled, total])
    assert function is function_of(extract([y, x], [scaled, total]))
    assert function is not function_between([x, y], [scaled, total])
    assert function is not function_between([y, x], [total, scaled])
    assert function is function_of_nodes([total, scaled], [y, x], (scaled, total))
    ones = torch.ones(2)
    assert [value.tolist() for value in function(None, 3 * ones, ones)] == [[8.0, 8.0], [4.0, 4.0]]
