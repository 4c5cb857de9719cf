"""What PEFT's configs mean, with PEFT itself as the oracle: which modules, and how a new adapter starts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.adapters.patterns import occurs
from tests.support.releases import since
from tests.support.selection import broad_after

# Which modules.


def ours(config: Any, name: str) -> bool:
    variant = llfx.from_peft_config(config)
    assert isinstance(variant, llfx.Variant)
    return occurs(variant.target_names or (), name) and not occurs(variant.exclude_names, name)


def agree(config: peft.LoraConfig, names: list[str]) -> None:
    assert {name: ours(config, name) for name in names} == {
        name: bool(check_target_module_exists(config, name)) for name in names
    }


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.01.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.q_proj",
    "model.layers.0.mlp.experts.1.q_proj",
    "encoder.block.0.layer.1.q_proj",
    "encoder.block.1.layer.0.q_proj",
    "layers.0.q_proj",
    "layers.1.q_proj",
    "h.1.attn.q_proj",
    "transformer.h.1.attn.q_proj",
    "transformer.h.0.blocks.1.q_proj",
    "1.q_proj",
    "0.1.q_proj",
    "a.0.1.q_proj",
    "q_proj",
    "model.layers.1.q_proj.inner",
    "model.layers.1.my_q_proj",
    "model.layers1.1.q_proj",
]
TARGETS = [["q_proj"], ["layers.1.q_proj", "attn.q_proj"], ["q_proj", "inner"], ["1.q_proj"]]
STACKS: list[Any] = [
    None,
    [],
    "",
    "layers",
    "h",
    ["layers", "h"],
    ["experts", "layers"],
    ["blocks", "block"],
    "layer|layers",
    "(?:layers|h)",
    r"layers\d?",
    r"(\w+)",
]


@since("peft", "0.21", "Layers in stacks of several names are counted")
@pytest.mark.parametrize("stacks", STACKS, ids=repr)
def test_layers_are_those_that_peft_takes(stacks: Any) -> None:
    for targets in TARGETS:
        for layers in ([1], [0, 11], 0, 1, [], None):
            wanted = {} if layers is None else {"layers_to_transform": layers, "layers_pattern": stacks}
            agree(peft.LoraConfig(target_modules=targets, **wanted), NAMES)


PARTS = st.sampled_from(["layers", "h", "mlp", "experts", "q", "v", "qv", "0", "1", "01", "2", "10", "x0", ""])
PATHS = st.lists(PARTS, min_size=1, max_size=7).map(".".join)
SOME_STACKS = st.sampled_from(["layers", "h", "experts", r"\w+", "l.*", "h|layers", "[a-z]+", "(?:mlp|h)"])


@pytest.mark.broad
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    targets=st.lists(st.one_of(PATHS, st.sampled_from(["q", "v"])), min_size=1, max_size=3),
    excluded=st.lists(PATHS, max_size=2),
    layers=st.one_of(st.none(), st.integers(0, 10), st.lists(st.integers(0, 10), max_size=3)),
    stacks=st.one_of(st.none(), SOME_STACKS, st.lists(SOME_STACKS, max_size=3)),
    names=st.lists(PATHS, min_size=1, max_size=8),
)
def test_any_lists_mean_what_they_mean_in_peft(
    targets: list[str], excluded: list[str], layers: Any, stacks: Any, names: list[str]
) -> None:
    chosen = {} if layers is None else {"layers_to_transform": layers, "layers_pattern": stacks}
    agree(peft.LoraConfig(target_modules=targets, exclude_modules=excluded or None, **chosen), [*names, *targets])


EXPRESSIONS = [
    r"(?i).*Q_PROJ",
    r"(?i)model\.LAYERS\.\d+\..*",
    r"(?i)(?s).*Q_proj",
    "(?x) .* q_proj  # all of them",
    r"(?ix)MODEL .* Q_proj",
    r"(?a)model\.\w+\.1\..*",
    r"(?i:MODEL).*q_proj",
    r".*(?i:Q)_proj",
    r"model|layers\.0\.q_proj",
    r".*\.1\..*",
    "q_proj",
    "",
]


@pytest.mark.parametrize("expression", EXPRESSIONS[:-1])
def test_expressions_with_flags_mean_what_they_mean_in_peft(expression: str) -> None:
    agree(peft.LoraConfig(target_modules=expression), NAMES)
    agree(peft.LoraConfig(target_modules=["q_proj"], exclude_modules=expression), NAMES)


def test_adapters_that_are_to_be_tied_are_refused() -> None:
    with pytest.raises(
        llfx.ConfigError, match="ensure_weight_tying=True with embed_tokens or lm_head cannot be represented"
    ):
        llfx.from_peft_config(peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    llfx.from_peft_config(peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=False))


# How a new adapter starts.

METHODS: dict[str, Any] = {
    "LORA": peft.LoraConfig,
    "DORA": lambda **fields: peft.LoraConfig(use_dora=True, **fields),
    "IA3": lambda **fields: peft.IA3Config(feedforward_modules=[], **fields),
    "HRA": peft.HRAConfig,
    "HRA orthogonal": lambda **fields: peft.HRAConfig(apply_GS=True, **fields),
    "DELORA": peft.DeloraConfig,
    "ROAD": lambda **fields: peft.RoadConfig(group_size=8, **fields),
    "OFT": lambda **fields: peft.OFTConfig(oft_block_size=8, **fields),
    "BOFT": lambda **fields: peft.BOFTConfig(boft_block_size=8, **fields),
    "C3A": lambda **fields: peft.C3AConfig(block_size=8, **fields),
    "LOHA": peft.LoHaConfig,
    "LOKR": peft.LoKrConfig,
    "VERA": lambda **fields: peft.VeraConfig(r=8, **fields),
    "RANDLORA": lambda **fields: peft.RandLoraConfig(r=8, **fields),
    "FOURIERFT": lambda **fields: peft.FourierFTConfig(n_frequency=300, **fields),
    "GRALORA": lambda **fields: peft.GraloraConfig(r=8, **fields),
    "HIRA": lambda **fields: peft.HiraConfig(r=8, **fields),
    "MISS": lambda **fields: peft.MissConfig(r=8, mini_r=8, **fields),
}
WIDTH = 64
_LORA = (
    True,
    False,
    None,
    "gaussian",
    "orthogonal",
    "pissa",
    "pissa_niter_4",
    "olora",
    "eva",
    "mica",
    "corda",
    "loftq",
)
OPTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(METHODS, (True, False)),
    "LORA": _LORA,
    "DORA": (True, False, None, "gaussian", "orthogonal", "pissa", "olora"),
    "C3A": (True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
    "LOKR": (True, False, "lycoris"),
    "HIRA": (True, False, None, "gaussian"),
    "MISS": (True, False, "bat", "mini"),
}
HONOURED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(METHODS, (True,)),
    "LORA": (True, "gaussian", "pissa", "olora", "eva"),
    "DORA": (True, "gaussian"),
    "HRA orthogonal": (False,),
    "C3A": OPTIONS["C3A"],
    "FOURIERFT": (True, False),
    "HIRA": (True, "gaussian"),
    "MISS": (True, "bat", "mini"),
}
START = {"LORA": "init_lora_weights", "DORA": "init_lora_weights", "IA3": "init_ia3_weights"}
CASES = [(method, option) for method in METHODS for option in OPTIONS[method]]
# PEFT starts EVA from data, and takes factors out of the weights for these two; test_same_values.py compares them.
BY_OTHER_TESTS = ("eva", "pissa", "olora")


def config_of(method: str, option: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {"loftq_config": {"loftq_bits": 4}} if option == "loftq" else {}
        return METHODS[method](target_modules=["fc"], **{START.get(method, "init_weights"): option}, **extra)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


def spread(tensors: list[Tensor]) -> list[tuple[int, float]]:
    """Return the number of elements of each tensor and their root mean square, in an order of both."""
    return sorted((tensor.numel(), tensor.detach().square().mean().sqrt().item()) for tensor in tensors)


@pytest.mark.parametrize(
    ("method", "option"), broad_after(8, CASES, several=True), ids=[f"{method}-{option}" for method, option in CASES]
)
def test_every_start_is_that_of_peft_or_refused(method: str, option: Any) -> None:
    try:
        config = config_of(method, option)
    except (ImportError, ValueError) as error:
        pytest.skip(f"PEFT itself refuses it here: {error}")
    if option not in HONOURED[method] or type(option) not in [type(o) for o in HONOURED[method] if o == option]:
        with pytest.raises(llfx.ConfigError, match="cannot be represented"):
            llfx.from_peft_config(config)
        return
    cfg = llfx.from_peft_config(config)
    if option in BY_OTHER_TESTS:
        assert type(cfg).__name__.lower() == option
        return
    torch.manual_seed(1)
    gm = llfx.rewrite(Net(), cfg)
    theirs = peft.get_peft_model(copy.deepcopy(Net()), config)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    for (size, mine), (their_size, their) in zip(
        spread(list(llfx.adapter_parameters(gm))), spread(trained), strict=True
    ):
        assert size == their_size
        assert mine == pytest.approx(their, rel=0.25, abs=1e-6)


def test_the_counts_of_starts() -> None:
    assert len(CASES) == 59
    assert sum(map(len, HONOURED.values())) == 31


def test_evas_options_are_those_of_its_config() -> None:
    def eva(**options: Any) -> Any:
        config = peft.LoraConfig(
            target_modules=["fc"], init_lora_weights="eva", eva_config=peft.tuners.lora.EvaConfig(**options)
        )
        return llfx.from_peft_config(config)

    assert (eva().rho, eva(rho=1.5).rho, eva().center) == (2.0, 1.5, True)
    assert (eva().use_label_mask, eva(use_label_mask=False).use_label_mask) == (True, False)
    assert eva(use_label_mask=False, label_mask_value=0) == eva(use_label_mask=False)
    for refused in ({"whiten": True}, {"adjust_scaling_factors": False}, {"label_mask_value": 0}):
        with pytest.raises(llfx.ConfigError, match=next(iter(refused))):
            eva(**refused)


def test_how_an_adapter_started_does_not_matter_to_its_file(tmp_path: Any) -> None:
    config = peft.LoraConfig(target_modules=["fc"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(Net()), config).eval()
    theirs.save_pretrained(str(tmp_path))
    x = torch.randn(3, WIDTH)
    assert torch.allclose(llfx.load_peft(Net(), tmp_path).eval()(x), theirs(x), atol=1e-5)
    with pytest.raises(llfx.ConfigError, match="init_lora_weights=False"):
        llfx.from_peft_config(config)


def test_a_user_of_peft_is_told_how_to_start_from_gaussian_numbers() -> None:
    anything: Any = llfx.LoRA
    with pytest.raises(llfx.ConfigError, match='write init_weights="gaussian"'):
        anything(init_lora_weights="gaussian")
    with pytest.raises(llfx.ConfigError, match="must be one of 'kaiming_uniform', 'gaussian'"):
        anything(init_weights="orthogonal")
    with pytest.raises(llfx.ConfigError, match="no field 'init_weights'"):
        llfx.PiSSA(init_weights="gaussian")  # type: ignore[call-arg]
