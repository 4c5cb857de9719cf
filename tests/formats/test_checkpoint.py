"""Adapter files: what comes back is what was saved, and a bad file changes nothing and says what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lora_lite_fx as llfx
from lora_lite_fx.adapters.registry import from_config
from lora_lite_fx.formats import checkpoint
from lora_lite_fx.passes import Pipeline
from tests.support.conformance import calibration, for_any_linear, randomise, representatives, small
from tests.support.selection import broad_after, broad_unless, is_distinct, is_typical, slow_after, slow_unless
from tests.support.untouched import untouched

ALL: dict[str, Any] = {"target_names": ("fc",)}
VARIANTS = {name: small(cls, 2, **ALL) for name, cls in for_any_linear().items()}
STACK = [llfx.LoRA(r=2, dropout=0.1, target_names="fc1"), llfx.DoRA(r=4, dtype=torch.float64, **ALL)]
CONFIGS: dict[str, Any] = {**{name: VARIANTS[name] for name in representatives()}, "stack": STACK}


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.fc2(F.gelu(self.fc1(x))))
        return y


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> Any:
    """`model` with other adapter values than it starts with, in evaluation mode."""
    generator = torch.Generator().manual_seed(2)
    for tensor in llfx.adapter_state_dict(model).values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def same_state(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = llfx.adapter_state_dict(one), llfx.adapter_state_dict(other)
    same = [torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours.keys() & theirs.keys()]
    return list(ours) == list(theirs) and all(same)


@functools.cache
def exported() -> Any:
    return llfx.capture(Net(), (inputs(2, 3),))


@pytest.fixture(scope="module")
def graph() -> nn.Module:
    """A captured model without adapters: to load into it needs no capture, which makes fuzzing cheap."""
    return llfx.capture(Net())


def saved(folder: Path, cfg: Any = VARIANTS["LoRA"], model: nn.Module | None = None) -> Path:
    path = folder / "adapter.safetensors"
    model = model or Net()
    data = calibration(cfg, None, (inputs(5).to(model.get_parameter("head.weight").dtype),))
    llfx.save(randomised(llfx.rewrite(model, cfg, calibration=data)), path)
    return path


def edited(path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Rewrite the file with `edit` applied to its tensors and to the document in its metadata."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["lora_lite_fx"])
    tensors = load_file(path)
    edit(tensors, document)
    save_file(tensors, path, {"lora_lite_fx": json.dumps(document)})


def refuses(model: nn.Module, path: Path, *parts: str, error: type[Exception] = llfx.CheckpointError) -> None:
    with untouched(model), pytest.raises(error) as caught:
        llfx.load(model, path)
    for part in (str(path), *parts):
        assert part in str(caught.value), caught.value


# Round trips.


@pytest.mark.parametrize(
    ("adapt", "example"),
    broad_after(
        1,
        slow_after(2, [(llfx.rewrite, None), (llfx.wrap, None), (llfx.rewrite, (inputs(2, 3),))], several=True),
        several=True,
    ),
    ids=["traced", "wrapped", "exported"],
)
@pytest.mark.parametrize(
    "name",
    broad_unless(
        lambda name: name in ("stack", "VeRA"),
        slow_unless(lambda name: name == "stack" or is_distinct(name), CONFIGS),
    ),
)
def test_a_file_brings_back_tensors_and_outputs_bit_for_bit(
    name: str, adapt: Callable[..., nn.Module], example: Any, tmp_path: Path
) -> None:
    model, path = Net(), tmp_path / "adapter.safetensors"
    if example is not None and name != "stack":  # for one config the model itself is captured, and again to load
        model, example = exported(), None
    data = calibration(CONFIGS[name], None, (inputs(5, 2),))
    adapted = randomised(adapt(model, CONFIGS[name], example, calibration=data))
    before = adapted(inputs(4, 2))
    llfx.save(adapted, path)
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = llfx.load(model, path, example)
    assert loaded.training
    assert same_state(loaded, adapted)
    # Optimized, sums may be rounded in another order than the eager wrapper's.
    alike = llfx.optimize(loaded, Pipeline(())) if adapt is llfx.wrap else loaded
    assert torch.equal(alike.eval()(inputs(4, 2)), before)
    loaded.eval()
    trainable = {id(parameter) for parameter in loaded.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in llfx.adapter_parameters(loaded)}


def test_the_same_adapters_make_the_same_bytes(tmp_path: Path) -> None:
    adapted = randomised(llfx.rewrite(Net(), STACK))
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for file in files:
        llfx.save(adapted, file)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.broad
def test_a_file_from_a_traced_model_loads_into_an_exported_one_and_back(tmp_path: Path) -> None:
    for first, second in ((None, (inputs(2, 3),)), ((inputs(2, 3),), None)):
        adapted = randomised(llfx.rewrite(Net(), STACK, first))
        llfx.save(adapted, tmp_path / "adapter.safetensors")
        loaded = llfx.load(Net(), tmp_path / "adapter.safetensors", second).eval()
        assert same_state(loaded, adapted)
        torch.testing.assert_close(loaded(inputs(2, 3)), adapted(inputs(2, 3)))


def test_the_second_adapter_of_a_site_has_its_own_names(tmp_path: Path) -> None:
    two = [llfx.LoRA(r=2, alpha=1.0, target_names="fc1"), llfx.LoRA(r=4, **ALL)]
    state = load_file(saved(tmp_path, two))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "fc1.lora_A": (2, 8),
        "fc1.lora_B": (12, 2),
        "fc1.lora_A_2": (4, 8),
        "fc1.lora_B_2": (12, 4),
        "fc2.lora_A": (4, 12),
        "fc2.lora_B": (8, 4),
    }


def test_the_metadata_says_what_was_inserted_where(tmp_path: Path) -> None:
    cfg = [llfx.LoRA(r=2, target_names="fc2"), llfx.IA3(dtype=torch.float64, **ALL)]
    with safe_open(saved(tmp_path, cfg), "pt") as f:
        document = json.loads(f.metadata()["lora_lite_fx"])
    assert document["version"] == 1
    lora, ia3 = document["adapters"]
    common = {"target_roles": None, "exclude_names": [], "layers": None, "target_kinds": ["linear"]}
    assert lora == {
        "config": {
            **{"variant": "LoRA", "r": 2, "dtype": None, "target_names": ["fc2"], **common},
            **{"alpha": 16.0, "rank_pattern": [], "alpha_pattern": []},
            **{"dropout": 0.0, "rank_stabilized": False, "train_A": True, "bias": False},
            **{"init_weights": "kaiming_uniform"},
        },
        "sites": ["fc2"],
    }
    assert ia3 == {
        "config": {
            **{"variant": "IA3", "dtype": "float64", "target_names": ["fc"], **common},
            **{"feedforward_names": None},
        },
        "sites": ["fc1", "fc2"],
    }
    prints = document["fingerprint"]
    assert prints.keys() == {"fc1", "fc2"}
    assert len(set(prints.values())) == 2


@pytest.mark.broad
def test_loading_pissa_factorizes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, VARIANTS["PiSSA"])

    def svd(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("svd was called")

    monkeypatch.setattr(torch.linalg, "svd", svd)
    llfx.load(Net(), path)
    with pytest.raises(llfx.ConfigError, match=r"PiSSA.init .* svd was called"):
        llfx.rewrite(Net(), VARIANTS["PiSSA"])


# Another base.


@pytest.mark.parametrize("name", broad_unless(is_typical, representatives()))
def test_on_other_weights_a_variant_that_needs_its_own_is_refused_and_others_warn(name: str, tmp_path: Path) -> None:
    path, other = saved(tmp_path, VARIANTS[name]), Net(seed=1)
    expected = f"the {name} adapter was made for other weights than the model's, at 2 of 2 sites (fc1, ...)"
    if VARIANTS[name].ties_to_weight:
        refuses(other, path, expected, "Load it on the base it was made for")
    else:
        with untouched(other), pytest.warns(UserWarning, match=re.escape(expected)) as caught:
            llfx.load(other, path)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.broad
@pytest.mark.parametrize("name", ["LoRA", "PiSSA", "DeLoRA"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_the_same_base_in_bfloat16_is_the_same_base(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    # Values that bfloat16 holds exactly, or casting back would make another base.
    first, second = (Net().to(torch.bfloat16).to(dtype) for dtype in dtypes)
    path = saved(tmp_path, VARIANTS[name], first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = llfx.load(second, path)
    assert all(torch.equal(tensor, load_file(path)[n]) for n, tensor in llfx.adapter_state_dict(loaded).items())


# Files from when every variant had a rank, an alpha, and patterns of both.

OLD = json.loads((Path(__file__).parent / "configs_with_rank_and_alpha.json").read_text())
"""The configs of headers that were written then: one of each variant, with these four fields set."""


ADDED_SINCE = {"init_weights", "use_label_mask", "dropout", "rank_dropout", "rank_dropout_scale", "module_dropout"} | {
    "effective_conv",
    "block_size_pattern",
    "n_frequency_pattern",
    "blocks",
    "block_share",
    "coft",
    "eps",
}
"""Fields that newer headers have too; C3A had its own of that name from the start."""


def old_variant(name: str) -> llfx.Variant:
    """Return the config of today that an old header describes."""
    values = {"r": 4, "alpha": 6.0, "rank_pattern": {"fc1": 4}, "alpha_pattern": {"fc2": 3.0}}
    cls = llfx.registry()[name]
    has = {field.name for field in dataclasses.fields(cls)}
    return small(cls, 4, **{field: value for field, value in values.items() if field in has}, **ALL)


@pytest.mark.parametrize("name", broad_after(1, slow_unless(is_distinct, OLD)))
def test_a_file_with_an_old_header_loads(name: str, tmp_path: Path) -> None:
    variant = old_variant(name)
    assert from_config(OLD[name]) == variant
    adapted, path = Net(), saved(tmp_path, variant)
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["lora_lite_fx"])
    config = document["adapters"][0]["config"]
    assert config.keys() <= OLD[name].keys() | ADDED_SINCE, "a field that old headers did not have"
    dropped = OLD[name].keys() - config.keys()
    assert dropped <= {"r", "alpha", "rank_pattern", "alpha_pattern"}
    config |= {field: OLD[name][field] for field in dropped}
    tensors = load_file(path)
    document["checksum"] = checkpoint._checksum(document, tensors)
    save_file(tensors, path, {"lora_lite_fx": json.dumps(document)})
    loaded = llfx.load(adapted, path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in llfx.adapter_state_dict(loaded).items())


def test_every_variant_has_an_old_header() -> None:
    own = {name for name, cls in llfx.registry().items() if cls.__module__.startswith("lora_lite_fx.")}
    later = {
        "AdaLoRA",
        "AntiPaSTOAblate",
        "AntiPaSTOArrow",
        "AntiPaSTODPLR",
        "AntiPaSTOGain",
        "Full",
        "GLoRA",
        "LoRAXS",
        "PSOFT",
        "SHiRA",
        "TinyLoRA",
        "TrainableTokens",
        "VBLoRA",
        "WaveFT",
    }
    assert own == OLD.keys() | later, "those that came later need none"


@pytest.mark.parametrize("field", ["r", "alpha", "rank_pattern", "alpha_pattern"])
def test_an_old_header_may_hold_any_rank_and_alpha_that_had_no_effect(field: str) -> None:
    for value in (64, [["fc1", 3]], None, "many"):
        assert from_config({"variant": "IA3", field: value}) == llfx.IA3()
    with pytest.raises(llfx.ConfigError, match="LoRA"):
        from_config({"variant": "LoRA", field: "many"})


def test_an_old_header_with_another_unknown_field_is_refused() -> None:
    with pytest.raises(llfx.ConfigError, match=r"IA3 has no dropout: remove dropout=0\.5"):
        from_config({"variant": "IA3", "r": 8, "dropout": 0.5})


# Files that do not fit the model.


class Without(Net):
    """Has no `fc2`."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.fc1(x)[..., :8])
        return y


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)


def test_sites_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    refuses(Without(), saved(tmp_path), "1 site that the model does not have (fc2", "the model has fc1")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x))
        return y


@pytest.mark.broad
def test_sites_that_a_capture_without_inputs_does_not_see_name_the_way_out(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", torch.randn(2, 5, 8)
    model = Inner().eval()
    gm = llfx.rewrite(model, llfx.LoRA(r=2, target_names=r"linear\d"), (x,))
    randomise(gm, 0)
    llfx.save(gm, path)
    refuses(model, path, "linear1: symbolic tracing does not look into TransformerEncoder; with example_inputs")
    torch.testing.assert_close(llfx.load(model, path, (x,)).eval()(x), gm.eval()(x))


@pytest.mark.broad
def test_a_part_of_the_model_is_told_by_the_prefix_of_its_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    llfx.save(llfx.rewrite(nn.Sequential(Net()), llfx.LoRA(r=2, target_names=".")), path)
    refuses(Net(), path, "The names differ by the prefix '0.' alone")
    llfx.save(llfx.rewrite(Net(), llfx.LoRA(r=2, target_names=".")), path)
    refuses(nn.Sequential(Net()), path, "The names differ by the prefix '0.' alone")


def test_sites_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="other weights"):
        refuses(Wider(), saved(tmp_path))


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("fc1.lora_A"), "missing: fc1.lora_A"),
    "extra": (lambda t: t.update({"fc3.lora_A": torch.zeros(1)}), "unexpected: fc3.lora_A"),
    "shape": (lambda t: t.update({"fc1.lora_A": torch.zeros(3, 8)}), "(3, 8) instead of the model's (2, 8)"),
    "dtype": (lambda t: t.update({"fc2.lora_B": t["fc2.lora_B"].half()}), "dtype of fc2.lora_B: torch.float16"),
}


@pytest.mark.parametrize("what", broad_after(2, BAD_TENSORS))
def test_a_file_whose_tensors_do_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    edit, message = BAD_TENSORS[what]
    path = saved(tmp_path)
    edited(path, lambda tensors, document: edit(tensors))
    refuses(Net(), path, message)


@pytest.mark.parametrize("adapt", broad_after(1, [llfx.rewrite, llfx.wrap]))
@pytest.mark.parametrize("what", [*BAD_TENSORS, "not a tensor", "several"])
def test_a_state_dict_is_checked_whole_before_anything_changes(what: str, adapt: Callable[..., nn.Module]) -> None:
    adapted = randomised(adapt(Net(), VARIANTS["LoRA"]))
    state: dict[str, Any] = {n: torch.zeros_like(tensor) for n, tensor in llfx.adapter_state_dict(adapted).items()}
    messages = [BAD_TENSORS[what][1]] if what in BAD_TENSORS else []
    if what == "several":
        messages = [BAD_TENSORS[each][1] for each in ("shape", "extra", "dtype")]
        for each in ("shape", "extra", "dtype"):
            BAD_TENSORS[each][0](state)
    elif what == "not a tensor":
        state["fc2.lora_B"], messages = [0.0], ["not a tensor: fc2.lora_B"]
    else:
        BAD_TENSORS[what][0](state)
    with untouched(adapted), pytest.raises(llfx.CheckpointError, match="do not fit the model's adapters") as caught:
        llfx.load_adapter_state_dict(adapted, state)
    assert all(message in str(caught.value) for message in messages)
