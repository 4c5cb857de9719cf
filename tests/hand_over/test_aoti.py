"""Models are compiled by AOTInductor, and their adapters are exchanged in a process that knows torch alone.

A compilation takes half a minute, so that the everyday tests share one package of a LoRA.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_lite_fx as llfx
import lora_lite_fx.compat.dynamo as dynamo
from lora_lite_fx.hand_over import aoti, swappable
from lora_lite_fx.hand_over.swappable import Swappable
from tests.support.captured import captured
from tests.support.conformance import calibration, randomise, small
from tests.support.models import GatedMLP, ids, net, one_layer_llama
from tests.support.releases import since
from tests.support.selection import slow_unless

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLE = {"ids": ids(2, 5)}
SHAPES = ((2, 5), (1, 1), (3, 9))
TYPICAL = ("DoRA", "HRA", "IA3", "OFT", "PiSSA", "VeRA", "AntiPaSTOGain")
OTHERS = sorted(llfx.registry().keys() - {"LoRA", "TrainableTokens", *TYPICAL})


def small_net() -> nn.Module:
    return net(GatedMLP)


def adapted(cfg: Any, seed: int = 1, build: Callable[[], nn.Module] = small_net) -> Any:
    """Return a graph whose adapters have random values."""
    _, graph = captured(build, inputs=(EXAMPLE["ids"],))
    gm = llfx.rewrite(graph, cfg, calibration=calibration(cfg, None, (EXAMPLE["ids"],)))
    randomise(gm, seed)
    return gm


def lora(**fields: Any) -> llfx.LoRA:
    return llfx.LoRA(**{"r": 4, "target_names": "gate|up", **fields})


def saved(gm: Any, path: Path, **options: Any) -> Path:
    """Return the path of a file of adapters."""
    llfx.save(gm, path, **options)
    return path


def same(program: Swappable, gm: Any, scale: float | None = None, **more: Tensor) -> None:
    """Check that a package computes what a graph does, for sizes other than those of the example too."""
    for shape in SHAPES:
        inputs = {"ids": ids(*shape, seed=3)} | {name: value[: shape[0]] for name, value in more.items()}
        with torch.no_grad(), llfx.scaled(gm, 1.0 if scale is None else scale):
            expected = gm(**inputs)
        torch.testing.assert_close(program(**inputs), expected, atol=1e-5, rtol=1e-5)


def compiled(gm: Any, path: Path, **options: Any) -> Swappable:
    llfx.save_aoti(gm, path, EXAMPLE, **options)
    return Swappable(path)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a LoRA at its start, whose `B` are zeros, which a compiler may take for constants."""
    path = tmp_path_factory.mktemp("aoti") / "m.pt2"
    _, graph = captured(small_net, inputs=(EXAMPLE["ids"],))
    llfx.save_aoti(llfx.rewrite(graph, lora()), path, EXAMPLE)
    return path


@pytest.fixture
def program(package: Path) -> Swappable:
    return Swappable(package)


# One package, in this process.


def test_adapters_are_exchanged_scaled_and_switched_off(program: Swappable, tmp_path: Path) -> None:
    french, german = adapted(lora(), 1), adapted(lora(), 2)
    start = program(**EXAMPLE)
    program.load("fr", saved(french, tmp_path / "fr"))
    program.load("de", llfx.adapter_state_dict(german))
    for name, gm in (("fr", french), ("de", german), ("fr", french)):
        program.use(name)
        same(program, gm)
        for scale in (0.5, -1, 0.0):
            program.use(name, scale)
            same(program, gm, scale)
    frozen, _ = captured(small_net, inputs=(EXAMPLE["ids"],))
    off = []
    for name in ("fr", "de"):
        program.use(name)
        program.use(None)
        same(program, llfx.rewrite(captured(small_net, inputs=(EXAMPLE["ids"],))[1], lora()))
        off.append(program(**EXAMPLE))
    assert torch.equal(off[0], off[1])
    torch.testing.assert_close(off[0], frozen(EXAMPLE["ids"]), atol=1e-6, rtol=1e-6)
    program.use("saved")
    assert torch.equal(program(**EXAMPLE), start)
    program.remove("de")
    assert [*program.adapters] == ["saved", "fr"]
    with pytest.raises(ValueError, match="No adapter is held as 'de'; held are 'saved', 'fr'"):
        program.use("de")


def test_the_package_says_what_it_takes(program: Swappable) -> None:
    spec = json.loads(json.dumps(program.spec))
    assert spec["outputs"] == ["output"]
    (batch, length) = spec["inputs"]["ids"]["shape"]
    assert batch != length
    assert spec["sizes"] == {batch: [0, None], length: [0, None]}
    state = llfx.adapter_state_dict(adapted(lora()))
    assert {name: entry["shape"] for name, entry in spec["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in state.items()
    }
    assert spec["adapters"][0]["config"]["alpha"] == 16.0


@pytest.mark.parametrize(
    "cfg",
    [
        lora(r=2),
        lora(alpha=3.0),
        lora(r=1, alpha=5.0, rank_stabilized=True, dropout=0.1),
        lora(r=4, rank_pattern={"gate": 3}, alpha_pattern={"up": 2.0}),
    ],
)
def test_another_rank_and_scale_go_into_the_tensors(program: Swappable, tmp_path: Path, cfg: Any) -> None:
    gm = adapted(cfg, 3)
    program.load("other", saved(gm, tmp_path / "other"))
    for scale in (1.0, 0.25):
        program.use("other", scale)
        same(program, gm, scale)


def test_a_named_adapter_of_several_is_taken_from_its_file(program: Swappable, tmp_path: Path) -> None:
    gm = adapted(lora())
    llfx.add(gm, {"de": lora(r=2)})
    randomise(gm, 5)
    llfx.active(gm, "de")
    program.load("de", saved(gm, tmp_path / "de", adapter="de"))
    program.use("de")
    same(program, gm)
    with pytest.raises(ValueError, match=r"holds 2 configs, and the package takes 1.*adapter="):
        program.load("both", saved(gm, tmp_path / "both"))


def wrong_state(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in llfx.adapter_state_dict(adapted(lora())).items()}
    change(state)
    return state


A = "blocks.0.gate.lora_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(A), f"missing: {A}"),
        (lambda state: state.update(more=torch.ones(2)), "unexpected: more"),
        (lambda state: state.update({A: state[A].double()}), f"dtype of {A}: torch.float64 instead of torch.float32"),
        (lambda state: state.update({A: state[A][:2]}), rf"shape of {A}: \(2, \d+\) instead of \(4, \d+\)"),
        (lambda state: state.update({A: state[A].t()}), f"shape of {A}"),
        (lambda state: state[A].view(-1)[0].fill_(float("nan")), f"{A} is not finite"),
        (lambda state: state.update({A: [1.0]}), f"not a dense tensor: {A}"),
    ],
)
def test_a_dict_that_does_not_fit_changes_nothing(program: Swappable, change: Any, message: str) -> None:
    before = program(**EXAMPLE)
    with pytest.raises(ValueError, match=f"^bad does not fit the package: .*{message}"):
        program.load("bad", wrong_state(change))
    assert [*program.adapters] == ["saved"]
    assert torch.equal(program(**EXAMPLE), before)


def test_a_tensor_that_is_a_part_of_another_is_copied_alone(program: Swappable) -> None:
    gm = adapted(lora(), 4)
    wide = {name: torch.stack([tensor, tensor + 1], -1)[..., 0] for name, tensor in llfx.adapter_state_dict(gm).items()}
    program.load("part", wide)
    program.use("part")
    same(program, gm)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (lora(r=8), r"shape of blocks.0.gate.lora_A: \(8, \d+\) instead of \(4, \d+\)"),
        (lora(target_names="gate"), "differ at site 'blocks.0.up'"),
        (llfx.DoRA(r=4, target_names="gate|up"), "variant='DoRA', and the LoRA of the package has 'LoRA'"),
        (lora(bias=True), "bias=True, and the LoRA of the package has False"),
        (lora(r=2, alpha_pattern={"(g|ga)*te": 3.0}), "pattern .* may take long to search"),
        ([lora(), lora()], "holds 2 configs"),
        (lora(dtype=torch.float64), "dtype of blocks.0.gate.lora_A: torch.float64"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(program: Swappable, tmp_path: Path, cfg: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program.load("bad", saved(adapted(cfg), tmp_path / "bad"))
    assert [*program.adapters] == ["saved"]


def test_a_file_that_is_none_or_damaged_is_refused(program: Swappable, tmp_path: Path) -> None:
    path = saved(adapted(lora()), tmp_path / "fr")
    state = safetensors.torch.load_file(path)
    foreign = tmp_path / "foreign"
    safetensors.torch.save_file(state, foreign)
    whole = path.read_bytes()
    for bad, message in (
        (foreign, "not written by llfx.save"),
        (tmp_path / "none", "none is missing"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            program.load("bad", bad)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="corrupt"):
        program.load("bad", path)
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        program.load("bad", path)
    with pytest.raises(ValueError, match="a file or a dict of tensors, not a list"):
        program.load("bad", [])  # type: ignore[arg-type]


def test_an_adapter_of_another_base_is_told(program: Swappable, tmp_path: Path) -> None:
    gm = adapted(lora(), build=other_net)
    with pytest.warns(UserWarning, match="made for other weights than the package has, at 'blocks.0.gate'"):
        program.load("other", saved(gm, tmp_path / "other"))


def other_net() -> nn.Module:
    model = small_net()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model


def test_calls_that_do_not_fit_are_refused(program: Swappable) -> None:
    good = EXAMPLE["ids"]
    assert torch.equal(program(ids=good.t()), program(ids=good.t().contiguous()))
    for inputs, message in (
        ({}, "ids is missing"),
        ({"ids": good, "mask": good}, "mask is unknown; the package takes ids"),
        ({"ids": good.int()}, "a tensor of torch.int64 with 2 dimensions"),
        ({"ids": good[0]}, "with 2 dimensions"),
        ({"ids": good.tolist()}, "is a tensor"),
        ({"ids": good.to("meta")}, "is on meta, and the package runs on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            program(**inputs)
    for scale in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="scale is a finite number"):
            program.use("saved", scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="put: this package has no bank"):
        program.put(0, "saved")
    with pytest.raises(ValueError, match="The name of an adapter is a string"):
        program.load(None, {})  # type: ignore[arg-type]


def test_calls_see_one_adapter_as_a_whole(program: Swappable) -> None:
    expected = []
    for seed in (1, 2):
        program.load(str(seed), llfx.adapter_state_dict(adapted(lora(), seed)))
        program.use(str(seed))
        expected.append(program(**EXAMPLE))
    assert (expected[0] - expected[1]).abs().amax() > 1e-2
    wrong: list[Tensor] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            got = program(**EXAMPLE)
            # The first call of a thread may round as another number of cores does; two adapters differ by far more.
            if not any(torch.allclose(got, each, atol=1e-6) for each in expected):
                wrong.append(got)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        program.use(str(1 + turn % 2))
        with program.lock:
            program.use("1")
            assert torch.equal(program(**EXAMPLE), expected[0])
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


# The file alone, in another process.

ALONE = """
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("lora_lite_fx", "transformers", "peft"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, ".")
import torch
from swappable import Swappable

torch.set_num_threads(1)
program = Swappable("m.pt2")
inputs = torch.load("inputs.pt")
program.load("fr", "fr.safetensors")
program.use("fr", 0.5)
results = [program(**inputs)]
program.use(None)
results.append(program(**inputs))
torch.save(results, "results.pt")
assert not {"lora_lite_fx", "transformers"} & sys.modules.keys()
"""


@pytest.mark.broad
def test_one_file_runs_the_package_where_torch_alone_is(package: Path, tmp_path: Path) -> None:
    gm = adapted(lora(), 7)
    (tmp_path / "swappable.py").write_bytes(Path(swappable.__file__).read_bytes())
    (tmp_path / "m.pt2").write_bytes(package.read_bytes())
    saved(gm, tmp_path / "fr.safetensors")
    inputs = {"ids": ids(3, 9, seed=3)}
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    results = torch.load(tmp_path / "results.pt")
    for result, scale in zip(results, (0.5, 0.0), strict=True):
        with torch.no_grad(), llfx.scaled(gm, scale):
            torch.testing.assert_close(result, gm(**inputs), atol=1e-5, rtol=1e-5)


# Nothing is compiled.


def test_what_cannot_be_compiled_names_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("LoweringException: aten.mul.Tensor is not here\nand more")

    monkeypatch.setattr(dynamo, "aoti_compile_and_package", fail)
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")
    with pytest.raises(llfx.AdapterError, match=r"of aten.mul.Tensor of LoRA at 'blocks.0.\w+': Lowering.*bake"):
        llfx.save_aoti(adapted(lora()), path, EXAMPLE)
    assert path.read_bytes() == b"old"


def test_wrong_arguments(tmp_path: Path) -> None:
    gm = adapted(lora())
    with pytest.raises(llfx.CheckpointError, match=r"save_aoti\(model, path, inputs\)"):
        llfx.save_aoti(gm, 3, EXAMPLE)  # type: ignore[arg-type]
    with pytest.raises(llfx.ConfigError, match="does not return 'logit'"):
        llfx.save_aoti(gm, tmp_path / "m.pt2", EXAMPLE, outputs="logit")
    llfx.add(gm, {"bank": llfx.Bank(lora(), slots=2)})
    llfx.active(gm)
    with pytest.raises(llfx.AdapterError, match=r"and not both.*active\(model, name\)"):
        llfx.save_aoti(gm, tmp_path / "m.pt2", EXAMPLE)
    assert not (tmp_path / "m.pt2").exists()


def test_other_files_are_not_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        def __init__(self, metadata: dict[str, str]) -> None:
            self.get_metadata = lambda: metadata

    for metadata in ({}, {"lora_lite_fx": '{"format": 9}'}):
        monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path, found=metadata: Package(found))
        with pytest.raises(ValueError, match=r"has the format (None|9) of llfx.save_aoti, and this file reads 1"):
            Swappable(tmp_path / "m.pt2")


# More packages.


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless("DoRA".__eq__, [*TYPICAL, *OTHERS]))
def test_each_variant_is_exchanged_and_scaled(name: str, tmp_path: Path) -> None:
    cfg = small(llfx.registry()[name])
    gms = [adapted(cfg, seed) for seed in (1, 2)]
    program = compiled(gms[0], tmp_path / "m.pt2")
    program.use("saved", 0.5)
    same(program, gms[0], 0.5)
    program.load("b", saved(gms[1], tmp_path / "b"))
    for scale in (1.0, 0.5, -1.0):
        program.use("b", scale)
        same(program, gms[1], scale)
    program.use(None)
    first = program(**EXAMPLE)
    program.use("saved")
    program.use(None)
    assert torch.equal(program(**EXAMPLE), first)
    same(program, gms[0], 0.0)


@pytest.mark.slow
def test_a_factor_goes_into_the_tensors_that_the_class_names(tmp_path: Path) -> None:
    other: dict[str, Any] = {"alpha": 3.0, "target_names": "gate|up"}
    for cls, rank in ((llfx.LoHa, 2), (llfx.AdaLoRA, 4)):
        program = compiled(adapted(cls(r=4, target_names="gate|up")), tmp_path / "m.pt2")
        gm = adapted(cls(r=rank, **other), 2)
        program.load("other", saved(gm, tmp_path / "other"))
        program.use("other")
        same(program, gm)
    with pytest.raises(ValueError, match="r=2, and the AdaLoRA of the package has 4, for which its code was compiled"):
        program.load("lower", saved(adapted(llfx.AdaLoRA(r=2, **other)), tmp_path / "lower"))


@pytest.mark.slow
def test_slots_of_a_bank_are_filled(tmp_path: Path) -> None:
    bank = adapted(llfx.Bank(lora(), slots=3))
    llfx.save_aoti(bank, tmp_path / "m.pt2", {**EXAMPLE, "adapter_ids": torch.tensor([0, 1])})
    program = Swappable(tmp_path / "m.pt2")
    rows = torch.tensor([2, -1, 0])
    same(program, bank, adapter_ids=rows)
    one, less = adapted(lora(), 5), adapted(lora(r=2, alpha=3.0), 6)
    program.load("less", saved(less, tmp_path / "less"))
    program.put(2, saved(one, tmp_path / "one"))
    program.put(0, "less")
    llfx.put_slot(bank, 2, one)
    llfx.put_slot(bank, 0, less)
    same(program, bank, adapter_ids=rows)
    with pytest.raises(ValueError, match="use: this package has a bank"):
        program.use("less")
    with pytest.raises(ValueError, match="3 slots, 0 to 2, and not 3"):
        program.put(3, "less")
    with pytest.raises(ValueError, match="adapter_ids are slots, 0 to 2, or -1"):
        program(ids=ids(1, 2), adapter_ids=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"adapter_ids is .*a name is one size in all inputs"):
        program(ids=ids(2, 2), adapter_ids=torch.tensor([1]))


@pytest.mark.broad
def test_a_baked_package_has_nothing_to_exchange(tmp_path: Path) -> None:
    gm = adapted(llfx.DoRA(r=2, target_names="gate|up"))
    program = compiled(gm, tmp_path / "m.pt2", bake=True)
    same(program, gm)
    for call, *arguments in ((program.load, "a", {}), (program.use, None), (program.put, 0, {})):
        with pytest.raises(ValueError, match="was compiled with bake=True: it has no adapter to exchange"):
            call(*arguments)


@pytest.mark.slow
def test_only_what_acts_is_in_the_package(tmp_path: Path) -> None:
    gm = adapted(lora())
    llfx.add(gm, {"de": llfx.IA3(target_names="up")})
    llfx.active(gm)
    randomise(gm, 2)
    with llfx.scaled(gm, 0.5, "de"):
        program = compiled(gm, tmp_path / "m.pt2")
        for shape in SHAPES:
            inputs = {"ids": ids(*shape)}
            torch.testing.assert_close(program(**inputs), gm(**inputs), atol=1e-5, rtol=1e-5)
    program.use("saved", 0.25)
    same(program, gm, 0.25)
    with llfx.active(gm, []):
        assert compiled(gm, tmp_path / "m.pt2").spec["tensors"] == {}


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    gm = adapted(lora(), build=half_net)
    program = compiled(gm, tmp_path / "m.pt2")
    program.use("saved", 0.5)
    with torch.no_grad(), llfx.scaled(gm, 0.5):
        torch.testing.assert_close(program(**EXAMPLE), gm(**EXAMPLE), atol=5e-2, rtol=5e-2)


def half_net() -> nn.Module:
    return small_net().bfloat16()


@since("torch", "2.13", "The code of a step with a cache is compiled by g++ with AVX-512")
@pytest.mark.slow
def test_a_causal_model_decodes_with_a_cache(tmp_path: Path) -> None:
    model = captured(one_layer_llama, inputs={"input_ids": ids(2, 5) % 32})[0].eval()
    adapted_model = llfx.adapt(model, llfx.LoRA(r=2))
    randomise(adapted_model, 1)
    llfx.save_aoti(adapted_model, tmp_path / "m.pt2", cache=True)
    program = Swappable(tmp_path / "m.pt2")
    program.use("saved", 0.5)
    tokens = ids(2, 6, seed=4) % 32
    cache = {name: torch.zeros(2, 2, 0, 8) for name in program.spec["inputs"] if name.startswith("past_")}
    parts = []
    for part in (tokens[:, :5], tokens[:, 5:]):
        past = next(iter(cache.values())).shape[2]
        mask = torch.ones(2, past + part.shape[1], dtype=torch.long)
        logits, *present = program(input_ids=part, attention_mask=mask, **cache)
        cache = dict(zip(cache, present, strict=True))
        parts.append(logits)
    with torch.no_grad(), llfx.scaled(adapted_model, 0.5):
        expected = adapted_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_tensor_that_becomes_a_constant_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti, "_OPTIONS", {"always_keep_tensor_constants": True})
    with pytest.raises(llfx.AdapterError, match=r"differs from the model by .* after its adapter was exchanged"):
        llfx.save_aoti(adapted(llfx.DoRA(r=4, target_names="gate|up")), tmp_path / "m.pt2", EXAMPLE)
    assert not (tmp_path / "m.pt2").exists()
