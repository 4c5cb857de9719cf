"""Mutants of the comparisons of a model with its graph: what differs may be hidden at the start."""

from .mutant import Mutant

_CAPTURE, _HUGGING_FACE = "lora_lite_fx/capture/", "lora_lite_fx/hugging_face/"
_GATES = "tests/capture/test_revealing.py::test_"
_FIRST = "tests/capture/test_first_calls.py::test_"
_COMPUTED = "tests/hugging_face/test_computed_arguments.py::test_"

MUTANTS = (
    Mutant(
        f"{_CAPTURE}omissions.py",
        "with revealed(self.model), torch.random",
        "with torch.random",
        "a condition behind a gate that starts at zero may be left out, and counts as one of ones when the gate opens",
        f"{_GATES}a_condition_whose_gate_starts_near_zero_may_not_be_left_out",
    ),
    Mutant(
        f"{_CAPTURE}sizes_of_one.py",
        ", revealed(model, gm):",
        ":",
        "a size of one that decides behind such a gate is not refused",
        f"{_GATES}a_size_of_one_that_decides_is_seen_behind_a_gate",
    ),
    Mutant(
        f"{_CAPTURE}compare.py",
        "        with revealed(model, gm):\n            return compared()",
        "        return compared()",
        "a branch behind such a gate that a trace changes is not seen",
        f"{_GATES}a_branch_that_a_trace_changes_is_seen_behind_a_gate",
    ),
    Mutant(
        f"{_CAPTURE}compare.py",
        "a model may decide by values of its parameters\n        return compared()",
        "\n        raise",
        "a model that decides by a parameter that is zero is refused",
        f"{_GATES}a_model_that_decides_by_a_parameter_is_compared_as_it_is",
    ),
    Mutant(
        f"{_CAPTURE}comparable.py",
        "return bool((value.abs() < _SMALL).all())",
        "return True",
        "a parameter of which one value is zero gets other values, with which a pretrained model may compute nonsense",
        f"{_GATES}parameters_over_one_storage_get_the_same_values_and_their_own_afterwards",
    ),
    Mutant(
        f"{_CAPTURE}omissions.py",
        "if (others := varied(padded, of_tokens)) is None:",
        "if True:",
        "a condition that scales inputs may be left out if the example's are zeros",
        f"{_GATES}a_condition_that_inputs_of_zeros_hide_may_not_be_left_out",
    ),
    Mutant(
        f"{_CAPTURE}omissions.py",
        "() if made else (True, False)",
        "(False,)",
        "a mask may be left out if the example's tokens are all one, because these get the same attention under any",
        f"{_GATES}a_mask_that_tokens_of_one_kind_hide_may_not_be_left_out",
    ),
    Mutant(
        f"{_CAPTURE}omissions.py",
        "                self.inputs.pop()\n",
        "                pass\n",
        "an argument of a model that takes no other numbers may not be left out, and the reason given is wrong",
        f"{_GATES}a_model_that_takes_no_other_numbers_is_compared_on_its_own",
    ),
    Mutant(
        f"{_CAPTURE}compare.py",
        "None if made else varied(first)",
        "None",
        "what a trace changes is not seen if the example's inputs are zeros",
        f"{_GATES}a_product_that_a_trace_changes_is_seen_behind_inputs_of_zeros",
    ),
    Mutant(
        f"{_CAPTURE}sizes_of_one.py",
        "for each in (call, varied(call)) if each is not None",
        "for each in (call,)",
        "a size of one that decides is not refused if the example's inputs are zeros",
        f"{_GATES}a_size_of_one_that_decides_is_seen_behind_inputs_of_zeros",
    ),
    Mutant(
        f"{_CAPTURE}quirks/decisions.py",
        "with revealed(self._model, plain):",
        "if True:",
        "a loop that does something for each index behind such a gate is followed",
        "tests/capture/quirks/test_decisions.py::test_a_loop_that_works_for_each_index_that_occurs_is_refused",
    ),
    Mutant(
        f"{_HUGGING_FACE}around_parts.py",
        ", revealed(part):",
        ":",
        "an adapter that starts at zero, in a module that is read and not called, does nothing in calls with labels",
        "tests/hugging_face/test_around_parts.py::test_an_adapter_whose_module_is_read_and_not_called_is_seen_at_the_start",
    ),
    Mutant(
        f"{_HUGGING_FACE}forms.py",
        " revealed(part),",
        "",
        "a model whose table of positions starts at zero gets positions that are not its own",
        f"{_COMPUTED}positions_count_although_their_embedding_starts_at_zero",
    ),
    Mutant(
        f"{_HUGGING_FACE}written_by_calls.py",
        " revealed(twin),",
        "",
        "what a call keeps for later ones is not named if a parameter makes it zero at the start",
        f"{_COMPUTED}what_a_call_writes_for_later_ones_is_named",
    ),
    Mutant(
        f"{_HUGGING_FACE}forms.py",
        "for each in (arguments, _with_others(arguments)) if",
        "for each in (arguments,) if",
        "a model whose first call has embeddings of zeros gets a mask that changes what it computes",
        f"{_COMPUTED}a_first_call_with_embeddings_of_zeros_hides_nothing",
    ),
    Mutant(
        f"{_CAPTURE}origins/transformers_model.py",
        "with revealed(plain, prepared):",
        "if True:",
        "a model that computes something else with caches is captured if its attention starts at zero",
        "tests/capture/test_example_inputs.py::test_a_model_that_computes_something_else_with_caches_is_refused",
    ),
    Mutant(
        f"{_CAPTURE}comparable.py",
        "in (module.named_parameters, module.named_buffers)",
        "in (module.named_parameters,)",
        "a condition behind a buffer that starts at zero may be left out",
        f"{_GATES}a_condition_whose_gate_starts_near_zero_may_not_be_left_out",
    ),
    Mutant(
        f"{_CAPTURE}comparable.py",
        "tensor.shape), values.get(name))",
        "tensor.shape))",
        "a graph that has copies of statistics differs from its model, which is refused",
        f"{_GATES}copies_of_buffers_get_the_same_values_by_their_names",
    ),
    Mutant(
        f"{_CAPTURE}outputs.py",
        "new_parameter(twin, parameters) or outputs.kept",
        "outputs.kept",
        "a layer that a model makes in its first call is drawn anew in each call of the graph",
        f"{_FIRST}what_the_first_call_makes_is_refused_and_captured_after_it",
    ),
    Mutant(
        f"{_CAPTURE}comparable.py",
        "            if seed is not None:\n",
        "            if False:\n",
        "numbers that a model draws in its first call and keeps are drawn anew in each call of the graph",
        f"{_FIRST}what_the_first_call_makes_is_refused_and_captured_after_it",
    ),
    Mutant(
        f"{_CAPTURE}quirks/remembered_results.py",
        "        state.restore(_has_no_data)\n",
        "",
        "a model that makes a buffer in its first call is not compared with its graph",
        f"{_FIRST}a_branch_that_a_trace_changes_is_seen_beside_a_buffer_of_the_first_call",
    ),
    Mutant(
        f"{_CAPTURE}process_state/python_state.py",
        " or isinstance(value, Tensor)",
        "",
        "tensors of a run without data stay in tables of the user's files and classes",
        f"{_FIRST}what_each_call_would_make_alike_is_captured_and_nothing_of_the_capture_stays",
    ),
    Mutant(
        f"{_CAPTURE}process_state/python_state.py",
        "in _held_objects(model):",
        "in ():",
        "numbers that an object in a model draws in the first call and keeps are drawn anew in each call of the graph",
        f"{_FIRST}what_the_first_call_makes_is_refused_and_captured_after_it",
    ),
    Mutant(
        f"{_CAPTURE}capture_model.py",
        "        require_same_constants(copied, graph)\n",
        "",
        "a graph keeps for good what a clock, an iterator or a generator in Python gave while it was traced",
        "tests/capture/test_constant_answers.py::test_a_number_that_is_another_one_in_each_trace_is_refused",
    ),
)
