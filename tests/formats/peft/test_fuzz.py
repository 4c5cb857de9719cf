"""Foreign files, fuzzed: whatever they hold, they load or are refused, change nothing and take no more memory."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite_fx as llfx
from lora_lite_fx.formats.lora_lite import _FORMATS as LORA_LITE
from lora_lite_fx.formats.peft.methods import all_forms
from tests.support.peft_models import small
from tests.support.selection import is_distinct, slow_unless
from tests.support.untouched import untouched

pytestmark = pytest.mark.broad  # test_damaged_files.py and test_hostile_files.py are the everyday tests of bad files
FORMATS = tuple(form for form in all_forms() if form.tensors)
"""Those that have tensors of their own at a site."""
fuzz = settings(
    max_examples=60,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
FORMS = {f"{form.variant.__name__} {' '.join(map(str, form.fixed.values()))}".strip(): form for form in FORMATS}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
D_IN, D_OUT = 16, 8
ADAPTED = 1 << 18  # bytes; all tensors here together have less than a tenth of that
IN_PYTHON = 1 << 20  # bytes


class Files(dict[str, Any]):
    """The files of a small adapter, by format: a dict that Hypothesis does not print."""

    __repr__ = object.__repr__


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, 4))


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return llfx.capture(model())


def adapted(graph: fx.GraphModule, cls: type[llfx.Variant], fixed: Mapping[str, Any]) -> fx.GraphModule:
    cfg = small(cls, fixed, target_names=("^0$",))
    return llfx.rewrite(graph, cfg, calibration=[(torch.randn(5, D_IN),)] if cls is llfx.EVA else None)


@pytest.fixture(scope="module")
def good(graph: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """For each format of PEFT the two files."""
    files = Files()
    for name, form in FORMS.items():
        folder = tmp_path_factory.mktemp("good")
        if form.fixed == {"tied": False}:  # which only PEFT writes
            config = peft.TinyLoraConfig(r=4, u=6, target_modules=["0"])
            peft.get_peft_model(model(), config).save_pretrained(str(folder))
        else:
            llfx.save_peft(adapted(graph, form.variant, form.fixed), folder)
        files[name] = ((folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes())
    return files


@pytest.fixture(scope="module")
def good_lora_lite(graph: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """For each variant of lora-lite the config and the tensors."""
    path, files = tmp_path_factory.mktemp("good") / "adapter", Files()
    for form in LORA_LITE:
        llfx.save_lora_lite(adapted(graph, form.variant, form.constants), path)
        with safetensors.safe_open(path, framework="pt") as file:
            files[form.name] = (
                json.loads(file.metadata()["cfg"]),
                {key: file.get_tensor(key) for key in file.keys()},  # noqa: SIM118
            )
    return files


class Allocations(TorchDispatchMode):
    """Refuses to make a tensor larger than a limit, before it is made, and remembers that it was asked to."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.refused = limit, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = args[0] if args and isinstance(args[0], (list, torch.Size)) else args[:1]
        if all(type(size) is int for size in sizes) and 4 * torch.Size(sizes).numel() > self.limit:
            self.refused = f"{func} of {tuple(sizes)}"
            raise MemoryError(self.refused)
        return func(*args, **(kwargs or {}))


def loads(graph: fx.GraphModule, load: Callable[[], fx.GraphModule]) -> bool:
    """Whether it loads or is refused; a failed assertion for anything else."""
    with untouched(graph), warnings.catch_warnings(), Allocations(ADAPTED) as allocations:
        warnings.simplefilter("ignore")
        try:
            gm = load()
        except llfx.CheckpointError:
            assert not allocations.refused
            return False
    assert not allocations.refused
    assert gm(torch.ones(2, D_IN)).shape == (2, 4)
    return True


def loads_peft(graph: fx.GraphModule, folder: Path, config: bytes | Mapping[str, Any], tensors: bytes) -> bool:
    (folder / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (folder / TENSORS).write_bytes(tensors)
    return loads(graph, lambda: llfx.load_peft(graph, folder))


def loads_lora_lite(graph: fx.GraphModule, folder: Path, config: str, tensors: dict[str, Tensor]) -> bool:
    save_file(tensors, folder / "adapter", {"cfg": config})
    return loads(graph, lambda: llfx.load_lora_lite(graph, folder / "adapter"))


def test_the_good_files_load(graph: fx.GraphModule, good: Files, good_lora_lite: Files, tmp_path: Path) -> None:
    """Without this, what follows might test refusals only."""
    for name, files in good.items():
        assert loads_peft(graph, tmp_path, *files), name
    for config, tensors in good_lora_lite.values():
        assert loads_lora_lite(graph, tmp_path, json.dumps(config), tensors), config


# Configs.

numbers = st.integers(-(10**12), 10**12) | st.sampled_from([2**63, 2**64, -(2**70), 10**400]) | st.floats()
words = st.sampled_from(["x", "0", "(", "{}", "{0}", "a{99999999999}", "(" * 500 + ")" * 500, "all-linear", "float64"])
words |= st.sampled_from(["float8_e4m3fn", "float4_e2m1fn_x2", "int8", "nn", "pissa", "bat"]) | st.text(max_size=5)
leaves = st.none() | st.booleans() | numbers | words
values = leaves | st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
types = st.sampled_from([form.peft_type for form in FORMATS])
fields = st.sampled_from(
    sorted(
        {theirs.name for form in FORMATS for theirs in form.fields.values()}
        | {key for form in FORMATS for key in (*form.constants, *form.written, *form.patterns)}
        | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules", "bias"}
    )
)


def describes_or_is_refused(config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regular expressions
        with suppress(llfx.ConfigError):
            assert isinstance(llfx.from_peft_config(config), llfx.Variant)


@settings(fuzz, max_examples=400)
@example({"peft_type": "LORA", 1: 2, "x": 3})
@example({"peft_type": "LORA", "target_modules": ["x"], "layers_to_transform": [1], "layers_pattern": ["{0}"]})
@example({"peft_type": "LORA", "target_modules": ["x"], "layers_to_transform": [1], "layers_pattern": 5})
@example({"peft_type": "DELORA", "target_modules": ["x"], "delora_lambda": 10**400})
@example({"peft_type": "LORA", "target_modules": "a{99999999999999999999}"})
@example(5)
@given(
    st.dictionaries(fields, values, max_size=6).flatmap(
        lambda given: st.fixed_dictionaries({"peft_type": types | values}).map(lambda kind: {**given, **kind})
    )
    | st.dictionaries(values.filter(lambda value: not isinstance(value, (list, dict))), values, max_size=4)
    | values
)
def test_a_config_of_anything_describes_a_variant_or_is_a_config_error(config: Any) -> None:
    describes_or_is_refused(config)


def replaced(config: Mapping[str, Any], data: st.DataObject) -> dict[str, Any]:
    """The config with one field, known or not, replaced or taken out."""
    field = data.draw(st.sampled_from(sorted(config)) | fields | words, label="field")
    if data.draw(st.integers(0, 9)) == 0:
        return {name: value for name, value in config.items() if name != field}
    return {**config, field: data.draw(values, label="value")}


@pytest.mark.parametrize("name", slow_unless(lambda name: is_distinct(FORMS[name].variant), FORMS))
@settings(fuzz, max_examples=20)
@given(data=st.data())
def test_a_good_config_with_a_field_replaced_loads_or_is_refused(
    name: str, graph: fx.GraphModule, good: Files, tmp_path: Path, data: st.DataObject
) -> None:
    config = replaced(json.loads(good[name][0]), data)
    describes_or_is_refused(config)
    loads_peft(graph, tmp_path, config, good[name][1])


@pytest.mark.parametrize("form", LORA_LITE, ids=lambda form: form.name)
@settings(fuzz, max_examples=20)
@given(data=st.data())
def test_a_lora_lite_config_with_a_field_replaced_loads_or_is_refused(
    form: Any, graph: fx.GraphModule, good_lora_lite: Files, tmp_path: Path, data: st.DataObject
) -> None:
    config, tensors = good_lora_lite[form.name]
    loads_lora_lite(graph, tmp_path, json.dumps(replaced(config, data)), tensors)


@settings(fuzz, max_examples=100)
@given(document=values)
@example(document={"variant": []})
def test_a_json_document_of_anything_is_refused(
    document: Any,
    graph: fx.GraphModule,
    good: Files,
    good_lora_lite: Files,
    tmp_path: Path,
) -> None:
    assert not loads_peft(graph, tmp_path, json.dumps(document).encode(), good["LoRA"][1])
    assert not loads_lora_lite(graph, tmp_path, json.dumps(document), good_lora_lite["lora"][1])


@pytest.mark.parametrize("depth", [10, 100, 300, 500, 700, 800, 850, 900, 950, 980, 1000, 5000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_a_deeply_nested_document_is_refused(
    depth: int,
    brackets: str,
    graph: fx.GraphModule,
    good: Files,
    good_lora_lite: Files,
    tmp_path: Path,
) -> None:
    start = "[" if brackets == "[]" else '{"a":'
    nested = start * depth + "1" + brackets[1] * depth
    for key in ("peft_type", "r", "odd", "rank_pattern", "target_modules"):
        whole = good["LoRA"][0].decode()
        text = f'{whole.rstrip()[:-1]}, "{key}": {nested}}}'
        assert not loads_peft(graph, tmp_path, text.encode(), good["LoRA"][1])
    for key in ("variant", "r", "odd", "alpha", "dtype"):
        text = f'{json.dumps(good_lora_lite["lora"][0])[:-1]}, "{key}": {nested}}}'
        assert not loads_lora_lite(graph, tmp_path, text, good_lora_lite["lora"][1])


# Sizes.

HUGE = (10**9, 2**63, 10**400)


def test_a_huge_number_in_a_config_takes_no_memory(
    graph: fx.GraphModule, good: Files, good_lora_lite: Files, tmp_path: Path
) -> None:
    for name, (text, tensors) in good.items():
        config = json.loads(text)
        for field in [key for key, value in config.items() if type(value) is int]:
            for huge in HUGE:
                loads_peft(graph, tmp_path, {**config, field: huge}, tensors)
        for field in FORMS[name].patterns:
            for huge in HUGE:
                loads_peft(graph, tmp_path, {**config, field: {".*": huge}}, tensors)
    for config, tensors in good_lora_lite.values():
        for field in [key for key, value in config.items() if type(value) is int]:
            for huge in HUGE:
                loads_lora_lite(graph, tmp_path, json.dumps({**config, field: huge}), tensors)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("LoRA", "r"),
        ("VeRA", "r"),
        ("RandLoRA dense", "r"),
        ("GraLoRA", "hybrid_r"),
        ("GraLoRA", "gralora_k"),
        ("HiRA", "r"),
        ("FourierFT", "n_frequency"),
        ("OFT", "oft_block_size"),
        ("C3A", "block_size"),
        ("BOFT", "boft_block_size"),
        ("BOFT", "boft_n_butterfly_factor"),
    ],
)
def test_a_huge_size_is_refused_before_anything_as_large_is_made(
    kind: str, field: str, graph: fx.GraphModule, good: Files, tmp_path: Path
) -> None:
    text, tensors = good[kind]
    tracemalloc.start()
    try:
        assert not loads_peft(graph, tmp_path, {**json.loads(text), field: 10**9}, tensors)
        assert tracemalloc.get_traced_memory()[1] < IN_PYTHON
    finally:
        tracemalloc.stop()


def test_an_antipasto_of_a_huge_rank_is_refused(graph: fx.GraphModule, good_lora_lite: Files, tmp_path: Path) -> None:
    config, tensors = good_lora_lite["antipasto"]
    assert not loads_lora_lite(graph, tmp_path, json.dumps({**config, "r": 10**9}), tensors)


@pytest.mark.parametrize("initial", [1e30, 1e40, 1e300, 10**300])
def test_numbers_beyond_single_precision_are_refused(
    initial: float, graph: fx.GraphModule, good: Files, tmp_path: Path
) -> None:
    """Where a file leaves tensors out, those it holds are filled from the config first."""
    text, raw = good["VeRA"]
    kept = {key: tensor for key, tensor in safetensors.torch.load(raw).items() if "lambda" in key}
    config = {**json.loads(text), "d_initial": initial}
    assert loads_peft(graph, tmp_path, config, safetensors.torch.save(kept)) is (initial == 1e30)


# Tensors.


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_tensors_of_any_name_shape_and_dtype_load_or_are_refused(
    graph: fx.GraphModule,
    good: Files,
    good_lora_lite: Files,
    tmp_path: Path,
    data: st.DataObject,
) -> None:
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float64])
    dtypes |= st.sampled_from([torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8])
    sizes = st.lists(st.sampled_from([0, 1, 2, 4, D_OUT, D_IN]), max_size=4)

    def edited(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(tensors)
        key = data.draw(st.sampled_from(sorted(tensors)), label="key")
        tensor = tensors.pop(key)
        change = data.draw(st.sampled_from(["shape", "dtype", "name", "gone"]), label="change")
        dtype = data.draw(dtypes, label="dtype") if change == "dtype" else tensor.dtype
        if change == "shape":
            tensor = torch.zeros(data.draw(sizes, label="shape"), dtype=dtype)
        if change == "name":
            head, _, tail = key.rpartition(".")
            name = data.draw(st.text(max_size=4), label="name")
            key = data.draw(st.sampled_from([name, f"{name}.{tail}", f"{head}.{name}", f"{name}{key}", f".{key}"]))
        return tensors if change == "gone" else {**tensors, key: tensor.to(dtype)}

    text, raw = good[data.draw(st.sampled_from(sorted(good)), label="format")]
    loads_peft(graph, tmp_path, text, safetensors.torch.save(edited(safetensors.torch.load(raw))))
    config, tensors = good_lora_lite[data.draw(st.sampled_from(sorted(good_lora_lite)), label="lora-lite")]
    loads_lora_lite(graph, tmp_path, json.dumps(config), edited(tensors))


@pytest.mark.parametrize("shape", [[10**12], [2**31, 2**31], [2**63, 2], [2**64]])
@pytest.mark.parametrize("end", [16, 10**12])
def test_a_header_that_claims_a_huge_tensor_is_refused(
    shape: list[int], end: int, graph: fx.GraphModule, good: Files, tmp_path: Path
) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    for key in ("base_model.model.0.lora_A.weight", "0.lora_A"):
        header = json.dumps({key: entry, "__metadata__": {"cfg": '{"variant": "lora"}'}}).encode()
        data = len(header).to_bytes(8, "little") + header + bytes(16)
        assert not loads_peft(graph, tmp_path, good["LoRA"][0], data)
        (tmp_path / "adapter").write_bytes(data)
        assert not loads(graph, lambda: llfx.load_lora_lite(graph, tmp_path / "adapter"))


# Bytes.


def damaged(whole: bytes, data: st.DataObject) -> bytes:
    kind = data.draw(st.sampled_from(["random", "truncated", "flipped", "length", "header"]), label="kind")
    if kind == "random":
        return data.draw(st.binary(max_size=40), label="bytes")
    if kind == "truncated":
        return whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    if kind == "length":
        return data.draw(st.integers(0, 2**64 - 1), label="length").to_bytes(8, "little") + whole[8:]
    changed = bytearray(whole)
    stop = min(len(whole), 8 + int.from_bytes(whole[:8], "little")) if kind == "header" else len(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, stop - 1), label="place")] ^= data.draw(st.integers(1, 255), label="mask")
    return bytes(changed)


@settings(fuzz, max_examples=120)
@given(data=st.data())
def test_damaged_bytes_load_or_are_refused(
    graph: fx.GraphModule,
    good: Files,
    good_lora_lite: Files,
    tmp_path: Path,
    data: st.DataObject,
) -> None:
    config, tensors = good[data.draw(st.sampled_from(sorted(good)), label="format")]
    which = data.draw(st.sampled_from([CONFIG, TENSORS, "lora-lite"]), label="file")
    if which == CONFIG:
        loads_peft(graph, tmp_path, damaged(config, data), tensors)
    elif which == TENSORS:
        loads_peft(graph, tmp_path, config, damaged(tensors, data))
    else:
        given, values = good_lora_lite[data.draw(st.sampled_from(sorted(good_lora_lite)), label="variant")]
        whole = safetensors.torch.save(values, {"cfg": json.dumps(given)})
        (tmp_path / "adapter").write_bytes(damaged(whole, data))
        loads(graph, lambda: llfx.load_lora_lite(graph, tmp_path / "adapter"))
