"""Compare an adapted model with the eager wrapper of the same adapters, call by call."""

from __future__ import annotations

from typing import Any

import lora_lite_fx as llfx

from .conformance import close, randomise

EVERYWHERE = llfx.LoRA(r=2, target_names=(".",))


def adapted_and_wrapped(model: Any, cfg: Any = EVERYWHERE) -> tuple[Any, Any]:
    """Return the model adapted, and the eager wrapper, with the same random adapters."""
    adapted, wrapped = llfx.adapt(model, cfg), llfx.wrap(model, cfg)
    randomise(adapted, 0)
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(adapted))
    return adapted, wrapped


def require_equal(models: tuple[Any, Any], inputs: dict[str, Any], training: bool = False) -> None:
    """Compare the logits of a call, and with labels the loss and its gradients by the names of the adapters."""
    actual, expected = (model.train(training)(**inputs) for model in models)
    close(actual.logits, expected.logits, 1e-8, "logits")
    if expected.get("loss") is not None:
        close(actual.loss, expected.loss, 1e-8, "loss")
        actual.loss.backward()
        expected.loss.backward()
        ours, theirs = (dict(model.named_parameters()) for model in models)
        for name in llfx.adapter_state_dict(models[0]):
            if theirs[name].grad is not None:
                close(ours[name].grad, theirs[name].grad, 1e-7, name)
        for model in models:
            model.zero_grad()
