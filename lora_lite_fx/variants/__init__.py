"""The variants, one file each. To add one, write its file and import it here."""

from .adalora import AdaLoRA
from .antipasto import AntiPaSTO
from .antipasto_ablate import AntiPaSTOAblate
from .antipasto_arrow import AntiPaSTOArrow
from .antipasto_dplr import AntiPaSTODPLR
from .antipasto_gain import AntiPaSTOGain
from .boft import BOFT
from .c3a import C3A
from .delora import DeLoRA
from .dora import DoRA
from .eva import EVA
from .fourierft import FourierFT
from .full import Full
from .glora import GLoRA
from .gralora import GraLoRA
from .hira import HiRA
from .hra import HRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .lora_xs import LoRAXS
from .miss import MiSS
from .oft import OFT
from .olora import OLoRA
from .pissa import PiSSA
from .psoft import PSOFT
from .randlora import RandLoRA
from .road import RoAd
from .shira import SHiRA
from .tinylora import TinyLoRA
from .trainable_tokens import TrainableTokens
from .vblora import VBLoRA
from .vera import VeRA
from .waveft import WaveFT

__all__ = [
    "BOFT",
    "C3A",
    "EVA",
    "HRA",
    "IA3",
    "OFT",
    "PSOFT",
    "AdaLoRA",
    "AntiPaSTO",
    "AntiPaSTOAblate",
    "AntiPaSTOArrow",
    "AntiPaSTODPLR",
    "AntiPaSTOGain",
    "DeLoRA",
    "DoRA",
    "FourierFT",
    "Full",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "MiSS",
    "OLoRA",
    "PiSSA",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "TinyLoRA",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
    "WaveFT",
]
