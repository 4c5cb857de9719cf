"""Trials of kind "peft": a folder that PEFT writes of a random config, read, trained for a step, and written again.

The gradients are compared by the names of PEFT's files: both train a step of SGD, and the files after it are compared.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_lite_fx as llfx
from tests.fuzz.verdict import Void, Wrong, require_close, the_oracle
from tests.support import peft_oracles as peft_oracles  # mends two of PEFT's operations that need a GPU

TOLERANCE = 2e-4
RATE = 0.01

METHODS: dict[str, tuple[Any, dict[str, tuple[Any, ...]]]] = {
    "LoRA": (
        peft.LoraConfig,
        {
            "r": (4, 2),
            "lora_alpha": (6, 8),
            "bias": ("none", "all", "lora_only"),
            "use_dora": (False, True),
            "use_rslora": (False, True),
            "lora_bias": (False, True),
            "rank_pattern": ({}, {"fc1": 3}),
            "alpha_pattern": ({}, {"fc2": 5}),
            "modules_to_save": (None, ["head"]),
            "init_lora_weights": (True, "gaussian", "pissa", "olora", "orthogonal"),
        },
    ),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": (4, 2), "bias": ("none", "all", "boft_only")}),
    "OFT": (peft.OFTConfig, {"oft_block_size": (4, 2), "bias": ("none", "all", "oft_only"), "coft": (False, True)}),
    "GLoRA": (
        peft.GloraConfig,
        {
            "r": (4, 2),
            "config_A_B": ("lora", "vector", "constant"),
            "config_C": ("lora", "vector", "none"),
            "config_D_E": ("constant", "vector", "none"),
            "bias": ("none", "all", "glora_only"),
        },
    ),
    "HRA": (peft.HRAConfig, {"r": (4, 2), "apply_GS": (False, True), "bias": ("none", "all", "hra_only")}),
    "IA3": (peft.IA3Config, {"feedforward_modules": ([], ["fc2"]), "modules_to_save": (None, ["head"])}),
    "LoHa": (peft.LoHaConfig, {"r": (4, 2), "alpha": (6, 8), "use_effective_conv2d": (False, True)}),
    "LoKr": (
        peft.LoKrConfig,
        {"r": (4, 2), "alpha": (6, 8), "decompose_both": (False, True), "use_effective_conv2d": (False, True)},
    ),
    "VeRA": (peft.VeraConfig, {"r": (4, 2), "bias": ("none", "all", "vera_only")}),
    "RandLoRA": (peft.RandLoraConfig, {"r": (4, 2), "bias": ("none", "all", "randlora_only")}),
    "DeLoRA": (peft.DeloraConfig, {"r": (4, 2), "delora_lambda": (3, 5), "bias": ("none", "all", "delora_only")}),
    "MiSS": (peft.MissConfig, {"r": (4, 2), "bias": ("none", "all", "miss_only")}),
    "RoAd": (peft.RoadConfig, {"variant": ("road_1", "road_2", "road_4"), "group_size": (4, 2)}),
    "C3A": (peft.C3AConfig, {"block_size": (4, 2)}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": (20, 10), "scaling": (8.0, 2.0)}),
    "SHiRA": (peft.ShiraConfig, {"r": (2, 1)}),
    "HiRA": (peft.HiraConfig, {"r": (4, 2)}),
    "LNTuning": (peft.LNTuningConfig, {}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": (4, 2), "lora_alpha": (6, 8), "bias": ("none", "all", "lora_only")}),
    "GraLoRA": (peft.GraloraConfig, {"r": (4,), "alpha": (6, 8), "hybrid_r": (0, 2)}),
}
"""By method, PEFT's config and the values of its fields; the first of each is the plainest."""

if hasattr(peft.LoraConfig, "velora_config"):
    METHODS["LoRA"][1]["velora_config"] = (None, "velora")


class Small(nn.Module):
    """Linears with and without a bias, a convolution, an attention module and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = x + self.conv(x.unsqueeze(1)).mean(1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.fc2(torch.tanh(self.norm(self.fc1(x)))))


@dataclass(frozen=True)
class Folder:
    """A folder of PEFT.

    Args:
        method: a key of `METHODS`.
        fields: of its config.
        targets: the modules that are adapted.
    """

    method: str
    fields: tuple[tuple[str, Any], ...]
    targets: tuple[str, ...] = ("fc1", "fc2")

    def features(self) -> frozenset[str]:
        plain = {name: values[0] for name, values in METHODS[self.method][1].items()}
        words = {f"{name}={value!r}" for name, value in self.fields if value != plain[name]}
        kinds = {"conv": "convolution", "attention": "MultiheadAttention", "head": "head"}
        return frozenset({self.method, *words} | {kinds[name] for name in self.targets if name in kinds})

    def config(self) -> peft.PeftConfig:
        fields = {name: value for name, value in self.fields if value is not None and value != {}}
        if fields.get("velora_config"):
            fields["velora_config"] = peft.VeloraConfig(num_groups=2)
        if self.method == "LNTuning":
            return peft.LNTuningConfig(target_modules=["norm"])
        if self.method == "AdaLoRA":
            fields["total_step"] = 1
        targets = [*self.targets, *fields.get("feedforward_modules", [])]
        config: peft.PeftConfig = METHODS[self.method][0](target_modules=sorted(set(targets)), **fields)
        return config

    def check(self) -> None:
        torch.manual_seed(5)
        base = Small().eval()
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
        with the_oracle():
            theirs = peft.get_peft_model(copy.deepcopy(base), self.config()).eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in theirs.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            expected = theirs(x)
        with tempfile.TemporaryDirectory() as folder:
            with the_oracle():
                theirs.save_pretrained(folder)
                again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x)
                if not torch.allclose(again, expected, atol=1e-4):  # as of trained biases in PEFT 0.20
                    raise Void("PEFT's file does not hold what PEFT computed")
            gm = llfx.load_peft(base, folder, (x,)).eval()
        y = gm(x)
        require_close(y, expected.detach(), TOLERANCE, "output")
        if dict(self.fields).get("init_lora_weights") in ("pissa", "olora"):
            return  # they are written as a LoRA of twice the rank beside the weight that PEFT divides
        self._compare_steps(gm, y, theirs, expected)

    def _compare_steps(self, gm: Any, y: Tensor, theirs: Any, expected: Tensor) -> None:
        """Compare the files after a step of SGD, tensor by tensor."""
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        files = []
        trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
        for model, output, parameters in ((theirs, expected, trained), (gm, y, llfx.adapter_parameters(gm))):
            (output * direction).sum().backward()
            with tempfile.TemporaryDirectory() as folder:
                steps = []
                for step in (0, 1):
                    if step:
                        torch.optim.SGD(parameters, lr=RATE).step()
                    path = Path(folder) / str(step)
                    if model is theirs:
                        theirs.save_pretrained(str(path))
                    else:
                        llfx.save_peft(gm, path)
                    steps.append(load_file(path / "adapter_model.safetensors"))
            files.append(_changes(*steps))
        theirs_by_name, ours_by_name = files
        if not theirs_by_name.keys() & ours_by_name.keys():
            raise Void("the files have other names")
        if odd := sorted(theirs_by_name.keys() ^ ours_by_name.keys()):
            raise Wrong("trained tensors in the file", odd[0])
        for name, change in theirs_by_name.items():
            require_close(ours_by_name[name], change, 20 * TOLERANCE, "file after a step", f"{name} ")


def _changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients that a step went by, without those that are nothing but rounding of others."""
    changes = {name: (after[name].float() - before[name].float()) / RATE for name in after}
    largest = {name: float(change.abs().max()) for name, change in changes.items() if change.numel()}
    least = TOLERANCE * max(largest.values(), default=0.0)
    return {name: changes[name] for name, size in largest.items() if size > least}


@st.composite
def folders(draw: Any) -> Folder:
    """Draw a trial."""
    method = draw(st.sampled_from(list(METHODS)))
    fields = tuple((name, draw(st.sampled_from(values))) for name, values in METHODS[method][1].items())
    targets = draw(st.lists(st.sampled_from(["fc1", "fc2", "head", "conv", "attention"]), unique=True, max_size=2))
    return Folder(method, fields, tuple(targets) or ("fc1", "fc2"))
