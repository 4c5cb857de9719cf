"""Run calibration data through a graph."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..adapters.variant import Variant
from ..capture.shared_copy import shared_copy
from ..errors import CaptureError, ConfigError, shown
from ..graph.writes import own_buffers, written_buffers
from ..log import progress
from ..passes import ObserveInputs, Observer, Pipeline
from ..sites.site import Site

Batches = Iterable[tuple[Any, ...] | Mapping[str, Any] | Tensor]


def check_observable(variant: Variant, site: Site) -> None:
    """Check that a variant that starts from data is at a linear over one dimension, because only these are observed.

    Raises:
        ConfigError: it is not.
    """
    if site.kind.vector_dims != 1 and type(variant).observer is not Variant.observer:
        raise ConfigError(
            f"{type(variant).__name__}: only the inputs of plain linears can be observed on calibration data, and"
            f" {site.name!r} is {site.kind.article}."
        )


def check_calibration(calibration: object) -> None:
    """Raise `ConfigError` for one batch in place of batches; a tensor would be gone through row by row."""
    if isinstance(calibration, (str, Tensor, Mapping)) or not isinstance(calibration, (Iterable, type(None))):
        example = "batch" if isinstance(calibration, (Tensor, Mapping)) else '{"input_ids": ids}'
        raise ConfigError(
            f"calibration must hold batches, and is {shown(calibration)}. For one batch write calibration=[{example}]."
        )


@torch.no_grad()
def run_calibration(gm: fx.GraphModule, observers: Sequence[Mapping[str, Observer]], calibration: Batches) -> None:
    """Run the data through a copy of `gm` that has the observers in it.

    Args:
        gm: the graph; it is not changed.
        observers: for each variant, its observers by qualified name of the site.
        calibration: the batches, which are read once.

    Raises:
        CaptureError: a batch does not fit the graph.
        ConfigError: there is no batch, or an observer failed.
    """
    by_site: dict[str, list[Observer]] = {}
    for of_variant in observers:
        for name, observer in of_variant.items():
            by_site.setdefault(name, []).append(observer)
    observed = shared_copy(gm)
    own_buffers(observed, written_buffers(observed))
    Pipeline((ObserveInputs(by_site),)).run(observed)
    observed.eval()
    names = list(inspect.signature(gm.forward).parameters)
    count = 0
    for batch in progress(calibration, "calibration"):
        kwargs = _completed(gm, batch) if isinstance(batch, Mapping) else {}
        args = () if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
        for observer in itertools.chain(*by_site.values()):
            observer.begin(count, {**dict(zip(names, args, strict=False)), **kwargs})
        try:
            observed(*args, **kwargs)
        except ConfigError:  # of an observer
            raise
        except Exception as error:
            raise CaptureError(
                f"Calibration batch {count} does not fit the captured model ({type(error).__name__}: {error})."
                " A batch is a tuple of positional arguments or a dict of keyword arguments, as the example inputs are."
            ) from error
        count += 1
    if not count:
        raise ConfigError("calibration holds no batch.")


def _completed(gm: fx.GraphModule, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return `batch` with the inputs of a language model's graph that follow from the tokens, if they are missing."""
    inputs = {node.name for node in gm.graph.find_nodes(op="placeholder")}
    ids = batch.get("input_ids")
    missing = {} if ids is None else {"attention_mask": torch.ones_like(ids), "labels": ids}
    return {**{name: value for name, value in missing.items() if name in inputs}, **batch}
