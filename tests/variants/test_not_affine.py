"""Variants that are not affine do all that others do, but for `merge`."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite_fx as llfx
from tests.support.conformance import close, gradients, randomise, rewrite_and_wrap
from tests.support.models import GatedMLP, Net, SharedLinear, ids, net, one_layer_llama
from tests.support.own_variants import Bottleneck, Gate, registered
from tests.support.selection import broad_after

VARIANTS: list[type[llfx.Variant]] = [Gate, Bottleneck]
every = pytest.mark.parametrize("cls", broad_after(1, VARIANTS), ids=lambda cls: cls.__name__)
TRACED, OTHER = (ids(2, 5),), (ids(3, 4, seed=1),)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with registered(Gate, Bottleneck):
        yield


@pytest.fixture(scope="module")
def base() -> tuple[Net, Any]:
    model = net(GatedMLP, SharedLinear)
    return model, llfx.capture(model, TRACED)


def _adapted(base: tuple[Net, Any], cls: type[llfx.Variant]) -> tuple[Any, Any]:
    """Return the rewritten graph and the wrapped model, with the same random adapters."""
    gm, wrapped = rewrite_and_wrap(base[1], [cls(target_names="."), llfx.LoRA(r=2, target_names="gate")])
    for adapted in (gm, wrapped):
        randomise(adapted, 1)
    return gm.eval(), wrapped.eval()


@every
def test_training_steps_are_those_of_the_wrapper(cls: type[llfx.Variant], base: tuple[Net, Any]) -> None:
    trained = []
    for adapted in _adapted(base, cls):
        optimizer = torch.optim.AdamW(llfx.adapter_parameters(adapted), lr=0.01)
        for seed in range(3):
            optimizer.zero_grad()
            adapted.train()(ids(2, 6, seed=seed)).square().mean().backward()
            optimizer.step()
        trained.append(llfx.adapter_state_dict(adapted))
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        close(tensor, trained[1][name], 1e-4, name)


@every
def test_files_exports_copies_and_removal(cls: type[llfx.Variant], base: tuple[Net, Any], tmp_path: Path) -> None:
    gm, wrapped = _adapted(base, cls)
    y = gm(*OTHER)
    close(y, wrapped(*OTHER), 1e-5, "wrapped")
    llfx.save(gm, tmp_path / "adapter.safetensors")
    assert torch.equal(llfx.load(base[1], tmp_path / "adapter.safetensors").eval()(*OTHER), y)
    dynamic = ([torch.export.Dim.AUTO] * 2,)
    file = io.BytesIO()
    torch.export.save(torch.export.export(gm, TRACED, dynamic_shapes=dynamic), file)
    file.seek(0)
    exported: Any = torch.export.load(file).module()
    close(exported(*OTHER), y, 1e-5, "exported")
    assert list(llfx.adapter_state_dict(exported)) == list(llfx.adapter_state_dict(gm))
    assert torch.equal(copy.deepcopy(gm)(*OTHER), y)
    assert torch.equal(llfx.remove(gm)(*OTHER), base[1](*OTHER))
    with pytest.raises(llfx.AdapterError, match=rf"^{cls.__name__} at '[\w.]+' cannot be merged"):
        llfx.merge(gm)
    assert torch.equal(gm(*OTHER), y)


@pytest.mark.broad
@every
def test_torch_compile_and_frozen(cls: type[llfx.Variant], base: tuple[Net, Any]) -> None:
    gm, wrapped = _adapted(base, cls)
    expected, grads = gradients(wrapped, OTHER)
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(gm), backend="aot_eager", fullgraph=True)
    y, own = gradients(compiled, OTHER)
    close(y, expected, 1e-5, "compiled")
    for name, grad in own.items():
        close(grad, grads[name.removeprefix("_orig_mod.")], 1e-4, name)
    with torch.no_grad(), llfx.frozen(gm):
        close(gm(*OTHER), expected, 1e-5, "frozen")


@pytest.mark.slow
@every
def test_checkpointed_layers_and_generation(cls: type[llfx.Variant]) -> None:
    model = one_layer_llama().eval()
    tokens = torch.arange(1, 9).reshape(2, 4)
    cfg = cls(target_roles=("query", "gate", "down"))
    plain = llfx.rewrite(model, cfg)
    checkpointed = llfx.rewrite(model, cfg, checkpoint_layers=True)
    results = []
    for gm in (plain, checkpointed):
        randomise(gm, 1)
        results.append(gradients(gm.train(), (tokens,)))
    (y, grads), (expected, others) = results
    close(y, expected, 1e-6, "checkpointed")
    for name, grad in grads.items():
        close(grad, others[name], 1e-5, name)
    adapted = llfx.adapt(model, cfg)
    llfx.load_adapter_state_dict(adapted, llfx.adapter_state_dict(plain))
    generated = adapted.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, _greedy(llfx.wrap(model, cfg), plain, tokens))


def _greedy(wrapped: Any, like: Any, tokens: Tensor) -> Tensor:
    """Generate step by step, without a cache, with the adapters of the graph `like`."""
    llfx.load_adapter_state_dict(wrapped, llfx.adapter_state_dict(like))
    for _ in range(3):
        tokens = torch.cat([tokens, wrapped(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens
