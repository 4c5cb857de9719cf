"""What a user sees besides results: no warning that the user did not cause, log lines, progress bars, short texts."""

from __future__ import annotations

import copy
import functools
import io
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_lite_fx as llfx
from lora_lite_fx import log
from lora_lite_fx.adapters.listing import describe_adapters
from lora_lite_fx.capture.quiet_torch import quiet_export
from lora_lite_fx.execution.adapted_graph_module import AdaptedGraphModule
from lora_lite_fx.execution.execution import Execution
from tests.support.models import GatedMLP, Net, tiny_llama
from tests.support.models import ids as net_ids
from tests.support.releases import since
from tests.support.selection import slow_unless

CFG = llfx.LoRA(r=2, target_roles=("attention", "mlp"))  # by default a new head is warned of
IDS = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
CLASSES = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1])}


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(tiny_llama(pad_token_id=0, eos_token_id=1)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    return hf.BertForSequenceClassification(config).eval()


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Net([GatedMLP], bias=True, tied=False).eval()


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "llama": (llama, TEXT),
    "bert": (bert, CLASSES),
    "plain": (plain, {"ids": net_ids(2, 5)}),
}


@functools.cache
def rewritten(name: str) -> Any:
    build, inputs = MODELS[name]
    return llfx.rewrite(build(), CFG, inputs)


@functools.cache
def chat() -> Any:
    return llfx.adapt(llama(), CFG)


def train(model: Any, inputs: dict[str, Tensor]) -> None:
    result = model.train()(**inputs)
    (result if isinstance(result, Tensor) else result.loss).sum().backward()
    model.eval()


# Warnings.


@pytest.fixture
def quiet() -> Any:
    """Make every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.broad
@pytest.mark.parametrize("name", slow_unless(lambda name: name != "bert", MODELS))
def test_front_doors_warn_of_nothing(name: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    model, file = build(), tmp_path / "adapter.safetensors"
    gm = llfx.rewrite(model, CFG, inputs)
    train(gm, inputs)
    with torch.no_grad():
        gm(**inputs)
    train(copy.deepcopy(gm), inputs)
    llfx.save(gm, file)
    llfx.load(model, file, inputs)
    llfx.save_peft(gm, tmp_path / "peft")
    llfx.load_peft(model, tmp_path / "peft", inputs)
    llfx.merge(gm)(**inputs)
    llfx.remove(gm)(**inputs)
    llfx.optimize(gm)(**inputs)
    llfx.rewrite(gm, llfx.IA3())
    str(llfx.inspect(gm))
    str(llfx.inspect(model, inputs))
    train(llfx.wrap(model, CFG, inputs), inputs)
    llfx.rewrite(model, llfx.EVA(r=2), inputs, calibration=[inputs])


@pytest.mark.broad
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", slow_unless(lambda name: name == "llama", ["llama", "bert"]))
def test_adapted_models_warn_of_nothing(name: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    model = llfx.adapt(build(), CFG)
    train(model, inputs)
    model.save_pretrained(tmp_path / "folder")
    llfx.adapt(build(), tmp_path / "folder")
    llfx.merge(model)
    llfx.remove(model)
    llfx.inspect(model)
    copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    train(model, inputs)
    model.gradient_checkpointing_disable()
    if name == "llama":
        model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False)
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(2)]
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no"
    )
    hf.Trainer(model, arguments, train_dataset=rows).train()


@pytest.mark.broad
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", slow_unless(lambda name: name != "llama", MODELS))
def test_torch_compile_warns_of_nothing(name: str) -> None:
    build, inputs = MODELS[name]
    torch._dynamo.reset()
    train(torch.compile(rewritten(name), backend="aot_eager"), inputs)
    backend = llfx.backend(CFG, inner="aot_eager")
    compiled: Any = torch.compile(backend.adapt(build(), **inputs), backend=backend)
    compiled(**inputs)


@pytest.mark.broad
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_an_adapted_model_compiles_as_one_graph(mode: bool) -> None:
    graphs: list[Any] = []

    def count(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    counters.clear()
    model = chat().train(mode)
    compiled: Any = torch.compile(model, backend=count)
    result = compiled(**TEXT)
    assert torch.equal(result.logits, model(**TEXT).logits)
    assert len(graphs) == 1
    assert not counters["graph_break"]


def test_an_import_warns_of_nothing_and_loads_no_transformers() -> None:
    code = "import sys, lora_lite_fx; sys.exit('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Log lines.


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the library at INFO, without their seconds."""
    lines = [record.getMessage() for record in caplog.records if record.name == "lora_lite_fx"]
    lines = [line for line in lines if not line.endswith(" ...")]  # of what takes long, on a busy machine
    assert all(re.search(r" in \d+\.\d s", line) for line in lines), lines
    return [re.sub(r" in \d+\.\d s", "", line) for line in lines]


def test_each_phase_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        gm = llfx.rewrite(plain(), [llfx.EVA(r=2), llfx.IA3(target_roles="up")], calibration=[(net_ids(2, 5),)])
        gm(net_ids(2, 5))
        gm(net_ids(2, 5))
        with torch.no_grad(), llfx.frozen(gm.eval()):
            gm(net_ids(2, 5))
    lines = messages(caplog)
    phases = [line.partition(":")[0] for line in lines]
    assert phases == [
        "captured Net",
        "found the sites",
        "derived the training program",  # of the graph with observers
        "ran the calibration data",
        "inserted the adapters",
        "computed the adapters' start values",
        "derived the training program",
        "derived the inference program",
    ]
    assert lines[1] == "found the sites: 5 in the model"
    assert lines[4].startswith("inserted the adapters: EVA(r=2, alpha=16) at 3 sites, ")
    assert " at 1 site, 12 parameters" in lines[4]
    assert re.fullmatch(r"captured Net: \d+ nodes", lines[0])


@pytest.mark.broad
def test_a_file_is_loaded_in_the_same_phases(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    llfx.save(rewritten("plain"), tmp_path / "adapter.safetensors")
    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        llfx.load(plain(), tmp_path / "adapter.safetensors")
    phases = [line.partition(":")[0] for line in messages(caplog)]
    assert phases == ["captured Net", "found the sites", "inserted the adapters"]


@pytest.mark.broad
def test_an_adapted_model_is_made_in_the_same_phases(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        llfx.adapt(llama(), CFG)
    lines = messages(caplog)
    assert [line.partition(":")[0] for line in lines] == [
        "captured LlamaForCausalLM",
        "compared the graph of LlamaForCausalLM with the model",
        "found the sites",
        "inserted the adapters",
        "computed the adapters' start values",
    ]
    assert lines[3].startswith("inserted the adapters: LoRA(r=2, alpha=16) at 7 sites, ")


@pytest.mark.broad
def test_a_model_is_compiled_in_the_same_phases(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    backend = llfx.backend(CFG, inner="eager")
    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        compiled: Any = torch.compile(backend.adapt(plain(), net_ids(2, 5)), backend=backend)
        compiled(net_ids(2, 5))
    lines = messages(caplog)
    assert [line.partition(":")[0] for line in lines] == [
        "recorded a run of Net",
        "found the sites",
        "inserted the adapters",
        "inserted the adapters into a graph",
        "derived the program of a graph",
    ]
    assert lines[2].startswith("inserted the adapters: LoRA(r=2, alpha=16) at 3 sites, ")
    assert lines[3] == "inserted the adapters into a graph: 3 sites"
    assert re.fullmatch(r"derived the program of a graph: \d+ nodes", lines[4])


@since("torch", "2.13", "A run without data refuses tokens that are no integers")
def test_a_phase_that_fails_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lora_lite_fx"), pytest.raises(llfx.CaptureError):
        llfx.rewrite(plain(), CFG, (torch.ones(2, 5),))
    assert messages(caplog) == []


def test_nothing_is_printed_without_asking(capfd: pytest.CaptureFixture[str]) -> None:
    llfx.rewrite(plain(), CFG, calibration=None)(net_ids(2, 5))
    assert capfd.readouterr() == ("", "")


# Progress bars.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class DecidesByValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) if x.sum().item() > 0 else self.linear(-x)
        return y


def test_a_graph_that_torch_export_gave_up_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = DecidesByValues(), torch.ones(2, 4)
    with pytest.raises(RuntimeError):
        torch.export.export(model, (x,))
    assert "def forward(self, arg" in capfd.readouterr().err, "else the filter is not needed any more"
    with pytest.raises(llfx.CaptureError, match="data-dependent"):
        llfx.capture(model, (x,))
    assert capfd.readouterr() == ("", "")


def test_a_size_of_one_is_no_warning_of_torch_export(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, said = logging.getLogger("torch._export.non_strict_utils"), list[str]()
    monkeypatch.setattr(logger, "handlers", [logging.Handler()])
    monkeypatch.setattr(logger.handlers[0], "emit", lambda record: said.append(record.getMessage()))
    model, x = nn.Linear(4, 4), torch.ones(3, 1, 4)

    def warned_of_by_torch() -> bool:
        torch.export.export(model, (x,), dynamic_shapes=[[torch.export.Dim.AUTO] * 2 + [4]])
        return any("0/1 specialized" in message for message in said)

    gm = llfx.capture(model, (x,))
    assert not said
    assert gm(torch.ones(5, 1, 4)).shape == (5, 1, 4)
    assert warned_of_by_torch(), "else the filter is not needed any more"


def test_what_goes_to_stderr_meanwhile_gets_there(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_export():
        print("of the model", file=sys.stderr)
        sys.stderr.flush()
    assert capfd.readouterr().err == "of the model\n"


def test_a_terminal_gets_a_bar_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar: Any = log.progress([1, 2, 3], "calibration")
    assert (bar.delay, bar.disable, bar.desc, bar.total) == (2, False, "calibration", 3)
    assert list(bar) == [1, 2, 3]
    assert "calibration" not in terminal.getvalue()  # two seconds have not passed


def test_a_bar_shows_what_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(log, "SECONDS_BEFORE_A_BAR", 0)
    llfx.rewrite(plain(), llfx.EVA(r=2), (net_ids(2, 5),), calibration=[(net_ids(2, 5),)])
    shown = terminal.getvalue()
    assert all(name in shown for name in ("calibration", "start values"))


def test_without_a_terminal_or_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [1, 2, 3]
    for stderr in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert log.progress(items, "calibration") is items
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert log.progress(items, "calibration") is items


# Lines while something takes long.


class Late(threading.Timer):
    """A timer whose time is over when it starts."""

    def start(self) -> None:
        self.function(*self.args, **self.kwargs)


DOING = ["capturing Net ...", "comparing the graph of Net with the model ...", "finding the sites ..."]


def test_a_terminal_says_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(threading, "Timer", Late)
    llfx.rewrite(plain(), CFG, (net_ids(2, 5),))
    expected = [*DOING, "inserting the adapters ..."]
    assert terminal.getvalue().splitlines() == [f"lora_lite_fx: {line}" for line in expected]


def test_the_logger_says_it_where_it_is_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(threading, "Timer", Late)
    with caplog.at_level(logging.INFO, "lora_lite_fx"):
        llfx.inspect(plain(), (net_ids(2, 5),))
    assert [line for line in caplog.messages if line.endswith(" ...")] == DOING[:2]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("turned_off", [True, False])
def test_without_a_terminal_or_turned_off_nothing_is_said(
    turned_off: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stderr = Terminal() if turned_off else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(threading, "Timer", None)
    caplog.set_level(logging.ERROR if turned_off else logging.WARNING, "lora_lite_fx")
    llfx.inspect(plain(), (net_ids(2, 5),))
    assert stderr.getvalue() == ""
    assert log.progress(items := [1], "calibration") is items


def test_a_look_up_at_the_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, terminal = rewritten("plain"), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(threading, "Timer", Late)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(Path("missing") / "config.json"))
    with pytest.raises(llfx.CheckpointError):
        llfx.load_peft(gm, "owner/name", subfolder="fr", stack=True)
    first, *_ = terminal.getvalue().splitlines()
    where = "owner/name, folder fr"
    assert first == f"lora_lite_fx: asking the Hugging Face hub for {where}; HF_HUB_OFFLINE=1 reads what is here ..."


def test_what_is_fast_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, timers = Terminal(), list[threading.Timer]()

    class Kept(threading.Timer):
        def start(self) -> None:
            timers.append(self)
            super().start()

    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(threading, "Timer", Kept)
    monkeypatch.setattr(log, "SECONDS_BEFORE_A_LINE", 1000)
    with pytest.raises(KeyError), log.phase("did it", "doing it"):
        raise KeyError
    (timer,) = timers
    timer.join()  # it was cancelled
    assert terminal.getvalue() == ""


# What a model says of itself.


@pytest.mark.broad
def test_trainable_parameters_are_printed_as_peft_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    get_peft_model(llama(), LoraConfig(r=2, target_modules=targets)).print_trainable_parameters()
    expected = capsys.readouterr().out
    for model in (rewritten("llama"), chat()):
        model.print_trainable_parameters()
        assert capsys.readouterr().out == expected
    assert re.fullmatch(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}\n", expected)


def test_shared_parameters_count_once_and_frozen_ones_do_not_train(capsys: pytest.CaptureFixture[str]) -> None:
    tied = Net([GatedMLP], bias=True, tied=True)
    gm: Any = llfx.rewrite(tied, CFG)
    size, added = sum(p.numel() for p in tied.parameters()), sum(p.numel() for p in llfx.adapter_parameters(gm))
    gm.print_trainable_parameters()
    assert f"trainable params: {added:,} || all params: {size + added:,} ||" in capsys.readouterr().out
    for parameter in llfx.adapter_parameters(gm):
        parameter.requires_grad_(False)
    gm.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 0 ||")


@pytest.mark.broad
def test_repr_of_an_adapted_model_shows_the_adapters() -> None:
    size = sum(p.numel() for p in llfx.adapter_parameters(chat()))
    first, second, *_ = repr(chat()).splitlines()
    assert first == "LlamaForCausalLM("
    assert second == f"  LoRA(r=2, alpha=16) at 7 sites, {size:,} parameters"


@pytest.mark.broad
def test_a_graph_prints_its_short_form() -> None:
    gm = rewritten("llama")
    size, total = (sum(p.numel() for p in each) for each in (llfx.adapter_parameters(gm), gm.parameters()))
    first, second, *sites, last = str(gm).splitlines()
    assert first == f"GraphModule of LlamaForCausalLM, {total:,} parameters, of which {size:,} train"
    assert second == f"  LoRA(r=2, alpha=16) at 7 sites, {size:,} parameters"
    assert [line.strip() for line in sites] == [row.name for row in llfx.inspect(gm) if row.adapters]
    assert last == "  Its graph: code, print_readable(); its sites: lora_lite_fx.inspect"
    assert "def forward(self, input_ids" in gm.code
    assert repr(gm) == str(gm)


@pytest.mark.broad
def test_the_short_form_tells_equal_layers_once_and_few_sites() -> None:
    every = llfx.IA3(target_names=".")
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5)))
    assert "    0-4.0 x 5" in str(llfx.rewrite(deep, every)).splitlines()
    many = nn.Sequential(*(nn.Linear(i, i + 1) for i in range(1, 20)))
    *_, before_last, dots, _ = str(llfx.rewrite(many, every)).splitlines()
    assert (before_last.strip(), dots.strip()) == ("10", "...")


def test_repr_shows_several_adapters_and_none() -> None:
    gm = llfx.rewrite(rewritten("plain"), llfx.IA3(target_roles="up"))
    lines = [line for line in describe_adapters(gm, with_sites=True) if not line.startswith(" ")]
    assert [line.partition("(")[0] for line in lines] == ["LoRA", "IA3"]
    assert lines[1].endswith(" at 1 site, 12 parameters")
    assert all(line in repr(gm) for line in lines)
    assert " at " not in repr(llfx.remove(gm))
    assert describe_adapters(llfx.remove(gm)) == []


@pytest.mark.broad
def test_repr_of_a_module_that_is_being_made_raises_nothing() -> None:
    gm = object.__new__(AdaptedGraphModule)
    nn.Module.__init__(gm)
    assert repr(gm).startswith("AdaptedGraphModule(")
    model = copy.deepcopy(chat())
    del model._graphs
    assert repr(model).startswith("LlamaForCausalLM(")
    assert AdaptedGraphModule(nn.Module(), torch.fx.Graph(), Execution()).extra_repr() == ""
