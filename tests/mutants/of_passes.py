"""Mutants of the passes."""

from .mutant import Mutant

_OPTIMIZE = "lora_lite_fx/passes/optimize/"
_NORMALIZE = "lora_lite_fx/passes/normalize/"
_TESTS = "tests/passes/"


def _mutant(name: str, text: str, replacement: str, why: str, test: str = "") -> Mutant:
    """Return a mutant of the optimizing pass in the file `name`."""
    return Mutant(f"{_OPTIMIZE}{name}.py", text, replacement, why, f"{_TESTS}{test or 'test_conditions.py'}")


def _normalize(name: str, text: str, replacement: str, why: str, test: str = "") -> Mutant:
    return Mutant(f"{_NORMALIZE}{name}.py", text, replacement, why, test or f"{_TESTS}test_{name}.py")


MUTANTS = (
    # ConvertMaskOnce
    _mutant(
        "convert_mask_once",
        "isinstance(mask, fx.Node) and _type_of(mask) is torch.bool",
        "isinstance(mask, fx.Node)",
        "a mask of numbers, which are added, is taken for booleans",
    ),
    _mutant(
        "convert_mask_once",
        "    if len({_type_of(node.args[0]) for node in attentions}) > 1:\n",
        "    if False:\n",
        "some attention gets a mask of another type than its queries",
    ),
    _mutant(
        "convert_mask_once",
        "    return obstacle_between(gm, mask, attentions[-1])\n",
        '    return ""\n',
        "attention reads the mask as it was before it was overwritten",
    ),
    # FoldScaleIntoAddition
    _mutant(
        "fold_scale_into_addition",
        " or node.kwargs:",
        ":",
        "a factor that the addition has already is lost",
    ),
    _mutant(
        "fold_scale_into_addition",
        "node.target is aten.add.Tensor and not _is_scaled(branch)",
        "not _is_scaled(branch)",
        "a difference changes its sign",
    ),
    _mutant(
        "fold_scale_into_addition",
        "not isinstance(y, fx.Node) or not _is_scaled(branch)",
        "not _is_scaled(branch)",
        "a number becomes the first term of an addition, which takes a tensor there",
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
    ),
    # GatherProducts
    _mutant(
        "gather_products",
        "    if overwrites(gm):\n        return set()\n",
        "",
        "the backward pass reads a saved result after it was overwritten",
    ),
    _mutant(
        "gather_products",
        "value.dim() == 1 and value.dtype",
        "value.dtype",
        "a scale that is not a row is taken for one",
    ),
    _mutant(
        "gather_products",
        " and value.dtype is not torch.float16\n",
        "\n",
        "the backward pass divides by a scale of zero",
    ),
    _mutant(
        "gather_products",
        "    if not sums or [term.columns[0] for term in sums] != bounds[:-1] or bounds[-1] != _width(gm, product):\n",
        "    if not sums:\n",
        "columns of the product are computed that belong to other sums",
    ),
    _mutant(
        "gather_products",
        "    if why := obstacle_between(gm, moved[0], moved[-1]):\n        return why\n",
        "",
        "a site reads its input as it was before a write",
    ),
    _mutant(
        "gather_products",
        "    return sums if all(known) else",
        "    return sums if True else",
        "a term is read before it is computed",
    ),
    _mutant(
        "gather_products",
        "branch.target is not aten.linear.default or len(branch.args) != 2",
        "branch.target is not aten.linear.default",
        "the bias of the branch is lost",
    ),
    _mutant(
        "gather_products",
        "added.target is not aten.add.Tensor or added.args[1] is not branch",
        "added.args[1] is not branch",
        "a difference changes its sign",
    ),
    _mutant(
        "gather_products",
        " or is_inserted(y):",
        ":",
        "the weight of another branch gets no gradient",
    ),
    _mutant(
        "gather_products",
        "y.args[0] is not product.args[0] or t is not part",
        "t is not part",
        "the branch reads the input without its dropout",
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
    ),
    _mutant(
        "gather_products",
        "product.target is not aten.mul.Tensor or not is_inserted(product)",
        "not is_inserted(product)",
        "a quotient becomes a product",
    ),
    # GroupHeads
    _mutant(
        "group_heads",
        "            elif times_of_k != times_of_v:\n",
        "            elif False:\n",
        "the operator refuses keys and values with different numbers of heads",
    ),
    _mutant(
        "group_heads",
        '            elif node.kwargs.get("enable_gqa"):\n',
        "            elif False:\n",
        "the heads of keys and values get other queries",
    ),
    _mutant(
        "group_heads",
        "                if dim == 2:\n",
        "                if True:\n",
        "heads that are repeated one after the other are taken for heads that are repeated in place",
    ),
    _mutant(
        "group_heads",
        "known and list(shape) == [batch, heads * times, *rest] and whole",
        "known and whole",
        "a reshape that joins other dimensions is left out",
    ),
    _mutant(
        "group_heads",
        "node.target is aten.slice.Tensor and node.args[2:] == (0, sys.maxsize)",
        "node.target is aten.slice.Tensor",
        "keys that a slice leaves out are read",
    ),
    # LeaveOutDropout
    _mutant(
        "leave_out_dropout",
        'isinstance(mode, fx.Node) and mode.op == "get_attr"',
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
    # MoveBranchesToOutputs
    _mutant(
        "move_branches_to_outputs",
        "added.target is not aten.add.Tensor or added.kwargs:",
        "added.target is not aten.add.Tensor:",
        "the factor of the branch is lost",
    ),
    _mutant(
        "move_branches_to_outputs",
        "    if max(len(node.users) for node in (z, added, branch)) > 1:\n",
        "    if False:\n",
        "what else reads the branch gets another value",
    ),
    _mutant(
        "move_branches_to_outputs",
        "    if not reads_tensor(gm, weight) or b not in known:\n",
        "    if False:\n",
        "the weight is read before it is computed",
    ),
    _mutant(
        "move_branches_to_outputs",
        "    if w_value.dtype != b_value.dtype:\n",
        "    if False:\n",
        "matrices of different types are multiplied",
        "test_move_branches_to_outputs.py::test_the_reason_is_given_for_each_site",
    ),
    _mutant(
        "move_branches_to_outputs",
        "    if w_value.dtype in HALF:\n",
        "    if False:\n",
        "the product of two matrices is rounded to half precision",
        "test_move_branches_to_outputs.py::test_the_reason_is_given_for_each_site",
    ),
    _mutant(
        "move_branches_to_outputs",
        "    return obstacle_between(gm, branch, y)\n",
        '    return ""\n',
        "the site reads its input as it is after a write",
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
        "node.target not in _CHEAP and not _is_between_narrow(gm, node)",
        "False",
        "the backward pass draws other random numbers than the forward pass",
    ),
    # ShareSiblings
    _mutant(
        "share_siblings",
        "groups[x, layer_of(node), value.dtype].append(node)",
        "groups[x, layer_of(node), None].append(node)",
        "a product has the type of another adapter's matrix",
    ),
    _mutant(
        "share_siblings",
        'value is not None and (matrix in known or matrix.op == "get_attr")',
        "value is not None",
        "a matrix that depends on the input is read before the input",
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
    ),
    _mutant(
        "share_siblings",
        "not (node in work or is_deterministic(node))",
        "False",
        "two adapters drop the same elements",
    ),
    _mutant(
        "share_siblings",
        "repr(node.args), repr(node.kwargs), None",
        "repr(node.args), None",
        "computations that differ in an option become one",
    ),
    _mutant(
        "share_siblings",
        "same is not node and (node in work or not obstacle_between(gm, same, node))",
        "same is not node",
        "an adapter reads what another one computed before a write",
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
        "            if len(in_train) != len(in_eval):\n                raise _modes_differ(node)\n",
        "            in_eval = [*in_eval, *in_train][: len(in_train)]\n",
        "a list of operands of evaluation is cut to that of training",
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
