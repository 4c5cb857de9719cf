"""Draw trials of kind "calls"."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import operations as ops
from tests.fuzz.blocks import BLOCKS
from tests.fuzz.modules import Net
from tests.fuzz.oracle import FORMULAS
from tests.fuzz.trial_calls import CONTEXTS, PATHS, PLAIN, STEPS, Call, Calls, Step

_HOWS: tuple[tuple[Any, tuple[dict[str, Any], ...]], ...] = (
    (ops.Mode, ({"training": False}, {"training": True})),
    (ops.Tensors, ({"how": "in place"}, {"how": "data"}, {"how": "replaced"})),
    (ops.Bias, ({},)),
    (ops.Buffer, ({"how": "assigned"}, {"how": "in place"}, {"how": "none"})),
    (ops.Setting, ({},)),
    (ops.Exchange, ({"how": "module"}, {"how": "class"})),
    (ops.Hook, ({"kind": "forward"}, {"kind": "pre"})),
    (ops.Forward, ({},)),
    (ops.Unfreeze, ({},)),
)


@functools.cache
def changes_of(net: Net, hugging_face: bool) -> tuple[ops.Change, ...]:
    """Return all changes that fit a part of a net."""
    parts = dict(net.build(hugging_face).named_modules())
    kinds = [(cls, fields) for cls, hows in _HOWS for fields in hows]
    made = [cls(name, **fields) for cls, fields in kinds for name in parts]
    return tuple(change for change in made if change.fits(parts[change.part]))


@st.composite
def calls(draw: Any, paths: tuple[str, ...] = PATHS) -> Calls:
    """Draw a trial. Hypothesis makes each choice the first one if it can, and those are no features."""
    names = draw(st.lists(st.sampled_from([PLAIN, *sorted(BLOCKS.keys() - {PLAIN})]), min_size=1, max_size=3))
    net, path = Net(tuple(names), draw(st.booleans())), draw(st.sampled_from(paths))
    change = st.sampled_from(changes_of(net, path == "adapt"))
    step, call = st.builds(Step, st.sampled_from(STEPS)), st.builds(Call, st.sampled_from(list(CONTEXTS)))
    return Calls(
        net,
        path,
        draw(st.sampled_from(list(FORMULAS))),
        tuple(draw(st.lists(change, max_size=2))),
        tuple(draw(st.lists(call | step | change, min_size=2, max_size=6))),
        draw(st.booleans()),
    )
