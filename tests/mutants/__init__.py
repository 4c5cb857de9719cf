"""The safety conditions of the passes, each with a mutant that drops it and the test that notices."""

from .of_graph import MUTANTS as OF_GRAPH
from .of_passes import MUTANTS as OF_PASSES

MUTANTS = (*OF_PASSES, *OF_GRAPH)
