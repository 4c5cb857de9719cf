"""What is known to be open: each entry is to go as soon as it is mended, and a test fails if it stays longer."""

from __future__ import annotations

GRAPHS = ("rewrite", "traced")


def _cells(group: str, name: str, paths: tuple[str, ...], reason: str) -> dict[tuple[str, str, str], str]:
    return {(group, name, path): reason for path in paths}


OF_ACCOUNT: dict[tuple[str, str, str], str] = {
    **_cells("parameters", "a bias set where there was none", (*GRAPHS, "adapt"), "it changes nothing"),
    **_cells("buffers", "set where there was None", (*GRAPHS, "adapt"), "it changes nothing"),
    **_cells("mode", "eval() of a norm, before capture", (*GRAPHS, "adapt"), "the norm follows the model's mode"),
    **_cells("mode", "eval() of a dropout, before capture", (*GRAPHS, "adapt"), "it follows the model's mode"),
    **_cells("mode", "train() of a norm, before capture", (*GRAPHS, "adapt"), "the norm follows the model's mode"),
    **_cells("mode", "eval() of a norm, after capture", ("rewrite", "adapt"), "the norm follows the model's mode"),
    **_cells("mode", "eval() of a dropout, after capture", ("adapt",), "it follows the model's mode"),
    **_cells("mode", "train() of a norm, after capture", ("rewrite", "adapt"), "the norm follows the model's mode"),
    **_cells("modules", "another class, without tensors", ("adapt",), "the graph has the class of its capture"),
    **_cells("modules", "another class, of an adapted module", ("adapt", "backend"), "it changes nothing"),
    **_cells("modules", "forward replaced", GRAPHS, "it changes nothing"),
    **_cells("hooks", "a forward pre-hook, before capture", ("adapt",), "a gradient is that without the hook"),
    **_cells("process", "is_grad_enabled(), asked", ("traced",), "the graph has the answer of its capture"),
    **_cells("process", "is_autocast_enabled(), asked", (*GRAPHS, "adapt"), "the answer of the capture stays"),
    **_cells("process", "a region without gradients", ("traced",), "the graph does not have the region"),
    **_cells("process", "a region of autocast", ("traced",), "the graph does not have the region"),
    **_cells("process", "Python state that a call changes", ("traced",), "the graph has the state of its capture"),
}
"""Cells of the account, by group, name and path, that do otherwise today, and how."""
