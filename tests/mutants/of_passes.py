"""Mutants of the passes."""

from .mutant import Mutant

_OPTIMIZE = "lora_lite_fx/passes/optimize/"
_NORMALIZE = "lora_lite_fx/passes/normalize/"
_TESTS = "tests/passes/"


def _mutant(name: str, text: str, replacement: str, why: str, test: str) -> Mutant:
    """Return a mutant of the optimizing pass in the file `name`."""
    return Mutant(f"{_OPTIMIZE}{name}.py", text, replacement, why, f"{_TESTS}{test}")


def _normalize(name: str, text: str, replacement: str, why: str, test: str = "") -> Mutant:
    return Mutant(f"{_NORMALIZE}{name}.py", text, replacement, why, test or f"{_TESTS}test_{name}.py")


MUTANTS = (
    # LeaveOutMask
    _mutant(
        "leave_out_mask",
        "if why := obstacle_between(gm, mask, attentions[-1]):",
        'if why := "":',
        "attention goes by the values that the mask had before it was overwritten",
        "test_conditions.py::test_a_mask_that_is_overwritten_is_not_left_out",
    ),
    _mutant(
        "leave_out_mask",
        "None if overwrites(gm, gm.graph) else _sizes(mask)",
        "_sizes(mask)",
        "a mask into which values are written is looked at in the first call alone",
        "test_conditions.py::test_a_mask_is_looked_at_once_for_each_size_if_it_follows_from_sizes",
    ),
    _mutant(
        "leave_out_mask",
        "if not all(_is_size(node) or",
        "if not any(_is_size(node) or",
        "a mask that follows from values is looked at in the first call alone",
        "test_conditions.py::test_a_mask_is_looked_at_once_for_each_size_if_it_follows_from_sizes",
    ),
    Mutant(
        "lora_lite_fx/graph/queries.py",
        "isinstance(mask, fx.Node) and dtype_of(mask) is torch.bool",
        "isinstance(mask, fx.Node)",
        "a mask of numbers, which are added, is taken for booleans",
        "tests/passes/test_conditions.py::test_a_mask_of_numbers_is_not_converted",
    ),
    Mutant(
        "lora_lite_fx/ops/attention_mask.py",
        "if queries == keys and torch.equal(mask, mask.new_ones(queries, keys).tril().expand_as(mask)):",
        "if queries == keys:",
        "a mask that is not causal is taken for it",
        "tests/ops/test_attention_mask.py",
    ),
    Mutant(
        "lora_lite_fx/ops/attention_mask.py",
        "(None if mask.all() else mask), False",
        "None, False",
        "a mask that hides something from the queries in between is left out",
        "tests/ops/test_attention_mask.py",
    ),
    Mutant(
        "lora_lite_fx/graph/direct_calls.py",
        "    if transform_is_active() or trace_is_active():\n        return False\n    return not (tensor.is_cuda",
        "    if transform_is_active():\n        return False\n    return not (tensor.is_cuda",
        "a trace fails, because it would record what the mask of its example is",
        "tests/ops/test_attention_mask.py",
    ),
    # ConvertMaskOnce
    _mutant(
        "convert_mask_once",
        "    if len({dtype_of(node.args[0]) for node in attentions}) > 1:\n",
        "    if False:\n",
        "some attention gets a mask of another type than its queries",
        "test_conditions.py::test_a_mask_of_queries_of_two_types_is_not_converted",
    ),
    _mutant(
        "convert_mask_once",
        "    return obstacle_between(gm, mask, attentions[-1])\n",
        '    return ""\n',
        "attention reads the mask as it was before it was overwritten",
        "test_conditions.py::test_a_mask_that_is_overwritten_is_not_converted",
    ),
    # FoldScaleIntoAddition
    _mutant(
        "fold_scale_into_addition",
        " or node.kwargs:",
        ":",
        "a factor that the addition has already is lost",
        "test_conditions.py::test_an_addition_with_a_factor_keeps_it",
    ),
    _mutant(
        "fold_scale_into_addition",
        "node.target is aten.add.Tensor and not _is_scaled(branch)",
        "not _is_scaled(branch)",
        "a difference changes its sign",
        "test_conditions.py::test_a_difference_keeps_its_sign",
    ),
    _mutant(
        "fold_scale_into_addition",
        "not isinstance(y, fx.Node) or not _is_scaled(branch)",
        "not _is_scaled(branch)",
        "a number becomes the first term of an addition, which takes a tensor there",
        "test_conditions.py::test_a_number_is_not_the_first_term",
    ),
    _mutant(
        "fold_scale_into_addition",
        "            if _is_scaled(y):\n",
        "            if False:\n",
        "PiSSA is not exact at its start, because its two branches are rounded differently",
        "test_fold_scale_into_addition.py::test_the_reason_is_that_terms_cancel_or_are_read_elsewhere",
    ),
    _mutant(
        "fold_scale_into_addition",
        "isinstance(z, fx.Node) and isinstance(scale, float)",
        "isinstance(z, fx.Node)",
        "a tensor becomes the factor of an addition, which takes a number there",
        "test_conditions.py::test_a_tensor_is_not_a_factor",
    ),
    # GatherProducts
    _mutant(
        "gather_products",
        "    if overwrites(gm):\n        return set()\n",
        "",
        "the backward pass reads a saved result after it was overwritten",
        "test_conditions.py::test_a_scaled_result_that_is_overwritten_is_not_saved",
    ),
    _mutant(
        "gather_products",
        " and value.dim() == 1}",
        "}",
        "a scale that is not a row is taken for one",
        "test_conditions.py::test_only_rows_are_scales",
    ),
    _mutant(
        "gather_products",
        " and weight.dtype is not torch.float16\n",
        "\n",
        "the backward pass divides by a scale of zero",
        "test_conditions.py::test_a_scale_of_zero_in_float16_has_a_gradient",
    ),
    _mutant(
        "gather_products",
        "    if not sums or [term.columns[0] for term in sums] != bounds[:-1] or bounds[-1] != _width(gm, product):\n",
        "    if not sums:\n",
        "columns of the product are computed that belong to other sums",
        "test_conditions.py::test_every_column_must_be_used",
    ),
    _mutant(
        "gather_products",
        "    if why := obstacle_between(gm, moved[0], moved[-1]):\n        return why\n",
        "",
        "a site reads its input as it was before a write",
        "test_conditions.py::test_a_site_is_not_moved_across_a_write",
    ),
    _mutant(
        "gather_products",
        "    return sums if all(known) else",
        "    return sums if True else",
        "a term is read before it is computed",
        "test_conditions.py::test_a_term_is_not_read_before_it_is_computed",
    ),
    _mutant(
        "gather_products",
        "branch.target is not aten.linear.default or len(branch.args) != 2",
        "branch.target is not aten.linear.default",
        "the bias of the branch is lost",
        "test_conditions.py::test_products_are_gathered_where_the_operation_computes_their_sum",
    ),
    _mutant(
        "gather_products",
        "added.target is not aten.add.Tensor or added.args[1] is not branch",
        "added.args[1] is not branch",
        "a difference changes its sign",
        "test_conditions.py::test_products_are_gathered_where_the_operation_computes_their_sum",
    ),
    _mutant(
        "gather_products",
        " or is_inserted(y):",
        ":",
        "the weight of another branch gets no gradient",
        "test_conditions.py::test_the_weight_of_a_branch_is_not_a_site",
    ),
    _mutant(
        "gather_products",
        "y.args[0] is not before_cast(product.args[0]) or t is not part",
        "t is not part",
        "the branch reads the input without its dropout",
        "test_conditions.py::test_products_are_gathered_where_the_operation_computes_their_sum",
    ),
    _mutant(
        "gather_products",
        "        if not is_same_type and node not in casts:\n",
        "        if False:\n",
        "a sum in float32 is rounded to bfloat16",
        "test_conditions.py::test_a_wider_sum_is_gathered_where_it_is_cast_to_the_type_of_its_site",
    ),
    _mutant(
        "gather_products",
        " or _is_result(product):",
        ":",
        "the caller overwrites a result that the backward pass reads",
        "test_gather_products.py::test_a_scaled_result_that_the_caller_could_overwrite_is_not_saved",
    ),
    _mutant(
        "gather_products",
        "if operand in rows)",
        "if operand is not added)",
        "a scale that depends on the input gets no gradient",
        "test_conditions.py::test_only_rows_are_scales",
    ),
    _mutant(
        "gather_products",
        "product.target is not aten.mul.Tensor or not is_inserted(product)",
        "not is_inserted(product)",
        "a quotient becomes a product",
        "test_conditions.py::test_a_quotient_is_not_a_product",
    ),
    # GroupHeads
    _mutant(
        "group_heads",
        "            elif times_of_k != times_of_v:\n",
        "            elif False:\n",
        "the operator refuses keys and values with different numbers of heads",
        "test_conditions.py::test_keys_and_values_that_are_repeated_differently_are_not_grouped",
    ),
    _mutant(
        "group_heads",
        '            elif node.kwargs.get("enable_gqa"):\n',
        "            elif False:\n",
        "the heads of keys and values get other queries",
        "test_conditions.py::test_heads_that_are_grouped_already_stay",
    ),
    _mutant(
        "group_heads",
        "                if dim == 2:\n",
        "                if True:\n",
        "heads that are repeated one after the other are taken for heads that are repeated in place",
        "test_conditions.py::test_heads_that_are_repeated_one_after_the_other_are_not_grouped",
    ),
    _mutant(
        "group_heads",
        "known and list(shape) == [batch, heads * times, *rest] and whole",
        "known and whole",
        "a reshape that joins other dimensions is left out",
        "test_conditions.py::test_a_reshape_that_joins_other_dimensions_stays",
    ),
    _mutant(
        "group_heads",
        "node.target is aten.slice.Tensor and node.args[2:] == (0, sys.maxsize)",
        "node.target is aten.slice.Tensor",
        "keys that a slice leaves out are read",
        "test_conditions.py::test_keys_that_a_slice_leaves_out_are_not_read",
    ),
    # LeaveOutDropout
    _mutant(
        "leave_out_dropout",
        "is_flag(mode)",
        "mode is not False",
        "a dropout that drops in evaluation too is left out",
        "test_leave_out_dropout.py",
    ),
    _mutant(
        "leave_out_dropout",
        '= frozenset({"inference"})',
        '= frozenset({"inference", "training"})',
        "training runs without dropout",
        "test_share_siblings.py::test_siblings_of_several_variants_share_a_product_and_what_is_dropped_does_not",
    ),
    # AssociateProducts
    _mutant(
        "associate_products",
        "added.target is not aten.add.Tensor or added.kwargs:",
        "added.target is not aten.add.Tensor:",
        "the factor of the branch is lost",
        "test_conditions.py::test_a_branch_moves_to_the_output_where_that_is_the_same",
    ),
    _mutant(
        "associate_products",
        "    if max(len(node.users) for node in (z, added, branch)) > 1:\n",
        "    if False:\n",
        "what else reads the branch gets another value",
        "test_conditions.py::test_a_branch_moves_to_the_output_where_that_is_the_same",
    ),
    _mutant(
        "associate_products",
        "    if not reads_tensor(gm, weight) or b not in known:\n",
        "    if False:\n",
        "the weight is read before it is computed",
        "test_conditions.py::test_a_branch_moves_to_the_output_where_that_is_the_same",
    ),
    _mutant(
        "associate_products",
        "    if w_value.dtype != b_value.dtype:\n",
        "    if False:\n",
        "matrices of different types are multiplied",
        "test_associate_products.py::test_the_reason_is_given_for_each_site",
    ),
    _mutant(
        "associate_products",
        "    if w_value.dtype in HALF:\n",
        "    if False:\n",
        "the product of two matrices is rounded to half precision",
        "test_associate_products.py::test_the_reason_is_given_for_each_site",
    ),
    _mutant(
        "associate_products",
        "    return obstacle_between(gm, branch, y)\n",
        '    return ""\n',
        "the site reads its input as it is after a write",
        "test_conditions.py::test_a_branch_moves_to_the_output_where_that_is_the_same",
    ),
    # RecomputeInputs
    _mutant(
        "recompute_inputs",
        '"the graph overwrites tensors" if overwritten else _sources',
        "_sources",
        "the backward pass computes an input from a tensor that was overwritten",
        "test_recompute_inputs.py::test_the_reason_is_a_write_or_dropout",
    ),
    _mutant(
        "recompute_inputs",
        "not _is_cheap(node) and not _is_between_narrow(gm, node)",
        "False",
        "the backward pass draws other random numbers than the forward pass",
        "test_conditions.py::test_dropout_is_not_drawn_again",
    ),
    # RecomputeWeights
    _mutant(
        "recompute_weights",
        "if linears and overwrites(gm):",
        "if False:",
        "the backward pass computes a weight from a tensor that was overwritten",
        "test_recompute_weights.py::test_a_graph_that_overwrites_is_left_alone",
    ),
    _mutant(
        "recompute_weights",
        "if why := obstacle(gm, weight, node):",
        'if why := "":',
        "the backward pass draws another weight than the forward pass",
        "test_recompute_weights.py::test_a_weight_that_is_drawn_at_random_is_saved",
    ),
    _mutant(
        "recompute_weights",
        "if not is_inserted(node) and node.args[1] in frozen",
        "if node.args[1] in frozen",
        "the tensors of an adapter get no gradient",
        "test_recompute_weights.py::test_products_of_adapters_are_left_alone",
    ),
    # PutFastForms
    Mutant(
        "lora_lite_fx/graph/operations.py",
        "same = isinstance(value, dict) and data.keys() == value.keys()",
        "same = isinstance(value, dict)",
        "the factor of the products is lost",
        "tests/passes/test_conditions.py::test_blocks_are_rotated_by_one_operation_where_that_is_the_same",
    ),
    Mutant(
        "lora_lite_fx/graph/operations.py",
        "dict)) and data == _literal(value)",
        "dict))",
        "blocks are multiplied from the other side",
        "tests/passes/test_conditions.py::test_blocks_are_rotated_by_one_operation_where_that_is_the_same",
    ),
    Mutant(
        "lora_lite_fx/graph/operations.py",
        "and nodes.setdefault(data, value) is value",
        "and nodes.setdefault(data, value) is not None",
        "the products are added to another value than that which is rotated",
        "tests/passes/test_conditions.py::test_blocks_are_rotated_by_one_operation_where_that_is_the_same",
    ),
    _mutant(
        "put_fast_forms",
        "why or obstacle_between(gm, min(call.members), node):",
        "why:",
        "the products read the input as it is after a write",
        "test_conditions.py::test_operations_are_not_moved_across_a_write",
    ),
    _mutant(
        "put_fast_forms",
        "min(call.members)",
        "sorted(call.members)[-2]",
        "a product reads the values as they are after a write",
        "test_conditions.py::test_operations_are_not_moved_across_a_write",
    ),
    # ShareSiblings
    _mutant(
        "share_siblings",
        "groups[x, call_of(node), value.dtype].append(node)",
        "groups[x, call_of(node), None].append(node)",
        "a product has the type of another adapter's matrix",
        "test_conditions.py::test_matrices_of_two_types_are_not_stacked",
    ),
    _mutant(
        "share_siblings",
        'value is not None and (matrix in known or matrix.op == "get_attr")',
        "value is not None",
        "a matrix that depends on the input is read before the input",
        "test_conditions.py::test_a_matrix_that_depends_on_the_input_is_not_shared",
    ),
    _mutant(
        "share_siblings",
        "single = [node for node, call in call_of.items() if counts[call] == 1]",
        "single = list(call_of)",
        "PiSSA is not exact at its start, because its two branches are rounded differently",
        "test_share_siblings.py::test_the_reason_is_what_keeps_products_apart",
    ),
    _mutant(
        "share_siblings",
        "            if why := obstacle_between(gm, group[0], group[-1]):\n",
        '            if why := "":\n',
        "an adapter reads the input as it was before a write",
        "test_conditions.py::test_products_around_a_write_are_not_shared",
    ),
    _mutant(
        "share_siblings",
        "not (node in work or is_deterministic(node))",
        "False",
        "two adapters drop the same elements",
        "test_conditions.py::test_dropouts_stay_apart",
    ),
    _mutant(
        "share_siblings",
        "repr(node.args), repr(node.kwargs), None",
        "repr(node.args), None",
        "computations that differ in an option become one",
        "test_conditions.py::test_computations_with_other_options_stay_apart",
    ),
    _mutant(
        "share_siblings",
        "same is not node and (node in work or not obstacle_between(gm, same, node))",
        "same is not node",
        "an adapter reads what another one computed before a write",
        "test_conditions.py::test_equal_computations_around_a_write_stay_apart",
    ),
    # FollowMode
    _normalize(
        "follow_mode",
        "twin is None or self._passed_on(twin) is not self._passed_on(in_train)",
        "twin is None",
        "evaluation reads the operand of training",
    ),
    _normalize(
        "follow_mode",
        "        if not all(isinstance(value, (bool, int, float)) for value in (in_train, in_eval)):\n",
        "        if isinstance(in_train, str):\n            return in_train\n        if False:\n",
        "evaluation gets the option of training",
    ),
    _normalize(
        "follow_mode",
        "node.target is aten.dropout.default and node.args[2] is True",
        "node.target is aten.dropout.default",
        "a dropout that training has switched off is switched on",
    ),
    _normalize(
        "follow_mode",
        'return statically_known_true(size == in_train.meta["val"])',
        "return True",
        "evaluation reads another size",
    ),
    _normalize(
        "follow_mode",
        "            if len(in_train) != len(in_eval):\n                raise ModesDiffer(node)\n",
        "            in_eval = [*in_eval, *in_train][: len(in_train)]\n",
        "a list of operands of evaluation is cut to that of training",
    ),
    _normalize(
        "both_modes",
        "node.is_impure() or opens_region(node) or",
        "node.is_impure() or",
        "a region of evaluation has its beginning in training",
    ),
    # InlineRegions
    _normalize(
        "inline_regions",
        "graph.call_function(SET_GRAD_ENABLED if node.target is GRAD_REGION else EXIT_AUTOCAST, (before,))",
        "before.op",
        "what follows a region runs in its mode",
        "tests/capture/test_regions.py::test_the_caller_gets_its_own_modes_back",
    ),
)
