"""Compare the roles with a second oracle: PEFT's tables of target modules.

PEFT lists names for each model type. They are chosen by role, so the sites they match must be all the sites of some
roles. Where that does not hold, it is said here why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
import transformers

from lora_lite_fx.sites.roles import GROUPS
from tests.sites.test_architectures import ARCHITECTURES

constants = pytest.importorskip("peft.utils.constants")

ROLES = {role for group in GROUPS.values() for role in group} | {"router", "head"}

# Map a model type of PEFT to the name in these tests. The type was renamed, or its architecture is the same.
ALIASES = {
    "llama4": "llama4_text",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "xlm-roberta": "roberta",
}

_EXPERTS = "the experts were modules; their weights are joined to one three-dimensional parameter of no site"
_RENAMED = "a name of an older transformers"

# Map (architecture, name) to the reason why the name matches no site.
NOTHING_MATCHED = {
    ("mixtral", "w2"): _EXPERTS,
    ("mixtral", "gate_proj"): _EXPERTS,
    ("mixtral", "up_proj"): _EXPERTS,
    ("mixtral", "down_proj"): _EXPERTS,
    ("vit", "query"): _RENAMED,
    ("vit", "value"): _RENAMED,
    ("dinov2", "query"): _RENAMED,
    ("dinov2", "value"): _RENAMED,
    ("t5-gated", "wi"): "the name of the first linear where it is not gated",
    ("phi", "o_proj"): "copied from llama; phi's is `dense`",
    ("phi", "gate_proj"): "copied from llama; phi's feed-forward block is not gated",
    ("phi", "up_proj"): "copied from llama; phi's is `fc1`",
    ("phi", "down_proj"): "copied from llama; phi's is `fc2`",
}

# Map (architecture, site) to the reason why a name meant for other sites matches this site without a role.
MATCHED_BESIDE = {
    ("roberta", "classifier.dense"): "`dense` is meant for the layers; the classifier has one too",
    ("deberta-v2", "cls.predictions.transform.dense"): "`dense` is meant for the layers; the masked head has one too",
}

# List architectures where the name for `down` matches the output of attention too: `output.dense` is a suffix of
# `attention.output.dense`, and PEFT matches suffixes.
OUTPUT_BESIDE_DOWN = {"bert", "bert-classifier", "roberta", "deberta", "deberta-v2"}


def architectures_of(model_type: str) -> list[str]:
    """Return the names that the tests give to the architectures of one of PEFT's model types."""
    wanted = ALIASES.get(model_type, model_type)
    return [
        name
        for name, architecture in ARCHITECTURES.items()
        if getattr(transformers, architecture.model).config_class.model_type == wanted
    ]


def mappings(kind: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (mapping, model type, names) of PEFT's tables whose name ends in `kind`, except those for norms."""
    for mapping, by_type in vars(constants).items():
        if mapping.startswith("TRANSFORMERS_MODELS_TO_") and mapping.endswith(kind) and "LNTUNING" not in mapping:
            for model_type, names in by_type.items():
                if not isinstance(names, str):
                    yield mapping, model_type, tuple(names)


def distinct(kind: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (mappings, architecture, names): each list of names once, for each architecture of its model type."""
    users: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for mapping, model_type, names in mappings(kind):
        for name in architectures_of(model_type):
            users[name, names].append(mapping)
    return [(", ".join(mappings_of), name, names) for (name, names), mappings_of in users.items()]


def matched(table: dict[str, set[str]], names: Sequence[str]) -> set[str]:
    return {site for site in table if any(site == name or site.endswith(f".{name}") for name in names)}


def ids(value: object) -> str:
    return "" if isinstance(value, tuple) or "MAPPING" in str(value) else str(value)


PARAMETERS = ("mapping", "name", "names")


@pytest.mark.parametrize(PARAMETERS, distinct("TARGET_MODULES_MAPPING"), ids=ids)
def test_names_of_peft_are_all_the_sites_of_some_roles(mapping: str, name: str, names: tuple[str, ...]) -> None:
    table = ARCHITECTURES[name].table()
    nothing = {target for target in names if not matched(table, [target])}
    assert nothing == {target for target in names if (name, target) in NOTHING_MATCHED}, mapping
    matches = matched(table, names)
    beside = {site for site in matches if not table[site] & ROLES}
    assert beside == {site for site in matches if (name, site) in MATCHED_BESIDE}, mapping
    roles = {role for site in matches for role in table[site] & ROLES}
    assert {site for site in table if table[site] & roles} == matches - beside, mapping


@pytest.mark.parametrize(PARAMETERS, distinct("_TO_LORA_TARGET_MODULES_MAPPING"), ids=ids)
def test_lora_is_at_queries_and_values(mapping: str, name: str, names: tuple[str, ...]) -> None:
    """Allow keys where the projection is fused, and the feed-forward block of phi, because its table lists it."""
    table = ARCHITECTURES[name].table()
    roles_of_matches = [table[site] & ROLES for site in matched(table, names)]
    attention = [roles for roles in roles_of_matches if not roles & set(GROUPS["mlp"])]
    assert all(roles in ({"query"}, {"value"}, {"query", "key", "value"}) for roles in attention)
    assert {role for roles in attention for role in roles} >= {"query", "value"}
    assert (attention != roles_of_matches) == (name == "phi")


@pytest.mark.parametrize(PARAMETERS, distinct("FEEDFORWARD_MODULES_MAPPING"), ids=ids)
def test_feed_forward_modules_of_ia3_are_the_down_projections(mapping: str, name: str, names: tuple[str, ...]) -> None:
    table = ARCHITECTURES[name].table()
    matches = matched(table, names)
    assert bool(matches) != ((name, names[0]) in NOTHING_MATCHED)
    down = {site for site in table if "down" in table[site]}
    assert down <= matches
    beside = {role for site in matches - down for role in table[site] & ROLES}
    assert beside == ({"output"} if name in OUTPUT_BESIDE_DOWN else set())


def test_every_listed_exception_still_occurs() -> None:
    """Check that the lists of exceptions hold nothing that has become false."""
    nothing, beside = set(), set()
    for _, name, names in distinct("MODULES_MAPPING"):
        table = ARCHITECTURES[name].table()
        nothing |= {(name, target) for target in names if not matched(table, [target])}
        beside |= {(name, site) for site in matched(table, names) if not table[site] & ROLES}
    assert NOTHING_MATCHED.keys() == nothing
    assert MATCHED_BESIDE.keys() == beside
