"""`inspect` on the command line, as data, and as a page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_lite_fx as llfx
from lora_lite_fx.__main__ import main
from lora_lite_fx.inspection.blocks import Block, blocks
from lora_lite_fx.inspection.site_rows import LeftOutRow, SiteRow
from lora_lite_fx.inspection.table import SiteTable
from lora_lite_fx.text_table import fold, ranges
from tests.sites.test_roles_of_models import build
from tests.support.selection import broad_after, slow_after

LLAMA = transformers.LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=29,
    architectures=["LlamaForCausalLM"],
)
HOSTILE = '<script>alert(\'&"x{{rows}}")</script>'


def row(name: str, roles: str = "", d_in: int = 16, d_out: int = 16, reads: str = "x", calls: int = 1) -> SiteRow:
    """A row for a picture; the reason of each role names the site."""
    reasons = {role: f"as {name} is <{role}>" for role in roles.split()}
    return SiteRow(
        name=name,
        roles=tuple(reasons),
        reasons=reasons,
        d_in=d_in,
        d_out=d_out,
        adapters=(),
        parameters=0,
        weight=f"{name}.weight",
        dtype="float32",
        bias=False,
        calls=calls,
        reads=reads,
    )


def layer(home: str, width: int = 16) -> list[SiteRow]:
    sites = [("q", "query reader"), ("k", "key reader"), ("v", "value reader"), ("o", "output writer")]
    sites += [("gate", "gate reader"), ("up", "up reader"), ("down", "down writer")]
    return [row(f"{home}.{name}", roles, width, width, reads=f"{home}.{roles.split()[-1]}") for name, roles in sites]


def table_of(*rows: SiteRow) -> SiteTable:
    return SiteTable(rows, 1000, "Model", {row.weight: row.d_in * row.d_out for row in rows})


def large(layers: int) -> SiteTable:
    rows = [site for i in range(layers) for site in layer(f"model.layers.{i}", 8192)]
    return table_of(*rows, row("lm_head", "head reader", 8192, 128256))


def with_adapter(site: SiteRow) -> SiteRow:
    return replace(site, adapters=("LoRA", "IA3"), parameters=12345)


@pytest.fixture(scope="module")
def adapted() -> SiteTable:
    model = transformers.LlamaForCausalLM(LLAMA)
    return llfx.inspect(llfx.rewrite(model, [llfx.LoRA(r=2, target_roles=("query", "mlp")), llfx.IA3()]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(LLAMA).save_pretrained(path)
    return path


# Data.


@pytest.mark.broad
def test_the_data_are_the_rows_and_go_through_json(adapted: SiteTable) -> None:
    data = json.loads(json.dumps(adapted.to_dict()))
    assert (data["model"], data["parameters"], data["trainable"]) == (
        "LlamaForCausalLM",
        adapted.total,
        adapted.trainable,
    )
    for site, own in zip(data["sites"], adapted, strict=True):
        assert tuple(site["roles"]) == own.roles
        assert site["weight"] == f"{own.name}.weight"
        assert (site["dtype"], site["bias"], site["calls"]) == ("float32", False, 1)
        assert (site["reasons"], site["parameters"]) == (own.reasons, own.parameters)


@pytest.mark.broad
def test_sites_that_read_the_same_value_say_so_with_adapters_too(adapted: SiteTable) -> None:
    reads = {site.name.removeprefix("model.layers.0."): site.reads for site in adapted}
    assert reads["self_attn.q_proj"] == reads["self_attn.k_proj"] == reads["self_attn.v_proj"]
    assert reads["mlp.gate_proj"] == reads["mlp.up_proj"]
    assert len({reads[f"self_attn.{name}_proj"] for name in "qo"} | {reads["mlp.up_proj"], reads["mlp.down_proj"]}) == 4


def test_a_module_that_runs_twice_is_one_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.mix(torch.relu(self.mix(x)))

    (site,) = table = llfx.inspect(Twice())
    assert (site.calls, site.bias, table.model) == (2, True, "Twice")
    assert "runs 2 times" in table.to_html()


# Blocks.


def shape(block: Block) -> tuple[str, int, list[str]]:
    kinds = [f"{sub.kind or 'row'}:{'|'.join(str(len(stage)) for stage in sub.stages)}" for sub in block.sublayers()]
    return block.label, max(1, len(block.layers)), kinds


def test_equal_layers_are_one_block() -> None:
    found = [shape(block) for block in blocks(large(80))]
    assert found == [("model.layers.0\u201379", 80, ["attention:0|3|1", "feed-forward:2|1"]), ("", 1, ["row:1"])]


def test_layers_with_other_adapters_are_another_block() -> None:
    rows = [with_adapter(site) if ".1." in site.name or ".3." in site.name else site for site in large(5)]
    assert [block.label for block in blocks(rows)] == ["model.layers.0, 2, 4", "model.layers.1, 3", ""]


def test_what_repeats_inside_a_stage_is_one_block() -> None:
    rows = [site for i in range(4) for site in layer(f"stages.0.blocks.{i}")]
    rows += [site for i in range(6) for site in layer(f"stages.1.blocks.{i}", 32)]
    assert [shape(block)[:2] for block in blocks(rows)] == [
        ("stages.0.blocks.0\u20133", 4),
        ("stages.1.blocks.0\u20135", 6),
    ]


def test_equal_experts_are_one_sublayer() -> None:
    sites = [("gate", "gate reader"), ("up", "up reader"), ("down", "down writer")]
    rows = [row(f"layers.0.experts.{e}.{name}", roles) for e in range(8) for name, roles in sites]
    (block,) = blocks(rows)
    (sublayer,) = block.sublayers()
    assert (sublayer.times, sublayer.path, sublayer.last) == (8, "experts.0", "experts.7")
    assert "feed-forward \u00d7 8" in table_of(*rows).to_html()


def test_numbered_modules_of_a_chain_are_no_layers() -> None:
    table = llfx.inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert [shape(block) for block in blocks(table)] == [("", 1, ["row:1|1|1"])]
    assert "unknown" in table.to_html()


@pytest.mark.broad
def test_a_layer_has_the_weights_of_all_that_is_in_it() -> None:
    """Experts too, which are not listed; the head outside the layers has its own."""
    config: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    experts: dict[str, Any] = {"num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config, **experts))
    table = llfx.inspect(llfx.rewrite(model, llfx.LoRA(r=2)))
    layers, head = blocks(table)
    size = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert (layers.weights(table.sizes), head.weights(table.sizes)) == (size, 29 * 16)
    assert sum(table.sizes.values()) == table.total - table.trainable
    assert f"{size / 1000:.2f} k weights, {table.trainable // 2} train" in table.to_html()


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0\u20132, 5, 7\u20138"
    assert ranges([0, 1, 2, 5], "-", ",") == "0-2,5"


# The table.


def first_column(table: SiteTable) -> list[str]:
    """The names of the printed rows, without the head and the lines below the rows."""
    lines = str(table).splitlines()
    body = lines[2 : next(i for i, line in enumerate(lines) if " parameters train" in line)]
    return [re.split(r"  +", line)[0] for line in body]


def test_equal_layers_are_told_once() -> None:
    table = large(30)
    names = [f"model.layers.0-29.{name} x 30" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert first_column(table) == [*names, "lm_head"]
    assert "\n211 sites; " in str(table)
    assert len(table) == len(table.to_dict()["sites"]) == 211


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": ("LoRA",)},
        {"parameters": 5},
        {"d_in": 8},
        {"roles": ("inner",)},
        {"dtype": "bfloat16"},
        {"bias": True},
        {"calls": 2},
        {"weight": "shared.weight"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_layer_that_differs_is_told_apart(change: dict[str, Any]) -> None:
    rows = [row(f"layers.{i}.up", "up") for i in range(5)]
    rows[2] = replace(rows[2], **change)
    assert first_column(table_of(*rows)) == ["layers.0-1,3-4.up x 4", "layers.2.up"]


def test_folded_names_stand_for_exactly_their_members() -> None:
    names = [f"layers.{i}.experts.{e}.up" for i in range(3) for e in range(4)]
    names += ["layers.1.norm.0", "layers.2.norm.0", "layers.2.norm.1", "layers.01.up", "head", "0.up", "2.up"]
    folded = fold((name, None) for name in names)
    assert [str(each) for each in folded] == [
        "layers.0-2.experts.0-3.up x 12",
        "layers.1-2.norm.0 x 2",  # the last part is not an index
        "layers.2.norm.1",
        "layers.01.up",
        "head",
        "0,2.up x 2",
    ]
    assert sorted(member for each in folded for member in each.members) == list(range(len(names)))
    lopsided = [name for name in names[:12] if name != "layers.1.experts.2.up"]
    assert [str(each) for each in fold((name, None) for name in lopsided)] == [
        "layers.0,2.experts.0-3.up x 8",
        "layers.1.experts.0-1,3.up x 3",
    ]
    assert fold(()) == []
    assert [str(each) for each in fold([("a.0.b", 1), ("a.1.b", 2), ("same", 1), ("same", 1)])] == [
        "a.0.b",
        "a.1.b",
        "same",
        "same",
    ]


def test_weights_that_are_not_sites_are_told_once_too() -> None:
    left_out = tuple(LeftOutRow(f"layers.{i}.mix", f"layers.{i}.mix.weight", "why", (), "linear") for i in range(3))
    table = replace(table_of(row("head")), left_out=left_out)
    assert "\n  layers.0-2.mix x 3: why" in str(table)
    assert len(table.to_dict()["left_out"]) == 3


# The page.


class Checker(HTMLParser):
    """Checks that tags are balanced; collects texts, links and the rows that marks stand for."""

    VOID = frozenset(["meta", "input", "br", "link", "img"])

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.marks: list[list[int]] = []
        self.text: list[str] = []
        self.references: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.open += [tag] if tag not in self.VOID else []
        self._attributes(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._attributes(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def _attributes(self, attrs: dict[str, Any]) -> None:
        self.ids += [attrs["id"]] if attrs.get("id") else []
        self.marks += [[int(i) for i in attrs["data-s"].split()]] if attrs.get("data-s") else []
        self.references += [str(attrs[key]) for key in ("src", "href", "action") if key in attrs]


CROSS = [row("dec.0.q", "query", reads="y"), row("dec.0.k", "key", reads="m"), row("dec.0.v", "value", reads="m")]
PAGES = {
    "layers": large(3),
    "empty": table_of(),
    "hostile": table_of(row(HOSTILE, "reader"), row(f"layers.0.{HOSTILE}", "query key value")),
    "cross": table_of(*CROSS, row("dec.0.o", "output writer")),
    "router": table_of(row("layers.0.route", "router reader"), row("layers.0.mix", "reader"), row("layers.0.z")),
    "latent": table_of(
        row("layers.0.q", "query reader"), row("layers.0.kv_a", "reader"), row("layers.0.kv_b", "key value", reads="c")
    ),
    "adapters": table_of(*map(with_adapter, large(2))),
}


@pytest.mark.parametrize("name", broad_after(2, PAGES))
def test_the_page_is_well_formed_and_says_everything(name: str) -> None:
    table = PAGES[name]
    page = table.to_html()
    checker = Checker(page)
    text = " ".join(checker.text)
    for site in table:
        assert site.name in text
        assert all(f"{role} " in text and reason in text for role, reason in site.reasons.items())
        assert f"{site.parameters:,}" in text
    assert len(checker.ids) == len(set(checker.ids))
    assert checker.tags["script"] == 1
    # Each site is drawn once, alone or with others, and is in the strip of its layer where there are several.
    drawn = Counter(index for mark in checker.marks for index in mark)
    assert set(drawn) == set(range(len(table)))
    assert set(drawn.values()) <= {1, 2}


@pytest.mark.parametrize("name", broad_after(1, PAGES))
def test_the_page_needs_nothing_else_and_is_the_same_each_time(name: str) -> None:
    page = PAGES[name].to_html()
    assert page == PAGES[name].to_html()
    assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|{{", page.replace(HOSTILE, "").replace("{{rows}}", ""))
    assert not Checker(page).references
    colours = set(re.findall(r"var\(--([\w-]+)\)", page))
    assert colours - {"all", "c", "w"} <= set(re.findall(r"--([\w-]+):", page))
    assert set(re.findall(r"url\(#([\w-]+)\)", page)) <= set(Checker(page).ids)


def test_names_are_escaped() -> None:
    page = PAGES["hostile"].to_html()
    assert page.count("<script>") == 1
    assert "alert('" not in page
    assert HOSTILE in " ".join(Checker(page).text)
    assert "<script>" not in replace(PAGES["layers"], model=HOSTILE).to_html().split("<style>")[0]


def test_repeated_layers_are_drawn_once() -> None:
    checker = Checker(large(80).to_html())
    assert sum(len(mark) == 80 for mark in checker.marks) == 7
    assert sum(len(mark) == 1 for mark in checker.marks) == 80 * 7 + 1


def test_cross_attention_shows_where_keys_and_values_come_from() -> None:
    assert PAGES["cross"].to_html().count("other input") == 2
    assert "other input" not in PAGES["layers"].to_html()


def test_adapters_are_drawn_with_their_parameters(adapted: SiteTable) -> None:
    page = adapted.to_html()
    assert page.count('class="pill"') == sum(bool(site.adapters) for site in adapted) / 2  # two equal layers
    for site in adapted:
        if site.adapters:
            assert f">{' + '.join(site.adapters)} {site.parameters:,}<" in page
    assert f'title="{adapted.trainable:,}"' in page


def test_the_page_of_a_large_model_is_small() -> None:
    assert len(table_of(*map(with_adapter, large(80))).to_html().encode()) < 400_000


def test_experts_are_drawn_after_their_router_with_their_number() -> None:
    experts = [replace(row(f"layers.0.mlp.experts.{name}"), kind="experts", experts=8) for name in ("up", "down")]
    norm = replace(row("layers.0.norm", d_in=1), kind="norm")
    page = table_of(row("layers.0.mlp.gate", "router reader", d_out=8), norm, *experts).to_html()
    assert page.count("8 \u00d7 16 \u2192 16") == 2
    assert "<b>experts</b><code>mlp</code>" in page
    assert ">norm</text>" not in page  # norms are in the table alone
    assert "only linears have roles" in page


def test_a_page_is_saved_whole(tmp_path: Path) -> None:
    table = large(1)
    table.save_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == table.to_html()
    with pytest.raises(llfx.AdapterError, match="could not be written"):
        table.save_html(tmp_path / "missing" / "page.html")


@pytest.mark.broad
@pytest.mark.parametrize("name", slow_after(1, ["gpt2", "bert-masked-lm"]))
def test_real_models_have_a_page(name: str) -> None:
    table = llfx.inspect(build(name, num_hidden_layers=2))
    assert all(site.name in " ".join(Checker(table.to_html()).text) for site in table)
    assert len(blocks(table)[0].layers) == 2


def test_sites_of_kinds_that_were_not_asked_for_are_counted() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 5), nn.Linear(5, 2))
    example = (torch.randn(2, 3, 5),)
    told = "not listed: conv x 1, norm x 1; inspect(..., kinds=('linear', 'conv')) lists more"
    assert told in str(llfx.inspect(model, example)).splitlines()
    assert "not listed: norm x 1;" in str(llfx.inspect(model, example, kinds=("linear", "conv")))
    assert "not listed" not in str(llfx.inspect(model, example, kinds=("linear", "conv", "norm")))


# The command.


@pytest.mark.broad
def test_the_command_prints_the_table(folder: Path) -> None:
    command = [sys.executable, "-m", "lora_lite_fx", "inspect", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    phases = [line.partition(" in ")[0] for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert phases == ["captured LlamaForCausalLM"]
    table = llfx.inspect(transformers.LlamaForCausalLM(LLAMA))
    assert done.stdout == f"{table}\n"


def test_the_command_prints_data_and_writes_a_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(folder / "config.json"), "--json", "--html", str(page)]) == 0
    said = capsys.readouterr()
    *_, last = said.err.splitlines()
    assert re.fullmatch(rf"wrote {re.escape(str(page))} \(\d+ kB\): open it in a browser", last)
    data = json.loads(said.out)
    assert len(data["sites"]) == 15
    assert all(site["name"] in page.read_text(encoding="utf-8") for site in data["sites"])


def test_the_command_names_the_extra_that_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["inspect", str(folder)]) == 2
    assert "needs transformers: pip install 'lora_lite_fx[hf]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_shows_adapters(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    gm = llfx.rewrite(model, llfx.LoRA(r=2))
    llfx.save(gm, tmp_path / "a.safetensors")
    llfx.save_peft(gm, tmp_path / "peft")
    inputs = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    torch.export.save(torch.export.export(gm, (), inputs), tmp_path / "m.pt2")
    commands = [[str(folder), "--adapter", str(tmp_path / name)] for name in ("a.safetensors", "peft")]
    for arguments in [*commands, [str(tmp_path / "m.pt2"), "--trust"]]:
        assert main(["inspect", *arguments]) == 0, arguments
        out = capsys.readouterr().out
        assert out.count("LoRA") == 7, arguments  # of two equal layers
        assert out.count(" x 2 ") == 7, arguments
        assert f"{llfx.inspect(gm).trainable:,} of" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./missing"], "there is no ./missing"),
        (["missing.pt2"], "there is no missing.pt2"),
        (["broken.pt2"], "broken.pt2 is not opened, because torch.export.load may run code from a .pt2 file"),
        (["broken.pt2", "--trust"], "broken.pt2 is not a readable exported program"),
        (["broken.json"], "broken.json is not a readable JSON file"),
        (["list.json"], "list.json does not hold a JSON object"),
        (["strange.json"], "has no config that transformers can read"),
        (["other.json"], "transformers has no class NoSuchModel"),
        (["."], "config.json is not a readable JSON file"),
        (["model", "--adapter", "missing"], "there is no missing"),
        (["model", "--adapter", "broken.json"], "broken.json is not a readable safetensors file"),
        (["model/config.json", "--adapter", "."], "give the folder"),
        (["model", "--html", "missing/page.html"], "could not be written"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(folder)
    for name, text in {
        "broken.pt2": "no",
        "broken.json": "{",
        "list.json": "[]",
        "strange.json": '{"model_type": "none such"}',
        "other.json": json.dumps({**LLAMA.to_dict(), "architectures": ["NoSuchModel"]}),
    }.items():
        (tmp_path / name).write_text(text)
    assert main(["inspect", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *phases, last = err.splitlines()
    assert message in last
    assert all(re.search(r" in \d+\.\d s| \.\.\.$", line) for line in phases), err


@pytest.mark.broad
def test_a_class_by_a_config_that_names_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**LLAMA.to_dict(), "architectures": None}))
    assert main(["inspect", str(config)]) == 0
    assert "14 sites" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "message"), [("fifo", "a named pipe"), ("folder", "a directory")])
@pytest.mark.parametrize("name", ["model.pt2", "config.json"])
def test_what_is_not_a_file_is_not_read(
    name: str, kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    os.mkfifo(path) if kind == "fifo" else (path if name == "model.pt2" else path / "config.json").mkdir(parents=True)
    assert main(["inspect", str(path)]) == 2
    assert f"is not a file but {message}" in capsys.readouterr().err


class Trusted(torch.Tensor):
    """To read one, a pickle has to look up this class, as it might look up anything."""


def test_an_exported_program_is_opened_only_if_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.ones(2, 4),))
    program._example_inputs = ((torch.ones(2, 4).as_subclass(Trusted),), {})
    path = tmp_path / "m.pt2"
    torch.export.save(program, path)
    assert main(["inspect", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pass --trust" in err
    assert main(["inspect", str(path), "--trust"]) == 0, capsys.readouterr().err
    assert "1 site;" in capsys.readouterr().out
