"""Run a package that `llfx.save_aoti` wrote, and exchange its adapters. Copy this file beside the package.

It needs torch and safetensors, and not the library that wrote the package:

    s = Swappable("m.pt2")
    s.load("fr", "fr.safetensors")  # a file of llfx.save, or a dict by the names of adapter_state_dict
    s.use("fr", 0.5)  # y = base + 0.5 (adapted - base) at every site; s.use(None) is the frozen model
    s(input_ids=ids)

The tensors of an adapter and its coefficient are constants of the compiled package. torch copies into them whatever it
is given, so `load` checks names, shapes, dtypes and values before anything is copied.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "lora_lite_fx"  # of the description in the package's metadata, and of the document in a file of `llfx.save`
TENSORS = "lora_lite_fx/adapter.safetensors"  # the file inside the package with the adapter that it was saved with
FORMAT = 1  # the version of the description
_PLAIN = re.compile(r"[^*+?{(]*")  # patterns that are searched in bounded time: without repetitions and groups


class Swappable:
    """A compiled package whose adapter can be exchanged, scaled and switched off while it serves.

    At first the adapter that it was saved with acts, `"saved"` among the `adapters` that are held. `spec` describes the
    package: inputs, outputs, configs, and tensors with their shapes and dtypes. A lock is held during each call and
    exchange, so that a call sees one adapter as a whole; hold it to exchange and call in one step, `with s.lock:`. A
    package runs one call at a time; for more, open it several times.

    Args:
        path: of the package, which runs compiled code: open only those that you trust.

    Raises:
        ValueError: `save_aoti` did not write it, or one of another version did.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # torch documents this function under a module that looks private; there is no other one.
        self._package: Any = torch._inductor.aoti_load_package(os.fspath(path))
        self.spec: dict[str, Any] = json.loads(self._package.get_metadata().get(KEY, "{}"))
        if self.spec.get("format") != FORMAT:
            raise ValueError(
                f"{path} has the format {self.spec.get('format')!r} of llfx.save_aoti, and this file reads {FORMAT}."
                " The way out: copy swappable.py of the release that wrote the package."
            )
        self.lock = threading.RLock()
        self._is_bank = "slots" in self.spec
        device, saved = self.spec["device"], _saved(path) if self.spec["tensors"] else {}
        self._saved = {name: tensor.to(device) for name, tensor in saved.items()}
        self.adapters = {} if self._is_bank or not self._saved else {"saved": self._saved}
        self._slots = {name: tensor.clone() for name, tensor in self._saved.items()} if self._is_bank else {}
        dtypes = {name: getattr(torch, dtype) for name, dtype in self.spec["coefficients"].items()}
        self._coefficients = {name: torch.ones((), dtype=dtype, device=device) for name, dtype in dtypes.items()}
        self._acting: dict[str, Tensor] | None = self._saved

    def load(self, name: str, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        """Hold an adapter under a name for `use`. One that acts under this name already acts on until the next `use`.

        Where its variant allows that, an adapter of a lower rank is filled up with zeros, and the scale of another
        config goes into its tensors. A warning says that it was made for other weights than those in the package.

        Args:
            name: the name.
            source: a file that `llfx.save` wrote, or a dict by the names of `adapter_state_dict`, whose rank and scale
                are those of the package.

        Raises:
            ValueError: it does not fit; the message names what. Nothing has changed then.
        """
        self._refuse("load")
        if not isinstance(name, str) or not name:
            raise ValueError(f"The name of an adapter is a string, not {name!r}.")
        self.adapters[name] = self._fitted(name, source)

    def remove(self, name: str) -> None:
        """Hold an adapter no longer. If it acts, it acts on until the next `use`."""
        self._held_as(name)
        del self.adapters[name]

    def use(self, name: str | None, scale: float = 1.0) -> None:
        """Let an adapter act in the calls from now on: `y = base + scale (adapted - base)` at every site.

        Args:
            name: of an adapter that is held; None for the frozen model.
            scale: any finite number; 1 is the adapter, 0 the frozen model.

        Raises:
            ValueError: no adapter of this name is held, `scale` is not a finite number, or the package has none.
        """
        self._refuse("use")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale is a finite number, not {scale!r}.")
        tensors = None if name is None else self._held_as(name)
        number = 0.0 if name is None else float(scale)
        constants = {each: torch.full_like(coefficient, number) for each, coefficient in self._coefficients.items()}
        with self.lock:
            if tensors is not None and tensors is not self._acting:
                self._acting = None  # an exchange that fails in the middle is not taken for a whole one
                constants |= self._read(tensors)
            self._package.load_constants(constants, check_full_update=False)
            self._acting = self._acting if tensors is None else tensors

    def put(self, slot: int, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        """Put an adapter into a slot of a bank, which rows choose by the input `adapter_ids`.

        Args:
            slot: the slot, from 0.
            source: the name of an adapter that is held; or as of `load`.

        Raises:
            ValueError: the package has no such slot, or the adapter does not fit. Nothing has changed then.
        """
        self._refuse("put")
        slots = self.spec["slots"]
        if type(slot) is not int or not 0 <= slot < slots:
            raise ValueError(f"The bank has {slots} slots, 0 to {slots - 1}, and not {slot!r}.")
        held = self.adapters.get(source) if isinstance(source, str) else None
        tensors = self._fitted(f"slot {slot}", source) if held is None else held
        with self.lock:
            for name, value in tensors.items():
                if not self.spec["tensors"][name]["shared"]:
                    self._slots[name][slot].copy_(value)
            self._package.load_constants(self._read(self._slots), check_full_update=False)

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model on inputs by name; return a tensor, or a tuple of those that `spec["outputs"]` names.

        Raises:
            ValueError: an input is missing or unknown, or its dtype, device or shape does not fit.
        """
        _check_inputs(self.spec, inputs)
        with self.lock:
            return self._package(**{name: tensor.contiguous() for name, tensor in inputs.items()})

    def _read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if self.spec["tensors"][name]["read"]}

    def _held_as(self, name: str) -> dict[str, Tensor]:
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"No adapter is held as {name!r}; held are {known}. The way out: load({name!r}, file).")
        return self.adapters[name]

    def _refuse(self, call: str) -> None:
        if call in self.spec["refused"]:
            raise ValueError(f"{call}: this package {self.spec['refused'][call]}")

    def _fitted(self, name: str, source: Any) -> dict[str, Tensor]:
        """Return the tensors of an adapter by the names of the package, checked, each with memory of its own."""
        if isinstance(source, (str, os.PathLike)):
            state = _written_for(name, self.spec, *_read_file(source))
        elif isinstance(source, Mapping):
            state = dict(source)
        else:
            raise ValueError(f"{name}: an adapter is a file or a dict of tensors, not a {type(source).__name__}.")
        _check_tensors(name, self.spec["tensors"], state)
        # torch copies the whole storage of a tensor into the package, also where the tensor is a part of it.
        device, order = self.spec["device"], torch.contiguous_format
        own = {each: t.detach().clone(memory_format=order).to(device) for each, t in state.items()}
        for each in own if self._is_bank else ():
            if self.spec["tensors"][each]["shared"] and not torch.equal(own[each], self._saved[each]):
                raise ValueError(f"{name}: all slots share {each}, and it has other values there.")
        return own


def _read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the document of a file that `llfx.save` wrote."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "missing"
        raise ValueError(f"{path} is {what}. An adapter is a file that llfx.save wrote, such as fr.safetensors.")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            document = json.loads((file.metadata() or {}).get(KEY, "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("version") != 1:
        raise ValueError(f"{path} was not written by llfx.save, or by a release that this file does not know.")
    content = {key: value for key, value in document.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if document.get("checksum") != digest.hexdigest():
        raise ValueError(f"{path} is corrupt: it does not hold what was saved.")
    if document.get("buffers"):
        raise ValueError(
            f"{path} holds buffers of the model that training changed, such as {document['buffers'][0]}, and a package"
            " has them as they were when it was compiled. The way out: compile one of the model with this adapter."
        )
    return state, document


def _saved(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of the adapter that a package was saved with."""
    from safetensors.torch import load

    with zipfile.ZipFile(path) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(TENSORS)]
        return load(archive.read(name))


def _written_for(
    name: str, spec: Mapping[str, Any], state: Mapping[str, Tensor], document: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors of a file by the names of the package, and in its rank and scale."""
    try:
        marks = document["fingerprint"]
        records = [(each["config"], each.get("name", "default"), set(each["sites"])) for each in document["adapters"]]
        if len(records) != len(spec["adapters"]):
            counts = f"{len(records)} configs, and the package takes {len(spec['adapters'])}"
            raise ValueError(f"{name}: the file holds {counts}. The way out: llfx.save(model, path, adapter=...).")
        if other := [site for site, mark in spec["fingerprint"].items() if marks.get(site, mark) != mark]:
            message = f"{name}: the adapter was made for other weights than the package has, at {other[0]!r}"
            if any(each["ties_to_weight"] for each in spec["adapters"]):
                raise ValueError(f"{message}; it means nothing on these.")
            warnings.warn(f"{message}.", stacklevel=4)
        written: dict[str, Tensor] = {}
        taken, seen = set[str](), Counter[tuple[str, str]]()
        for index, ((config, called, sites), own) in enumerate(zip(records, spec["adapters"], strict=True)):
            if differ := sorted(sites ^ own["tensors"].keys()):
                raise ValueError(f"{name}: the adapter in the file and the package's differ at site {differ[0]!r}.")
            factors = _factors(name, config, own)
            for site, names in own["tensors"].items():
                for short, full in names.items():
                    in_file = _name_in_file(short, site, index, seen[site, called], called)
                    if in_file not in state:
                        raise ValueError(f"{name}: the file lacks {in_file}.")
                    written[full] = _folded(state[in_file], spec["tensors"][full], factors[site])
                    taken.add(in_file)
                seen[site, called] += 1
    except (KeyError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise ValueError(f"{name}: the metadata of the file is damaged: {error!r}.") from error
    if rest := state.keys() - taken:
        raise ValueError(f"{name}: the file has {min(rest)}, which is not a tensor of the package's adapter.")
    return written


def _name_in_file(short: str, site: str, index: int, position: int, called: str) -> str:
    """Return the name under which `llfx.save` writes a tensor."""
    is_shared = short.startswith("lora_shared_")  # at the root of the model
    count = index if is_shared else position
    end = (f"_{count + 1}" if count else "") + ("" if called == "default" else f"_{called}")
    return f"{short}{end}" if is_shared else f"{site}.{short}{end}"


def _factors(name: str, config: Mapping[str, Any], to: Mapping[str, Any]) -> dict[str, float]:
    """Return for each site the scale of a file's adapter in scales of the package's; refuse what is not a scale."""
    own = to["config"]
    every = sorted(config.keys() | own.keys(), key=lambda field: (field != "variant", field))
    differ = [field for field in every if field not in to["unread"] and config.get(field) != own.get(field)]
    for field in differ:
        if field not in to["folds"]:
            raise ValueError(
                f"{name}: the adapter has {field}={config.get(field)!r}, and the {own['variant']} of the package has"
                f" {own.get(field)!r}, for which its code was compiled. The way out: compile a package of this adapter."
            )
    if not differ:
        return dict.fromkeys(to["tensors"], 1.0)
    return {site: scale_of(name, config, own, site) / scale_of(name, own, own, site) for site in to["tensors"]}


def scale_of(name: str, config: Mapping[str, Any], own: Mapping[str, Any], site: str) -> float:
    """Return the scale at a site, `alpha / r`, or 1 without alpha. The patterns of `own` are safe to search."""
    if "alpha" not in config:
        return 1.0
    values = {"r": 1}  # a variant may have a scale and no rank
    for field, patterns in [("r", "rank_pattern")] * ("r" in own) + [("alpha", "alpha_pattern")]:
        values[field] = config[field]
        known = [pattern for pattern, _ in own[patterns]]
        for pattern, value in config[patterns]:
            if pattern not in known and _PLAIN.fullmatch(pattern) is None:
                way_out = "The way out: write names of modules without repetitions and groups."
                raise ValueError(f"{name}: the pattern {pattern!r} of {patterns} may take long to search. {way_out}")
            if re.search(pattern, site):
                values[field] = value
                break
    return float(values["alpha"]) / (math.sqrt(values["r"]) if config.get("rank_stabilized") else values["r"])


def _folded(tensor: Tensor, entry: Mapping[str, Any], factor: float) -> Tensor:
    """Return a tensor of a file with zeros up to the rank of the package, and the scale in it."""
    count, shape = tensor.dim(), entry["shape"]
    if count == len(shape):
        ranks = [dim + count for dim in entry["ranks"]]
        more = [max(shape[dim] - tensor.shape[dim], 0) * (dim in ranks) for dim in range(count)]
        tensor = torch.nn.functional.pad(tensor, [size for room in reversed(more) for size in (0, room)])
    return (tensor.double() * factor).to(tensor.dtype) if entry["scaled"] and factor != 1 else tensor


def _check_tensors(name: str, entries: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError unless the tensors are those of the package in names, shapes and dtypes, and finite."""
    problems = [f"missing: {each}" for each in entries if each not in state]
    problems += [f"unexpected: {each}" for each in state if each not in entries]
    for each in [each for each in entries if each in state]:
        tensor, shape, dtype = state[each], entries[each]["shape"], getattr(torch, entries[each]["dtype"])
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            problems.append(f"not a dense tensor: {each}")
        elif list(tensor.shape) != shape:
            problems.append(f"shape of {each}: {tuple(tensor.shape)} instead of {tuple(shape)}")
        elif tensor.dtype != dtype:
            problems.append(f"dtype of {each}: {tensor.dtype} instead of {dtype}")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{each} is not finite")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{name} does not fit the package: {'; '.join(problems[:5])}{more}.")


def _check_inputs(spec: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raise ValueError unless a call has the inputs of the package: the compiled code checks none of this."""
    for name in [*inputs, *spec["inputs"]]:
        if name not in spec["inputs"] or name not in inputs:
            what = "unknown" if name in inputs else "missing"
            raise ValueError(f"The input {name} is {what}; the package takes {', '.join(spec['inputs'])}.")
    sizes: dict[str, int] = {}
    for name, entry in spec["inputs"].items():
        tensor, shape, dtype = inputs[name], entry["shape"], getattr(torch, entry["dtype"])
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != len(shape):
            raise ValueError(f"The input {name} is a tensor of {dtype} with {len(shape)} dimensions.")
        if tensor.device.type != spec["device"].partition(":")[0]:
            raise ValueError(f"The input {name} is on {tensor.device}, and the package runs on {spec['device']}.")
        for has, size in zip(tensor.shape, shape, strict=True):
            wanted = sizes.setdefault(size, has) if isinstance(size, str) else size  # None: it follows from others
            least, most = spec["sizes"].get(size, (0, None))
            if (wanted is not None and has != wanted) or has < least or (most is not None and has > most):
                takes = (
                    f"{shape}: a name is one size in all inputs, and {spec['sizes']} has the least and largest sizes"
                )
                raise ValueError(f"The input {name} is {tuple(tensor.shape)}, and the package takes {takes}.")
    if "slots" in spec and bool(((ids := inputs["adapter_ids"]) < -1).any() or (ids >= spec["slots"]).any()):
        raise ValueError(f"adapter_ids are slots, 0 to {spec['slots'] - 1}, or -1 for the frozen model.")
