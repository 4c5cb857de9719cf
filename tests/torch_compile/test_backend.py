"""The backend: a compiled model computes what the eager wrapper does, and never runs a site without its adapters."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lora_lite_fx as llfx
from lora_lite_fx.adapters.frozen_linear import FrozenLinear
from lora_lite_fx.adapters.promotion import call_forward
from lora_lite_fx.sites.finding import find_sites
from lora_lite_fx.sites.site import Site
from lora_lite_fx.torch_compile.backend import backend, compile_graph
from lora_lite_fx.torch_compile.record_run import record_run
from tests.support.conformance import close, gradients, randomise, small
from tests.support.own_variants import registered
from tests.support.selection import broad_after, slow_after
from tests.support.untouched import untouched

WIDTH, INNER = 4, 6
ALL = (".",)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A feed-forward block, with weights in torch's and in GPT-2's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = Conv1D(WIDTH, INNER)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        return x + self.drop(self.down(torch.tanh(self.up(x))))


class Branching(Block):
    """A block that branches on its data: export refuses it, and torch.compile runs it as two graphs."""

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.up(x))
        if h.sum() > 0:
            h = -h
        return x + self.drop(self.down(h))


class Net(nn.Module):
    def __init__(self, block: type[Block] = Block, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(sum(shape)))


def eager_of(carrier: nn.Module) -> Any:
    """Return the reference: a copy of an adapted model whose sites compute their variants' functions in Python."""
    reference: Any = copy.deepcopy(carrier)

    def adapted(module: Any, x: Tensor) -> Tensor:
        call: Callable[[Tensor], Tensor] = module.unmarked_forward or functools.partial(type(module).forward, module)
        base = FrozenLinear(call, weight_of(module), getattr(module, "bias", None), module.site, module.training)
        for placement in module.placements:
            call = functools.partial(call_forward, placement.local, call, base, placement.namespace(reference))
        return call(x)

    for module in reference.modules():
        if hasattr(module, "placements"):
            module.forward = functools.partial(adapted, module)
    return reference


def weight_of(module: Any) -> Any:
    return module.weight.t() if module.site.transposed else module.weight


def check(fast: Any, carrier: nn.Module, reference: nn.Module, x: Tensor, tolerance: float = 1e-6) -> None:
    """Check that outputs and adapter gradients are those of the reference."""
    carrier.zero_grad()
    y = gradients(fast, (x,))[0]
    grads = {name: p.grad for name, p in carrier.named_parameters() if p.grad is not None}
    expected_y, expected = gradients(reference, (x,))
    close(y, expected_y, tolerance, "output")
    assert grads.keys() == expected.keys()
    assert grads
    for name, grad in grads.items():
        close(grad, expected[name], tolerance, f"gradient of {name}")


CONFIGS = [
    llfx.LoRA(r=2, target_names=ALL, dropout=0.3),
    llfx.DoRA(r=2, target_names=ALL),
    llfx.IA3(target_roles=("up", "down")),
    llfx.HRA(r=2, target_names=ALL),
    llfx.PiSSA(r=2, target_names=ALL),
    [llfx.VeRA(r=2, target_names=ALL), llfx.LoRA(r=2, target_names=("up", "head"), rank_pattern={"up": 3})],
]


@pytest.mark.broad
@pytest.mark.parametrize(
    "cfg",
    broad_after(1, slow_after(3, CONFIGS)),
    ids=lambda cfg: type(cfg[0] if isinstance(cfg, list) else cfg).__name__,
)
def test_a_compiled_model_is_its_eager_wrapper(cfg: Any) -> None:
    """Compare what `backend(cfg)` adapts to `wrap`, at several shapes and in both modes."""
    model = Net(count=1).eval()
    adapting = backend(cfg, inner="aot_eager" if isinstance(cfg, llfx.LoRA) else "eager")
    with untouched(model):
        base = model(inputs(2, 3))
        carrier, wrapped = adapting.adapt(model, inputs(2, 3)), llfx.wrap(model, cfg)
        fast = torch.compile(carrier, backend=adapting)
        close(fast(inputs(2, 3)), base, 1e-5, "identity at start")
        assert list(llfx.adapter_state_dict(carrier)) == list(llfx.adapter_state_dict(wrapped))
        for adapted_model in (carrier, wrapped):
            randomise(adapted_model, 0)
        for shape in ((2, 3), (5, 4)):
            check(fast, carrier, wrapped, inputs(*shape), 1e-5)
        close(model(inputs(2, 3)), base, 0, "the model itself")
        carrier.train(), wrapped.train()
        check(fast, carrier, wrapped, inputs(2, 3), 1e-5)
        site = next(name for name, module in carrier.named_modules() if hasattr(module, "placements"))
        carrier.get_submodule(site).eval(), wrapped.get_submodule(site).eval()  # which has a mode of its own
        check(fast, carrier, wrapped, inputs(2, 3), 1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.broad
@pytest.mark.parametrize("cls", broad_after(1, [llfx.LoRA, llfx.OFT]), ids=lambda cls: cls.__name__)
def test_a_model_that_breaks_into_graphs_is_adapted_in_each(cls: type[llfx.Variant]) -> None:
    """Adapt the sites of each graph, and those that run between the graphs."""
    model = Net(Branching, 3).eval()
    adapting = backend(small(cls, 2, target_names=ALL), inner="eager")
    with untouched(model):
        carrier = adapting.adapt(model, inputs(2, 3))
        assert len({name.rpartition(".")[0] for name in llfx.adapter_state_dict(carrier)}) == 7
        randomise(carrier, 0)
        reference = eager_of(carrier)
        fast = torch.compile(carrier, backend=adapting)
        for shape in ((2, 3), (4, 5)):
            check(fast, carrier, reference, inputs(*shape))


@pytest.mark.broad
@pytest.mark.parametrize("with_config", [True, False])
def test_graphs_without_sites_of_an_adapted_model_are_compiled_as_they_are(with_config: bool) -> None:
    """Adapt one block of several: the graphs of the others, and those between the graphs, have no sites."""
    adapting = backend(llfx.LoRA(r=2, target_names=("up",), layers=(1,)), inner="eager")
    carrier = adapting.adapt(Net(Branching, 3).eval(), inputs(2, 3))
    randomise(carrier, 0)
    fast = torch.compile(carrier, backend=adapting if with_config else backend(inner="eager"))
    check(fast, carrier, eager_of(carrier), inputs(2, 3))


@pytest.mark.broad
def test_layers_with_different_adapters_do_not_share_a_graph() -> None:
    carrier = backend(llfx.LoRA(r=2, target_names=("up",), layers=(0, 1))).adapt(Net(Branching, 3).eval(), inputs(2, 3))
    randomise(carrier, 0)
    check(torch.compile(carrier, backend=backend(inner="eager")), carrier, eager_of(carrier), inputs(2, 3))


@dataclass(frozen=True, kw_only=True)
class ReadsSite(llfx.Variant):
    """Adds a vector times a number that depends on a value of the site."""

    field: str = "name"

    def params(self, site: Site) -> dict[str, llfx.ParamSpec]:
        return {"lora_d": llfx.ParamSpec((site.d_out,))}

    def forward(self, x: Tensor, base: FrozenLinear, p: Any) -> Tensor:
        y: Tensor = base(x) + sum(str(getattr(base.site, self.field)).encode()) % 97 * p.lora_d
        return y


@pytest.mark.broad
@pytest.mark.parametrize("field", ["d_in", "layer"])
def test_layers_do_not_share_what_their_forward_reads_of_the_site(field: str) -> None:
    adapting = backend(ReadsSite(field=field, target_names=("up",)), inner="eager")
    with registered(ReadsSite):
        carrier = adapting.adapt(Net(Branching, 3).eval(), inputs(2, 3))
        randomise(carrier, 0)
        check(torch.compile(carrier, backend=adapting), carrier, eager_of(carrier), inputs(2, 3))


@pytest.mark.broad
def test_inductor_computes_what_the_eager_wrapper_does() -> None:
    carrier = backend(llfx.DoRA(r=2, target_names=("up", "head"))).adapt(Net().eval(), inputs(2, 3))
    randomise(carrier, 0)
    check(torch.compile(carrier, backend=compile_graph), carrier, eager_of(carrier), inputs(2, 3), 1e-5)


# Never without adapters.


class Outside(Block):
    """A block that runs a linear where torch.compile does not look."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hidden(self, x: Tensor) -> Any:
        return self.up(x)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(self.hidden(x))


def test_a_site_outside_the_graphs_is_an_error_that_names_it() -> None:
    model = Net(Outside).eval()
    adapting = backend(llfx.LoRA(r=2, target_names=("up", "down")), inner="eager")
    with untouched(model):
        fast = torch.compile(adapting.adapt(model, inputs(2, 3)), backend=adapting)
        for _ in range(2):
            with pytest.raises(llfx.AdapterError, match=r"'blocks\.0\.up' runs outside a rewritten graph"):
                fast(inputs(2, 3))
        model(inputs(2, 3))  # without adapters, and without an error
    torch._dynamo.reset()  # because torch.compile remembers, for all models of a class, which code it cannot compile
    only_down = backend(llfx.LoRA(r=2, target_names=("down",)), inner="eager")
    carrier = only_down.adapt(model, inputs(2, 3))
    randomise(carrier, 0)
    check(torch.compile(carrier, backend=only_down), carrier, eager_of(carrier), inputs(2, 3))


@pytest.mark.broad
def test_past_the_limit_of_recompilations_a_site_is_an_error() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Any:
            return super().forward(x) * scale

    adapting = backend(llfx.LoRA(r=2, target_names=ALL), inner="eager")
    fast = torch.compile(adapting.adapt(Scaled().eval(), inputs(2, 3)), backend=adapting)
    with torch._dynamo.config.patch(recompile_limit=2, specialize_float=True):
        for scale in (1.0, 2.0):
            fast(inputs(2, 3), scale)
        with pytest.raises(llfx.AdapterError, match=r"'up' runs outside.*recompile_limit"):
            fast(inputs(2, 3), 3.0)


@pytest.mark.broad
def test_a_model_that_carries_its_adapters_never_runs_without_them() -> None:
    carrier = backend(llfx.LoRA(r=2, target_names=("down",))).adapt(Net().eval(), inputs(2, 3))
    for run in (carrier, torch.compile(carrier, backend="eager"), torch.compile(carrier, backend="aot_eager")):
        with pytest.raises(llfx.AdapterError, match=r"'blocks\.0\.down' runs outside a rewritten graph"):
            run(inputs(2, 3))
    randomise(carrier, 0)
    clone = copy.deepcopy(carrier)  # which has adapters of its own
    with torch.no_grad():
        for parameter in llfx.adapter_parameters(clone):
            parameter.mul_(2)
    check(torch.compile(clone, backend=backend(inner="eager")), clone, eager_of(clone), inputs(2, 3))
    wrapped_in_more = nn.Sequential(carrier, nn.Linear(5, 2).requires_grad_(False))
    fast = torch.compile(lambda x: wrapped_in_more(x) + eager_of(carrier)(x).sum(), backend=backend(inner="eager"))
    reference = nn.Sequential(eager_of(carrier), wrapped_in_more[1])
    x = inputs(2, 3)
    close(fast(x), reference(x) + eager_of(carrier)(x).sum(), 1e-6, "inside another module and function")


class Positions(Block):
    """A block that projects positions, which are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Linear(1, WIDTH)
        self.table = nn.Buffer(torch.randn(9, 1))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + self.at(self.table[: x.shape[1]]))


def test_a_linear_that_runs_on_constants_alone_is_not_a_site() -> None:
    adapting = backend(llfx.LoRA(r=1, target_names=ALL), inner="eager")
    carrier = adapting.adapt(Positions().eval(), inputs(2, 3))
    assert "at.lora_A" not in llfx.adapter_state_dict(carrier)
    randomise(carrier, 0)
    fast, reference = torch.compile(carrier, backend=adapting), eager_of(carrier)
    for shape in ((2, 3), (2, 5)):
        check(fast, carrier, reference, inputs(*shape))


class Rare(Block):
    """A block with a linear that runs on some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.rare(x) if x.shape[0] > 4 else super().forward(x)


@pytest.mark.broad
def test_a_site_that_did_not_run_on_the_inputs_of_adapt_is_an_error_later() -> None:
    by_role = llfx.LoRA(r=2, target_roles=("up",))
    for cfg in (llfx.LoRA(r=2, target_names=ALL), by_role):
        carrier = backend(cfg).adapt(Rare().eval(), inputs(2, 3))
        for adapted in (carrier, copy.deepcopy(carrier)):
            torch._dynamo.reset()
            fast = torch.compile(adapted, backend=backend(inner="eager"))
            fast(inputs(2, 3))
            with pytest.raises(llfx.AdapterError, match="Site 'rare' did not run on the inputs that"):
                fast(inputs(6, 3))
    torch._dynamo.reset()
    carrier = backend(llfx.LoRA(r=2, target_names=("up",))).adapt(Rare().eval(), inputs(2, 3))
    fast = torch.compile(carrier, backend=backend(inner="eager"))
    for shape in ((2, 3), (6, 3)):
        fast(inputs(*shape))


class Other(nn.Linear):
    """A linear in eager mode, and something else where torch.compile captures it."""

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias
        return super().forward(x)


def test_a_site_that_is_not_a_linear_in_the_graph_is_an_error() -> None:
    model = Net(count=1).eval()
    model.blocks[0].up = Other(WIDTH, INNER)
    carrier = backend(llfx.LoRA(r=2, target_names=("up", "down"))).adapt(model, inputs(2, 3))
    with pytest.raises(llfx.AdapterError, match=r"'blocks\.0\.up' is not a linear in the graph"):
        torch.compile(carrier, backend=backend(inner="eager"))(inputs(2, 3))
    torch._dynamo.reset()
    carrier = backend(llfx.LoRA(r=2, target_names=("down",))).adapt(model, inputs(2, 3))
    randomise(carrier, 0)
    check(torch.compile(carrier, backend=backend(inner="eager")), carrier, eager_of(carrier), inputs(2, 3))


class Mapped(Block):
    """A block that runs transforms of torch.func where torch.compile captures it, as scans do."""

    def forward(self, x: Tensor) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return super().forward(x)
        h = torch.vmap(torch.vmap(torch.tanh))(self.up(x))
        scaled = torch.vmap(lambda row, bias, scale: row * scale + 0 * bias, in_dims=(1, None, None), out_dims=1)
        return x + self.drop(self.down(scaled(h, self.up.bias, 1.0)))


@pytest.mark.broad
def test_sites_beside_transforms_of_functions_are_adapted() -> None:
    carrier = backend(llfx.LoRA(r=2, target_names=ALL)).adapt(Net(Mapped).eval(), inputs(2, 3))
    randomise(carrier, 0)
    fast = torch.compile(carrier, backend=backend(inner="eager"))
    for shape in ((2, 3), (5, 4)):
        check(fast, carrier, eager_of(carrier), inputs(*shape))


# Models that carry no adapters.


REFUSED = r"captured a graph.* of a model that carries no adapters.*adapt\(model, \*inputs\)"


@pytest.mark.broad
def test_a_model_that_carries_no_adapters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite_fx.torch_compile.backend.ORIGINALS", [])
    model, other = Net(Branching).eval(), Net(Branching).eval()
    adapting = backend(llfx.LoRA(r=2, target_names=ALL), inner="eager")

    def call(x: Tensor) -> Any:
        return model(x)

    def refuse(compiled: Any) -> None:
        for _ in range(2):
            with pytest.raises(llfx.AdapterError, match=REFUSED):
                compiled(inputs(2, 3))
        torch._dynamo.reset()

    for each in (adapting, backend(inner="eager")):
        refuse(torch.compile(model, backend=each))
        refuse(torch.compile(call, backend=each))
    refuse(torch.compile(torch.sin, backend=adapting))
    carrier = adapting.adapt(model, inputs(2, 3))
    monkeypatch.undo()
    for each in (adapting, backend(inner="eager")):
        refuse(torch.compile(model, backend=each))
    refuse(torch.compile(other, backend=adapting))
    torch.compile(carrier, backend=adapting)(inputs(2, 3))


@pytest.mark.broad
def test_other_modules_beside_an_adapted_model_are_compiled_as_they_are() -> None:
    """Run a module whose graphs have parameters and no sites before and after an adapted one."""
    adapting = backend(llfx.LoRA(r=2, target_names=("blocks",)), inner="eager")
    carrier = adapting.adapt(Net(Branching).eval(), inputs(2, 3))
    randomise(carrier, 0)
    before, after = Branching().eval().requires_grad_(False), nn.Linear(5, 2).requires_grad_(False)
    whole, reference = nn.Sequential(before, carrier, after), nn.Sequential(before, eager_of(carrier), after)
    x = inputs(2, 3)
    close(torch.compile(whole, backend=backend(inner="eager"))(x), reference(x), 1e-6, "beside other modules")
    torch._dynamo.reset()
    with pytest.raises(llfx.AdapterError, match=REFUSED + r".*other models beside it need backend\(\)"):
        torch.compile(whole, backend=adapting)(x)


def test_errors_of_configs_and_models() -> None:
    model = Net().eval()
    with pytest.raises(llfx.ConfigError, match="must be a variant"):
        llfx.backend("lora")  # type: ignore[arg-type]
    with pytest.raises(llfx.ConfigError, match=r"backend\(\) has no adapters\. The call is backend\(LoRA"):
        backend().adapt(model, inputs(2, 3))
    with pytest.raises(llfx.SelectionError, match="the nearest: blocks"):
        backend(llfx.LoRA(target_names=("upp",))).adapt(model, inputs(2, 3))
    with pytest.raises(llfx.ConfigError, match=r"EVA.*starts from data: give calibration"):
        backend(llfx.EVA(r=2, target_names=ALL)).adapt(model, inputs(2, 3))
    attention = nn.MultiheadAttention(WIDTH, 2)
    with pytest.raises(llfx.ConfigError, match="in_proj' is not a module that is called"):
        backend(llfx.LoRA(r=2, target_names=("in_proj",))).adapt(attention, *[inputs(2, 3)] * 3, need_weights=False)


def test_adapters_move_between_files_graphs_and_compiled_models(tmp_path: Path) -> None:
    model = Net().eval()
    cfg = llfx.LoRA(r=2, target_roles=("up", "down"))
    adapting = backend(cfg, inner="eager")
    carrier = adapting.adapt(model, inputs(2, 3))
    fast = torch.compile(carrier, backend=adapting)
    randomise(carrier, 0)
    llfx.save(carrier, tmp_path / "adapter.safetensors")
    gm = llfx.load(model, tmp_path / "adapter.safetensors")
    close(fast(inputs(2, 3)), gm(inputs(2, 3)), 1e-6, "loaded")
    randomise(gm, 1)
    llfx.load_adapter_state_dict(carrier, llfx.adapter_state_dict(gm))
    close(fast(inputs(2, 3)), gm(inputs(2, 3)), 1e-6, "loaded into the compiled model")


def test_the_backend_is_registered_by_name() -> None:
    """Load the declared entry point: an installation from before it was declared does not have it."""
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (name, value), *others = pyproject["project"]["entry-points"]["torch_dynamo_backends"].items()
    assert not others
    entry = importlib.metadata.EntryPoint(name, value, "torch_dynamo_backends")
    assert entry.load() is compile_graph
    if name not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(entry.load(), name)
    carrier = adapted_small()
    close(torch.compile(carrier, backend=name)(inputs(2, 3)), eager_of(carrier)(inputs(2, 3)), 1e-5, "by name")


def adapted_small() -> nn.Module:
    carrier = backend(llfx.LoRA(r=2, target_names=ALL)).adapt(Block().eval(), inputs(2, 3))
    randomise(carrier, 0)
    return carrier


# Recorded runs.


def test_a_recorded_run_has_the_sites_and_roles_of_an_export() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.net = nn.Embedding(9, WIDTH), Net()
            self.again, self.out = self.net.blocks[0], nn.Linear(WIDTH, 9)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Any:
            h = self.embed(ids)
            return self.out(self.again(h + F.pad(self.net(h), (0, -1))))

    model = Tied().eval()
    ids = torch.randint(9, (2, 3))
    with untouched(model):
        recorded, exported = find_sites(record_run(model, (ids,), {})), find_sites(llfx.capture(model, (ids,)))
    assert [(s.name, s.roles, s.transposed, len(s.calls)) for s in recorded] == [
        (s.name, s.roles, s.transposed, len(s.calls)) for s in exported
    ]
