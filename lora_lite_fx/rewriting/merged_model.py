"""Save a graph without adapters, as `merge` returns it, as the files of the model that it was captured from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import fx

from ..errors import AdapterError, CheckpointError
from ..graph.tensors import outside_inference_mode
from ..storage.dequantized import restore_quantized, stand_ins
from .model_of_graph import model_of_graph


def save_as_model(gm: fx.GraphModule, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Write the model that a graph was captured from, with the weights of the graph, by its own `save_pretrained`.

    A folder that is new has all files or does not appear.

    Args:
        gm: the graph, which has no adapters.
        save_directory: made if it is not there.
        options: for `save_pretrained` of the model, such as `max_shard_size`.

    Raises:
        AdapterError: the graph does not have all weights of the model, which does not exist any more; or the class
            of the model cannot be loaded with what the graph has.
        CheckpointError: the folder is a file.
    """
    model, folder = _model_to_save(gm), Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. It is unchanged.")
    if options.get("push_to_hub") or (folder.exists() and any(folder.iterdir())):
        model.save_pretrained(folder, **options)  # which removes parts of an older model, and takes its name from there
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lora_lite_fx-", dir=folder.parent) as temporary:
        model.save_pretrained(Path(temporary) / "model", **options)
        (Path(temporary) / "model").replace(folder)


@outside_inference_mode()
def _model_to_save(gm: fx.GraphModule) -> Any:
    """Return the model that a graph without adapters was captured from, with the weights of the graph.

    Raises:
        AdapterError: there is no such model, or its class cannot be loaded with what the graph has.
    """
    model, new_biases = model_of_graph(
        gm, "save_pretrained", "llfx.merge(llfx.adapt(model, 'adapter.safetensors')).save_pretrained(folder)"
    )
    if new_biases:
        raise AdapterError(
            f"The graph has a bias at {new_biases[0]}, and {type(model).__name__} has none there, so that"
            " from_pretrained would leave it out. The way out: torch.save(llfx.merge(graph).state_dict(), path)."
        )
    if stand_ins(model) and getattr(model.config, "quantization_config", None) is None:
        raise AdapterError(
            f"{next(iter(stand_ins(model)))} is quantized, and the config of {type(model).__name__} does not say so, so"
            " that from_pretrained could not read it. The way out: a base that from_pretrained has quantized."
        )
    restore_quantized(model)
    return model
