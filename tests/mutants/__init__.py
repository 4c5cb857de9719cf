"""The conditions that keep results right, each with a mutant that drops it and the test that notices."""

from .of_comparisons import MUTANTS as OF_COMPARISONS
from .of_fuse_loss import MUTANTS as OF_FUSE_LOSS
from .of_graph import MUTANTS as OF_GRAPH
from .of_passes import MUTANTS as OF_PASSES
from .of_runs import MUTANTS as OF_RUNS

MUTANTS = (*OF_PASSES, *OF_FUSE_LOSS, *OF_GRAPH, *OF_COMPARISONS, *OF_RUNS)
