"""Time a bank of adapters: one batch with an adapter for each row, beside one adapter and PEFT's ways.

    pip install -e ".[examples]" "peft>=0.20,<0.22"
    python examples/benchmark_bank.py                # two widths; some minutes
    python examples/benchmark_bank.py --quick        # a tiny model: that it runs

Decoding computes one token for each of 8 rows, in evaluation and without gradients, inside `frozen`. A step trains 8
rows of 128 tokens. All arms run in turn, in one process and on one thread, and the outputs of those that compute the
same are compared before anything is timed. What is printed is the median, and that of the ratios to the first arm.

The models are bodies of Llama's form, without a head, of which `LoRA` with r=16 adapts attention and MLP.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import lora_lite_fx as llfx

ROWS, RANK = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Arms = dict[str, Callable[[], object]]


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    torch.set_num_threads(1)
    cases = [(64, 1, 4)] if args.quick else [(576, 6, 128), (2048, 2, 128)]
    rounds = 3 if args.quick else 21
    lines = [
        f"torch {torch.__version__}, peft {peft.__version__}, {platform.processor() or platform.machine()}, 1 thread"
    ]
    for width, layers, length in cases:
        models = Models(width, layers)
        with contextlib.ExitStack() as scopes:
            lines += timed(f"decode, d={width}, {layers} layers", models.decoding(scopes), rounds)
        lines += timed(f"step of {ROWS} x {length} tokens, d={width}", models.training(length), max(3, rounds // 3))
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


class Models:
    """The same body with no adapter, one, a bank, and PEFT's adapters of the same values."""

    def __init__(self, width: int, layers: int) -> None:
        torch.manual_seed(0)
        heads = max(width // 64, 4)
        sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64 or 128}
        groups: dict[str, Any] = {
            "num_attention_heads": heads,
            "num_key_value_heads": heads // (3 if heads % 3 == 0 else 4),
        }
        config = transformers.LlamaConfig(vocab_size=256, num_hidden_layers=layers, **sizes, **groups)
        self.model: Any = transformers.LlamaModel(config).requires_grad_(False).eval()
        self.slots = torch.arange(ROWS)
        example = {"input_ids": torch.randint(256, (2, 8))}
        self.base: Any = llfx.capture(self.model, example)
        self.bank: Any = llfx.rewrite(self.base, llfx.Bank(llfx.LoRA(r=RANK, alpha=2 * RANK), slots=ROWS))
        with torch.no_grad():
            for parameter in llfx.adapter_parameters(self.bank):
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.one: Any = llfx.take_slot(self.bank, 0)
        self.peft: Any = self._in_peft()

    def _in_peft(self) -> Any:
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
        model: Any = peft.PeftModel(transformers.LlamaModel(self.model.config).eval(), config, adapter_name="0")
        for slot in range(1, ROWS):
            model.add_adapter(str(slot), config)
        model.base_model.model.load_state_dict(
            {name.replace("_proj.weight", "_proj.base_layer.weight"): t for name, t in self.model.state_dict().items()},
            strict=False,
        )
        own = llfx.adapter_state_dict(self.bank)
        for name, parameter in model.named_parameters():
            path, found, rest = name.removeprefix("base_model.model.").partition(".lora_")
            if found:
                factor, slot = rest.removesuffix(".weight").split(".")
                parameter.data = own[f"{path}.lora_{factor}"][int(slot)].clone()
        return model.eval()

    def decoding(self, scopes: contextlib.ExitStack) -> Arms:
        """Return the arms that compute one token for each row."""
        ids = torch.randint(256, (ROWS, 1))
        names = [str(slot) for slot in range(ROWS)]
        scopes.enter_context(torch.no_grad())
        scopes.enter_context(llfx.frozen(self.one))
        scopes.enter_context(llfx.by_row(self.bank, self.slots))
        scopes.enter_context(llfx.frozen(self.bank))

        def one_after_the_other() -> Tensor:
            rows = []
            for slot in range(ROWS):
                self.peft.set_adapter(str(slot))
                rows.append(self.peft(ids[slot : slot + 1]).last_hidden_state)
            return torch.cat(rows)

        arms: Arms = {
            "base": lambda: self.base(input_ids=ids).last_hidden_state,
            "base again": lambda: self.base(input_ids=ids).last_hidden_state,
            "one adapter": lambda: self.one(input_ids=ids).last_hidden_state,
            "bank": lambda: self.bank(input_ids=ids).last_hidden_state,
            "PEFT, mixed batch": lambda: self.peft(ids, adapter_names=names).last_hidden_state,
            "PEFT, one after the other": one_after_the_other,
        }
        for name in ("PEFT, mixed batch", "PEFT, one after the other"):
            torch.testing.assert_close(arms[name](), arms["bank"](), atol=1e-3, rtol=1e-3)
        return arms

    def training(self, length: int) -> Arms:
        """Return the arms that compute gradients for the rows: all at once, or one row after the other."""
        ids = torch.randint(256, (ROWS, length))

        def step(model: nn.Module, tokens: Tensor, **which: Any) -> None:
            for parameter in model.parameters():
                parameter.grad = None
            model(input_ids=tokens, **which).last_hidden_state.square().mean().backward()

        def one_after_the_other() -> None:
            for slot in range(ROWS):
                self.peft.set_adapter(str(slot))
                step(self.peft, ids[slot : slot + 1])

        for each in (self.one, self.bank, self.peft):
            each.train()
        return {
            "one adapter": lambda: step(self.one, ids),
            "one adapter again": lambda: step(self.one, ids),
            "bank": lambda: step(self.bank, ids, adapter_ids=self.slots),
            "PEFT, one after the other": one_after_the_other,
        }


def timed(title: str, arms: Arms, rounds: int) -> list[str]:
    """Run the arms in turn, and return a line for each."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            seconds[name].append(time.process_time() - start)
    first = seconds[next(iter(arms))]
    lines = [title]
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
        lines.append(f"  {name:<26} {1000 * statistics.median(values):9.1f} ms {ratio:6.2f}")
    return lines


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--out", type=Path, help="a file for the lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
