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
from lora_lite_fx.adapters.promotion import adapt
from lora_lite_fx.capture.record_run import record_run
from lora_lite_fx.sites.finding import find_sites
from lora_lite_fx.sites.site import Site
from lora_lite_fx.torch_compile.backend import backend, compile_graph
from tests.support.conformance import close, gradients, randomise, small
from tests.support.own_variants import registered
from tests.support.selection import broad_after
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
        call: Callable[[Tensor], Tensor] = module.unmarked_forward
        base = FrozenLinear(call, weight_of(module), getattr(module, "bias", None), module.site, module.training)
        for placement in module.placements:
            call = functools.partial(adapt, placement.local, call, base, placement.namespace(reference))
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


@pytest.mark.parametrize(
    "cfg", broad_after(1, CONFIGS), ids=lambda cfg: type(cfg[0] if isinstance(cfg, list) else cfg).__name__
)
def test_a_compiled_model_is_its_eager_wrapper(cfg: Any) -> None:
    """Compare a model with `backend(cfg)` to `wrap`, at several shapes and in both modes."""
    model = Net(count=1).eval()
    adapted = backend(cfg, inner="aot_eager" if isinstance(cfg, llfx.LoRA) else "eager")
    fast = torch.compile(model, backend=adapted)
    with untouched(model):
        base = model(inputs(2, 3))
        close(fast(inputs(2, 3)), base, 1e-5, "identity at start")
        wrapped = llfx.wrap(model, cfg)
        assert adapted.model is not None
        assert list(llfx.adapter_state_dict(adapted.model)) == list(llfx.adapter_state_dict(wrapped))
        for adapted_model in (adapted.model, wrapped):
            randomise(adapted_model, 0)
        for shape in ((2, 3), (5, 4)):
            check(fast, adapted.model, wrapped, inputs(*shape), 1e-5)
        close(model(inputs(2, 3)), base, 0, "the model itself")
    model.train(), wrapped.train()
    check(fast, adapted.model, wrapped, inputs(2, 3), 1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("cls", broad_after(1, [llfx.LoRA, llfx.OFT]), ids=lambda cls: cls.__name__)
def test_a_model_that_breaks_into_graphs_is_adapted_in_each(cls: type[llfx.Variant]) -> None:
    """Run one graph for all layers, with the adapters of each; sites that run between the graphs are adapted too."""
    model = Net(Branching, 3).eval()
    adapted = backend(small(cls, 2, target_names=ALL), inner="eager")
    fast = torch.compile(model, backend=adapted)
    with untouched(model):
        fast(inputs(2, 3))
        assert adapted.model is not None
        assert len({name.rpartition(".")[0] for name in llfx.adapter_state_dict(adapted.model)}) == 7
        randomise(adapted.model, 0)
        reference = eager_of(adapted.model)
        for shape in ((2, 3), (4, 5)):
            check(fast, adapted.model, reference, inputs(*shape))
    torch._dynamo.reset()  # because torch.compile compiles a code object a limited number of times
    carried = torch.compile(adapted.model, backend=backend(inner="eager"))
    check(carried, adapted.model, reference, inputs(3, 3))


def test_layers_with_different_adapters_do_not_share_a_graph() -> None:
    cfg = llfx.LoRA(r=2, target_names=("up",), layers=(0, 1))
    model = Net(Branching, 3).eval()
    adapted = backend(cfg, inner="eager")
    carrier = adapted.adapt(model, inputs(2, 3))
    randomise(carrier, 0)
    with pytest.raises(llfx.AdapterError, match=r"blocks\.2\.up.*captured for 'blocks\.1\.up'"):
        torch.compile(model, backend=adapted)(inputs(2, 3))
    torch._dynamo.reset()  # because torch.compile compiles a code object a limited number of times
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


def test_layers_share_a_graph_where_forward_reads_equal_values() -> None:
    model = Net(Branching, 3).eval()
    adapted = backend(ReadsSite(field="d_in", target_names=("up",)), inner="eager")
    with registered(ReadsSite):
        carrier = adapted.adapt(model, inputs(2, 3))
        randomise(carrier, 0)
        check(torch.compile(model, backend=adapted), carrier, eager_of(carrier), inputs(2, 3))


def test_layers_do_not_share_a_graph_where_forward_reads_other_values() -> None:
    model = Net(Branching, 3).eval()
    adapted = backend(ReadsSite(field="layer", target_names=("up",)), inner="eager")
    with registered(ReadsSite):
        carrier = adapted.adapt(model, inputs(2, 3))
        randomise(carrier, 0)
        with pytest.raises(llfx.AdapterError, match=r"blocks\.2\.up.*captured for 'blocks\.1\.up', but is adapted"):
            torch.compile(model, backend=adapted)(inputs(2, 3))
        torch._dynamo.reset()  # because torch.compile compiles a code object a limited number of times
        check(torch.compile(carrier, backend=backend(inner="eager")), carrier, eager_of(carrier), inputs(2, 3))


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
    adapted = backend(llfx.LoRA(r=2, target_names=("up", "down")), inner="eager")
    several = [torch.compile(model, backend=adapted) for _ in range(2)]
    with untouched(model):
        for fast, message in zip(
            several, (r"'blocks\.0\.up' runs outside a rewritten graph", r"nothing up to Net\.forward"), strict=True
        ):
            for _ in range(2):
                with pytest.raises(llfx.AdapterError, match=message):
                    fast(inputs(2, 3))
        model(inputs(2, 3))  # without adapters, and without an error
    torch._dynamo.reset()  # because torch.compile remembers, for all models of a class, which code it cannot compile
    only_down = backend(llfx.LoRA(r=2, target_names=("down",)), inner="eager")
    fast = torch.compile(model, backend=only_down)
    fast(inputs(2, 3))
    assert only_down.model is not None
    randomise(only_down.model, 0)
    check(fast, only_down.model, eager_of(only_down.model), inputs(2, 3))


@pytest.mark.broad
def test_past_the_limit_of_recompilations_a_site_is_an_error() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Any:
            return super().forward(x) * scale

    model = Scaled().eval()
    adapted = backend(llfx.LoRA(r=2, target_names=ALL), inner="eager")
    fast = torch.compile(model, backend=adapted)
    carried = torch.compile(adapted.adapt(model, inputs(2, 3)), backend=backend(inner="eager"))
    with torch._dynamo.config.patch(recompile_limit=2, specialize_float=True):
        for run in (fast, carried):
            torch._dynamo.reset()
            for scale in (1.0, 2.0):
                run(inputs(2, 3), scale)
            with pytest.raises(llfx.AdapterError, match=r"'up' runs outside.*recompile_limit"):
                run(inputs(2, 3), 3.0)


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
    """A block that projects positions: constants in a run, a function of the input's size in a graph of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Linear(1, WIDTH)
        self.table = nn.Buffer(torch.randn(9, 1))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + self.at(self.table[: x.shape[1]]))


def test_a_site_that_ran_on_constants_in_the_first_call_is_an_error_later() -> None:
    model = Positions().eval()
    fast = torch.compile(model, backend=backend(llfx.LoRA(r=1, target_names=ALL), inner="eager"))
    fast(inputs(2, 3))
    with pytest.raises(llfx.AdapterError, match=r"Site 'at' did not run.*or on constants alone.*exclude_names"):
        fast(inputs(2, 5))
    torch._dynamo.reset()
    adapted = backend(llfx.LoRA(r=1, target_names=ALL, exclude_names=("at",)), inner="eager")
    carrier = adapted.adapt(model, inputs(2, 3))
    randomise(carrier, 0)
    fast, reference = torch.compile(model, backend=adapted), eager_of(carrier)
    for shape in ((2, 3), (2, 5)):
        check(fast, carrier, reference, inputs(*shape))


class Rare(Block):
    """A block with a linear that runs on some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.rare(x) if x.shape[0] > 4 else super().forward(x)


def test_a_site_that_did_not_run_in_the_first_call_is_an_error_later() -> None:
    adapted = backend(llfx.LoRA(r=2, target_names=ALL), inner="eager")
    fast = torch.compile(Rare().eval(), backend=adapted)
    fast(inputs(2, 3))
    with pytest.raises(llfx.AdapterError, match="Site 'rare' did not run in the first call"):
        fast(inputs(6, 3))
    by_name = torch.compile(Rare().eval(), backend=backend(llfx.LoRA(r=2, target_names=("up",)), inner="eager"))
    for shape in ((2, 3), (6, 3)):
        by_name(inputs(*shape))


class Other(nn.Linear):
    """A linear in eager mode, and something else where torch.compile captures it."""

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias
        return super().forward(x)


def test_a_site_that_is_not_a_linear_in_the_graph_is_an_error() -> None:
    model = Net(count=1).eval()
    model.blocks[0].up = Other(WIDTH, INNER)
    both = backend(llfx.LoRA(r=2, target_names=("up", "down")), inner="eager")
    carrier = both.adapt(model, inputs(2, 3))
    for fast in (torch.compile(model, backend=both), torch.compile(carrier, backend=backend(inner="eager"))):
        with pytest.raises(llfx.AdapterError, match=r"'blocks\.0\.up' is not a linear in the graph"):
            fast(inputs(2, 3))
        torch._dynamo.reset()
    adapted = backend(llfx.LoRA(r=2, target_names=("down",)), inner="eager")
    carrier = adapted.adapt(model, inputs(2, 3))
    randomise(carrier, 0)
    check(torch.compile(model, backend=adapted), carrier, eager_of(carrier), inputs(2, 3))


class Mapped(Block):
    """A block that runs transforms of torch.func where torch.compile captures it, as scans do."""

    def forward(self, x: Tensor) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return super().forward(x)
        h = torch.vmap(torch.vmap(torch.tanh))(self.up(x))
        scaled = torch.vmap(lambda row, bias, scale: row * scale + 0 * bias, in_dims=(1, None, None), out_dims=1)
        return x + self.drop(self.down(scaled(h, self.up.bias, 1.0)))


def test_sites_beside_transforms_of_functions_are_adapted() -> None:
    model = Net(Mapped).eval()
    adapted = backend(llfx.LoRA(r=2, target_names=ALL), inner="eager")
    carrier = adapted.adapt(model, inputs(2, 3))
    randomise(carrier, 0)
    for fast in (torch.compile(model, backend=adapted), torch.compile(carrier, backend=backend(inner="eager"))):
        for shape in ((2, 3), (5, 4)):
            check(fast, carrier, eager_of(carrier), inputs(*shape))
        torch._dynamo.reset()


def test_errors_of_configs_and_models() -> None:
    model = Net().eval()
    with pytest.raises(llfx.ConfigError, match="must be a variant"):
        llfx.backend("lora")  # type: ignore[arg-type]
    with pytest.raises(llfx.SelectionError, match="the nearest: blocks"):
        torch.compile(model, backend=backend(llfx.LoRA(target_names=("upp",)), inner="eager"))(inputs(2, 3))
    with pytest.raises(llfx.AdapterError, match="Net carries no adapters"):
        torch.compile(model, backend=backend(inner="eager"))(inputs(2, 3))
    with pytest.raises(llfx.AdapterError, match="with a function"):
        torch.compile(lambda x: model(x), backend=backend(llfx.LoRA(), inner="eager"))(inputs(2, 3))
    fast = torch.compile(model, backend=backend(llfx.EVA(r=2, target_names=ALL), inner="eager"))
    for _ in range(2):
        with pytest.raises(llfx.ConfigError, match=r"EVA.*starts from data: give calibration"):
            fast(inputs(2, 3))
    attention = nn.MultiheadAttention(WIDTH, 2)
    with pytest.raises(llfx.ConfigError, match="in_proj' is not a module that is called"):
        backend(llfx.LoRA(r=2, target_names=("in_proj",))).adapt(attention, *[inputs(2, 3)] * 3, need_weights=False)


def test_adapters_move_between_files_graphs_and_compiled_models(tmp_path: Path) -> None:
    model = Net().eval()
    cfg = llfx.LoRA(r=2, target_roles=("up", "down"))
    adapted = backend(cfg, inner="eager")
    fast = torch.compile(model, backend=adapted)
    fast(inputs(2, 3))
    assert adapted.model is not None
    randomise(adapted.model, 0)
    llfx.save(adapted.model, tmp_path / "adapter.safetensors")
    gm = llfx.load(model, tmp_path / "adapter.safetensors")
    close(fast(inputs(2, 3)), gm(inputs(2, 3)), 1e-6, "loaded")
    randomise(gm, 1)
    llfx.load_adapter_state_dict(adapted.model, llfx.adapter_state_dict(gm))
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
