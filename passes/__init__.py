"""The graph passes, one file each.

A pass is a frozen dataclass with `run(gm) -> number of edits`; a `Pipeline` runs several and does what every pass
needs around each.
"""

from .asserts import DropMetadataAsserts
from .associate import AssociateProducts
from .convert_mask import ConvertMaskOnce
from .dropout import LeaveOutDropout
from .fold_scale import FoldScaleIntoAddition
from .graph_pass import GraphPass, PassError, PassReport, Pipeline, Program
from .group_heads import GroupHeads
from .hoist import HoistParameterWork
from .insert import InsertAdapter
from .merge import MergeAdapters, merged_tensors
from .mode import FollowMode
from .move_branches import MoveBranchesToOutputs
from .observe import ObserveInputs, Observer
from .products import GatherProducts
from .recompute import RecomputeInputs
from .regions import InlineRegions, without_gradient
from .remove import RemoveAdapters
from .siblings import ShareSiblings

OPTIMISATIONS = Pipeline(
    (
        ConvertMaskOnce(),
        GroupHeads(),
        LeaveOutDropout(),
        MoveBranchesToOutputs(),
        AssociateProducts(),
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
    "AssociateProducts",
    "ConvertMaskOnce",
    "DropMetadataAsserts",
    "FoldScaleIntoAddition",
    "FollowMode",
    "GatherProducts",
    "GraphPass",
    "GroupHeads",
    "HoistParameterWork",
    "InlineRegions",
    "InsertAdapter",
    "LeaveOutDropout",
    "MergeAdapters",
    "MoveBranchesToOutputs",
    "ObserveInputs",
    "Observer",
    "PassError",
    "PassReport",
    "Pipeline",
    "Program",
    "RecomputeInputs",
    "RemoveAdapters",
    "ShareSiblings",
    "merged_tensors",
    "without_gradient",
]
