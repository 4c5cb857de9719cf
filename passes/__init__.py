"""The graph passes, one file each.

A pass is a frozen dataclass with `run(gm) -> number of edits`. A `Pipeline` runs several passes, and does the work that
every pass needs around each.
"""

from ..graph.regions import without_gradient
from .adaptation.bank_ids import read_ids
from .adaptation.folding import MergedSite, merge_sites, weight_change
from .adaptation.insert_adapter import InsertAdapter
from .adaptation.leave_out_adapters import LeaveOutAdapters
from .adaptation.merge_adapters import MergeAdapters
from .adaptation.observe_inputs import ObserveInputs, Observer
from .adaptation.remove_adapters import RemoveAdapters
from .adaptation.scale_adapters import ScaleAdapters, input_name
from .normalize.drop_empty_parts import DropEmptyParts
from .normalize.drop_metadata_asserts import DropMetadataAsserts
from .normalize.follow_mode import FollowMode
from .normalize.inline_regions import InlineRegions
from .normalize.leave_out_inputs import LeaveOutInputs
from .optimize.associate_products import AssociateProducts
from .optimize.convert_mask_once import ConvertMaskOnce
from .optimize.fold_scale_into_addition import FoldScaleIntoAddition
from .optimize.fuse_loss import FuseLoss
from .optimize.gather_bank_products import GatherBankProducts
from .optimize.gather_products import GatherProducts
from .optimize.group_heads import GroupHeads
from .optimize.hoist_parameter_work import HoistParameterWork
from .optimize.leave_out_dropout import LeaveOutDropout
from .optimize.leave_out_mask import LeaveOutMask
from .optimize.put_fast_forms import PutFastForms
from .optimize.recompute_inputs import RecomputeInputs
from .optimize.recompute_weights import RecomputeWeights
from .optimize.share_siblings import ShareSiblings
from .pipeline import (
    Declined,
    GraphPass,
    Outcome,
    PassError,
    PassReport,
    Pipeline,
    Program,
)

OPTIMIZATIONS = Pipeline(
    (
        FuseLoss(),
        LeaveOutMask(),
        ConvertMaskOnce(),
        GroupHeads(),
        LeaveOutDropout(),
        AssociateProducts(),
        ShareSiblings(),
        FoldScaleIntoAddition(),
        HoistParameterWork(),
        PutFastForms(),
        RecomputeWeights(),
        GatherProducts(),
        GatherBankProducts(),
        RecomputeInputs(),
    )
)
"""The passes that make an adapted graph run faster or in less memory, and leave its results as they are.

`fuse_loss` alone leaves out a result, the logits, and runs only where `fuse_loss=True` asked for it.
"""

__all__ = [
    "OPTIMIZATIONS",
    "AssociateProducts",
    "ConvertMaskOnce",
    "Declined",
    "DropEmptyParts",
    "DropMetadataAsserts",
    "FoldScaleIntoAddition",
    "FollowMode",
    "FuseLoss",
    "GatherBankProducts",
    "GatherProducts",
    "GraphPass",
    "GroupHeads",
    "HoistParameterWork",
    "InlineRegions",
    "InsertAdapter",
    "LeaveOutAdapters",
    "LeaveOutDropout",
    "LeaveOutInputs",
    "LeaveOutMask",
    "MergeAdapters",
    "MergedSite",
    "ObserveInputs",
    "Observer",
    "Outcome",
    "PassError",
    "PassReport",
    "Pipeline",
    "Program",
    "PutFastForms",
    "RecomputeInputs",
    "RecomputeWeights",
    "RemoveAdapters",
    "ScaleAdapters",
    "ShareSiblings",
    "input_name",
    "merge_sites",
    "read_ids",
    "weight_change",
    "without_gradient",
]
