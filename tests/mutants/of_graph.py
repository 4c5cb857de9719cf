"""Mutants of what the passes ask about a graph, and of the pieces that layers run in."""

from .mutant import Mutant

_GRAPH = "lora_lite_fx/graph/"
_PIECES = "lora_lite_fx/graph/layers.py"


def _mutant(name: str, text: str, replacement: str, why: str, test: str = "") -> Mutant:
    return Mutant(f"{_GRAPH}{name}.py", text, replacement, why, test or f"tests/graph/test_{name}.py")


def _piece(text: str, replacement: str, why: str, test: str) -> Mutant:
    return Mutant(_PIECES, text, replacement, why, f"tests/execution/test_{test}")


MUTANTS = (
    # parameter_work
    _mutant(
        "parameter_work",
        " and is_inserted(node) and not regions",
        " and not regions",
        "what an adapter computes of a value of the base is moved before that value",
    ),
    _mutant(
        "parameter_work",
        "is_inserted(node) and not regions",
        "is_inserted(node)",
        "what is computed in a region is moved out of its mode",
    ),
    _mutant(
        "parameter_work",
        "(computed and is_deterministic(node))",
        "computed",
        "random numbers are drawn once, and not in each call",
    ),
    _mutant(
        "parameter_work",
        "known.issuperset(node.all_input_nodes) and is_inserted",
        "is_inserted",
        "what depends on an input is taken for parameter work",
    ),
    # queries
    _mutant(
        "queries",
        "        and len(node.args) == 2\n",
        "",
        "the bias of a product is lost",
    ),
    _mutant(
        "queries",
        "opens_region(node) or closes_region(node) or is_transform(node)",
        "is_transform(node)",
        "a computation moves into another mode of autograd or autocast",
    ),
    _mutant(
        "queries",
        " or is_transform(node):",
        ":",
        "a computation moves into another level of vmap",
    ),
    _mutant(
        "queries",
        '        if any(read.op != "get_attr" for read in written(gm, node)):\n',
        "        if False:\n",
        "a computation moves across a write to what it reads",
    ),
    _mutant(
        "queries",
        "        and isinstance(node.target, OpOverload)\n        and not node.is_impure()\n",
        "        and not node.is_impure()\n",
        "a function without a schema, which may draw random numbers, counts as deterministic",
    ),
    _mutant(
        "queries",
        "        and not node.is_impure()\n",
        "",
        "a write in place counts as a computation without an effect",
    ),
    _mutant(
        "queries",
        # Each of the two tells of random numbers: is_impure does in newer versions of torch.
        "        and not node.is_impure()\n        and torch.Tag.nondeterministic_seeded not in node.target.tags\n",
        "",
        "dropout counts as deterministic",
    ),
    # regions
    _mutant(
        "regions",
        "return node.target in (ENTER_AUTOCAST, torch.is_grad_enabled)",
        "return node.target is ENTER_AUTOCAST",
        "a no_grad region is not seen",
        "tests/graph/test_queries.py",
    ),
    _mutant(
        "regions",
        "return node.target in (ENTER_AUTOCAST, torch.is_grad_enabled)",
        "return node.target is torch.is_grad_enabled",
        "an autocast region is not seen",
        "tests/graph/test_queries.py",
    ),
    # writes
    _mutant(
        "writes",
        "        or (argument.alias_info is not None and argument.alias_info.is_write)\n",
        "        or False\n",
        "an operator that writes in place is not seen",
    ),
    _mutant(
        "writes",
        'if argument.name in ("running_mean", "running_var")',
        "if False",
        "the statistics of batch norm are the user's own",
    ),
    _mutant(
        "writes",
        'if getattr(gm.get_submodule(str(node.target)), "inplace", False) else []',
        "if False else []",
        "a module that works in place is not seen",
    ),
    _mutant(
        "writes",
        're.search(r"[^_]_$", name) or any(',
        "any(",
        "a method that writes in place is not seen in a symbolic trace",
    ),
    _mutant(
        "writes",
        " or any(flag is True for flag in flags)",
        "",
        "a function that works in place if a flag says so is not seen",
    ),
    _mutant(
        "writes",
        'return _name(node) in ("batch_norm", "instance_norm")',
        "return False",
        "the statistics of batch norm are the user's own in a symbolic trace",
    ),
    _mutant(
        "writes",
        'if node.kwargs.get("out") is not None',
        "if False",
        "a write by out= is not seen",
    ),
    _mutant(
        "writes",
        "name in AUGMENTED or ",
        "",
        "x += y is not seen to write",
        "tests/fuzz/test_fuzz.py",
    ),
    _mutant(
        "writes",
        'names += [f"{node.target}.{name}"',
        'names += [f"{node.target}{name}"',
        "the statistics of a batch norm module are the user's own",
    ),
    _mutant(
        "writes",
        "not isinstance(node.target, OpOverload)\n        or node.target in",
        "node.target in",
        "a view in a symbolic trace is taken for a copy",
    ),
    _mutant(
        "writes",
        "        or node.target in _MAY_RETURN_THEIR_INPUT\n",
        "",
        "dropout, which returns its input in evaluation, is taken for a copy",
    ),
    _mutant(
        "writes",
        "            if may_return_a_view(node):\n",
        "            if False:\n",
        "a write to a view is not seen",
        "tests/execution/test_layer_nodes.py::test_what_is_overwritten_through_a_view_is_not_read_again",
    ),
    _mutant(
        "writes",
        "any(True for _ in gm.get_submodule(str(node.target)).buffers())",
        "False",
        "a batch norm that runs again updates its statistics twice",
        "tests/execution/test_checkpointing.py::test_two_adapters_with_dropout_and_batch_norm_compute_the_same",
    ),
    # hooks on modules outside layers
    Mutant(
        "lora_lite_fx/execution/hooks_and_ties.py",
        "self._acting_beside(hooked)",
        "hooked",
        "a hook inside a module with a hook does not act, in silence",
        "tests/execution/test_hooks.py::test_a_hook_inside_a_module_with_a_hook_is_warned_of_and_acts_when_that_is_gone",
    ),
    Mutant(
        "lora_lite_fx/execution/layer_modules.py",
        "            if taken := [path for module, path in _called.modules if module is self]:\n",
        "            if taken := []:\n",
        "a hook takes away what says what a layer runs, and the adapters do nothing",
        "tests/execution/test_hooks.py::test_a_hook_with_keyword_arguments_acts_and_must_hand_them_on",
    ),
    Mutant(
        "lora_lite_fx/passes/optimize/gather_bank_products.py",
        "if len(set(map(calls_in(gm), (term.node for term in sums)))) > 1:",
        "if False:",
        "a hook on a linear of a bank acts on what its siblings read",
        "tests/execution/test_hooks.py::test_a_hook_on_one_of_siblings_sees_what_that_one_has_alone",
    ),
    Mutant(
        "lora_lite_fx/passes/optimize/share_siblings.py",
        "None if node in work else call_of(node))",
        "None)",
        "a hook on one of siblings of a bank gets what the others have",
        "tests/execution/test_hooks.py::test_a_hook_on_one_of_siblings_sees_what_that_one_has_alone",
    ),
    Mutant(
        "lora_lite_fx/passes/optimize/share_siblings.py",
        "groups[x, call_of(node), value.dtype]",
        "groups[x, None, value.dtype]",
        "a hook on one of siblings gets what the others have",
        "tests/execution/test_hooks.py::test_a_hook_on_one_of_siblings_sees_what_that_one_has_alone",
    ),
    Mutant(
        "lora_lite_fx/capture/quirks/layouts.py",
        "|spatial_shapes|merge_sizes)",
        "|spatial_shapes)",
        "a model that merges patches by an argument is not captured",
        "tests/capture/quirks/test_layouts.py::test_how_many_patches_are_merged_is_a_part_of_the_graph",
    ),
    Mutant(
        "lora_lite_fx/graph/layers.py",
        "for path in whole if not computes_weights(path)",
        "for path in whole",
        "a hook on what computes a weight does not act, in silence",
        "tests/execution/test_hooks.py::test_a_hook_and_a_forward_on_what_computes_a_weight_are_warned_of",
    ),
    Mutant(
        "lora_lite_fx/hugging_face/model_state.py",
        "            if not is_layer(name) or computes_weights(name)\n",
        "            if not is_layer(name)\n",
        "forward of what computes a weight is replaced and does not act, in silence",
        "tests/hugging_face/test_model_state.py::test_a_forward_that_is_put_on_what_computes_a_weight_is_told_of",
    ),
    Mutant(
        "lora_lite_fx/capture/graph_calls.py",
        "    node.meta[_FURTHER] = True\n",
        "",
        "a hook of a traced graph changes the coefficient of an adapter",
        "tests/execution/test_hooks.py::test_a_hook_on_a_module_outside_layers_does_not_see_the_coefficient_of_an_adapter",
    ),
    Mutant(
        "lora_lite_fx/passes/adaptation/insert_adapter.py",
        '        if node.op != "get_attr" and not is_deterministic(node):\n            first = node\n',
        "",
        "an adapter around another draws other numbers than in the wrapper",
        "tests/fuzz/test_fuzz.py::test_a_finding_is_mended",
    ),
    # pieces: the layers that run apart, and run again under checkpointing
    _piece(
        "        if piece and layer != current and waits:\n",
        "        if piece and layer != current and layer:\n",
        "what reads a layer's value runs before the layer has",
        "checkpointing.py::test_layers_with_other_computations_between_their_parts_compute_the_same",
    ),
    _piece(
        "waits = layer or _is_impure(node) or any(",
        "waits = layer or any(",
        "random numbers are drawn in another order",
        "layer_nodes.py::test_a_graph_that_is_cut_computes_what_the_model_does",
    ),
    _piece(
        "            if places not in ({None}, {number_of.get(made_by)}):\n",
        "            if False:\n",
        "a layer that runs again reads what was overwritten since",
        "checkpointing.py::test_layers_that_overwrite_tensors_in_place_compute_the_same",
    ),
    Mutant(
        "lora_lite_fx/capture/symbolic_tracing/tracer.py",
        "        from ...compat import dynamo  # noqa: F401\n",
        "",
        "after a trace without example inputs torch.compile follows no code that asks for types",
        "tests/capture/test_asked_types.py::test_the_compiler_knows_the_functions_of_python_after_a_trace",
    ),
    Mutant(
        "lora_lite_fx/execution/adapted_graph_module.py",
        "        for name in CODE:\n            vars(self).pop(name, None)\n",
        "",
        "the code of a graph is that of before a pass has changed it",
        "tests/execution/test_compiler_tools.py::test_the_code_of_a_graph_is_compiled_when_it_is_read",
    ),
)
