"""Mutants of the fused loss: of its pass and of its operation."""

from .mutant import Mutant

_OTHER_LOSSES = "test_other_losses_stay_and_the_reason_is_given"


def _pass(text: str, replacement: str, why: str, test: str = _OTHER_LOSSES) -> Mutant:
    file = "lora_lite_fx/passes/optimize/fuse_loss.py"
    return Mutant(file, text, replacement, why, f"tests/passes/test_fuse_loss.py::{test}")


def _operation(text: str, replacement: str, why: str, test: str) -> Mutant:
    return Mutant("lora_lite_fx/ops/chunked_loss.py", text, replacement, why, f"tests/ops/test_chunked_loss.py::{test}")


MUTANTS = (
    _pass('if given.get("weight") is not None:', "if False:", "the weights of the classes are forgotten"),
    _pass('if given.get("label_smoothing", 0.0) != 0.0:', "if False:", "the labels are not smoothed"),
    _pass(
        "if others:\n            raise",
        "if False:\n            raise",
        "what else reads the logits gets none, or another gradient",
    ),
    Mutant(
        "lora_lite_fx/passes/optimize/fuse_loss.py",
        "if name := module_call_of(node, called):",
        'if name := "":',
        "a hook on the head is not called",
        "tests/execution/test_fused_loss.py::test_a_hook_on_the_head_gets_its_logits",
    ),
    _pass(
        "if why := obstacle_between(gm, min(members), loss):",
        'if why := "":',
        "the head reads its input as it is after a write",
    ),
    _pass(
        "if not args or _width(args[0]) != classes:",
        "if not args:",
        "rows that a view joins are taken for rows of logits",
    ),
    _pass("not in (-1, dims - 1)", "not in ()", "one class of each token is taken for a row"),
    _pass("len(args[1]) < dims", "len(args[1]) <= dims", "classes in another order are taken for rows"),
    _pass(
        'str(value.shape) == str(node.meta["val"].shape)',
        "True",
        "a factor for each row is taken for rows of logits",
    ),
    _pass(
        "if not isinstance(value, Tensor) or value.dim() != dim:",
        "if not isinstance(value, Tensor):",
        "a weight for each text of a batch is taken for one of all",
    ),
    _pass(
        "if width is None or width >= self.classes:",
        "if width is None:",
        "more is saved than without the operation",
        "test_logits_that_are_no_wider_than_their_input_stay",
    ),
    Mutant(
        "lora_lite_fx/execution/choose_program.py",
        "execution.fuse_loss and gm.training",
        "execution.fuse_loss",
        "evaluation has no logits, because it runs the program of training",
        "tests/execution/test_fused_loss.py::test_in_evaluation_and_without_labels_logits_are_as_ever",
    ),
    _operation(
        "if any(operand.shape[0] != labels.shape[0] for operand in operands[: self.rows]):",
        "if False:",
        "rows without a label are left out in silence",
        "test_other_numbers_of_labels_than_of_rows_are_refused",
    ),
    _operation(
        "if not all(map(is_ordinary, operands)):",
        "if False:",
        "the gradient of a quantized weight's input is computed by operations that it lacks",
        "test_tensors_that_are_not_ordinary_make_all_logits",
    ),
    _operation(
        "if not torch.compiler.is_compiling() and torch.is_grad_enabled():",
        "if False:",
        "gradients of gradients are wrong",
        "test_gradients_of_gradients_are_refused",
    ),
    _operation(
        "share, loss = share / number.clamp(min=1), loss / number",
        "loss = loss / number",
        "the gradient is that of the sum",
        "test_loss_and_gradients_are_those_of_all_logits",
    ),
    _operation(
        "low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None",
        "low = None",
        "autocast is ignored",
        "test_under_autocast_types_are_those_of_plain_operations",
    ),
)
