"""The graph passes, one file each.

A pass is a frozen dataclass with `run(gm) -> number of edits`; a `Pipeline` runs several and does what every pass
needs around each.
"""

from .asserts import DropMetadataAsserts
from .graph_pass import GraphPass, PassError, PassReport, Pipeline
from .insert import InsertAdapter
from .merge import MergeAdapters, merged_tensors
from .mode import FollowMode
from .observe import ObserveInputs, Observer
from .regions import InlineRegions, without_gradient
from .remove import RemoveAdapters

__all__ = [
    "DropMetadataAsserts",
    "FollowMode",
    "GraphPass",
    "InlineRegions",
    "InsertAdapter",
    "MergeAdapters",
    "ObserveInputs",
    "Observer",
    "PassError",
    "PassReport",
    "Pipeline",
    "RemoveAdapters",
    "merged_tensors",
    "without_gradient",
]
