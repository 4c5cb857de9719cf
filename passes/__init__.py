"""The graph passes, one file each.

A pass is a frozen dataclass with `run(gm) -> number of edits`; a `Pipeline` runs several and does what every pass
needs around each.
"""

from .asserts import DropMetadataAsserts
from .fold_scale import FoldScaleIntoAddition
from .graph_pass import GraphPass, PassError, PassReport, Pipeline
from .hoist import HoistParameterWork
from .insert import InsertAdapter
from .merge import MergeAdapters, merged_tensors
from .mode import FollowMode
from .observe import ObserveInputs, Observer
from .products import GatherProducts
from .recompute import RecomputeInputs
from .regions import InlineRegions, without_gradient
from .remove import RemoveAdapters
from .siblings import ShareSiblings

OPTIMISATIONS = Pipeline(
    (
        ShareSiblings(),
        FoldScaleIntoAddition(),
        HoistParameterWork(),
        GatherProducts(),
        RecomputeInputs(),
    )
)
"""What changes how an adapted graph is run and not what it computes, each where it never loses."""

__all__ = [
    "OPTIMISATIONS",
    "DropMetadataAsserts",
    "FoldScaleIntoAddition",
    "FollowMode",
    "GatherProducts",
    "GraphPass",
    "HoistParameterWork",
    "InlineRegions",
    "InsertAdapter",
    "MergeAdapters",
    "ObserveInputs",
    "Observer",
    "PassError",
    "PassReport",
    "Pipeline",
    "RecomputeInputs",
    "RemoveAdapters",
    "ShareSiblings",
    "merged_tensors",
    "without_gradient",
]
