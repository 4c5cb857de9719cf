"""Adapters on the Hugging Face Hub, found in a cache that is made by hand; nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import lora_lite_fx as llfx
from tests.support.peft_models import ResidualMLP

X = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
COMMITS = {"main": "1" * 40, "v2": "2" * 40}


def trained(value: float) -> fx.GraphModule:
    torch.manual_seed(0)
    gm = llfx.rewrite(ResidualMLP().eval(), llfx.LoRA(r=2, target_names="fc1"), (X,)).eval()
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(gm):
            parameter.fill_(value)
    return gm


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of the Hub with `someone/adapter`: a main branch, and a tag with the adapter in a folder."""
    hub = tmp_path / "hub"
    repository = hub / "models--someone--adapter"
    (repository / "refs").mkdir(parents=True)
    for reference, commit in COMMITS.items():
        (repository / "refs" / reference).write_text(commit)
    llfx.save_peft(trained(0.3), repository / "snapshots" / COMMITS["main"])
    llfx.save_peft(trained(0.7), repository / "snapshots" / COMMITS["v2"] / "checkpoints" / "last")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_a_repository_in_the_cache_is_loaded_with_revision_and_subfolder(cache: Path) -> None:
    model = ResidualMLP().eval()
    cached: list[tuple[dict[str, Any], float]] = [
        ({}, 0.3),
        ({"revision": COMMITS["main"]}, 0.3),
        ({"revision": "v2", "subfolder": "checkpoints/last"}, 0.7),
    ]
    for arguments, value in cached:
        gm = llfx.load_peft(model, "someone/adapter", (X,), **arguments).eval()
        assert torch.allclose(gm(X), trained(value)(X))


def test_what_is_not_cached_is_said_offline(cache: Path, tmp_path: Path) -> None:
    model = ResidualMLP().eval()
    missing: list[tuple[str, dict[str, Any]]] = [
        ("someone/other", {}),
        ("someone/adapter", {"revision": "v3"}),
        ("someone/adapter", {"subfolder": "nowhere"}),
    ]
    for name, arguments in missing:
        with pytest.raises(llfx.CheckpointError, match=f"{name}.* is neither a directory here nor in the local cache"):
            llfx.load_peft(model, name, (X,), **arguments)
    shutil.rmtree(cache / "snapshots" / COMMITS["v2"])
    with pytest.raises(llfx.CheckpointError, match="someone/adapter at v2, folder checkpoints/last is neither"):
        llfx.load_peft(model, "someone/adapter", (X,), revision="v2", subfolder="checkpoints/last")


def test_directories_have_folders_and_no_revisions(cache: Path) -> None:
    model, snapshot = ResidualMLP().eval(), cache / "snapshots" / COMMITS["v2"]
    gm = llfx.load_peft(model, snapshot, (X,), subfolder="checkpoints/last").eval()
    assert torch.allclose(gm(X), trained(0.7)(X))
    with pytest.raises(llfx.CheckpointError, match="so it has no revision"):
        llfx.load_peft(model, snapshot, (X,), revision="v2")
