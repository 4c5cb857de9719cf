"""Mutants of the runs without data: what an operator returned before may not be what it returns now."""

from .mutant import Mutant

_KNOWN = "lora_lite_fx/capture/depth/known_operators.py"
_SAME = "tests/capture/test_known_operators.py::test_a_run_of_known_operators_records_the_same"

MUTANTS = (
    Mutant(
        _KNOWN,
        "not schema_of(operator).is_mutable",
        "True",
        "what an operator in place returns is another tensor than it wrote to",
        _SAME,
    ),
    Mutant(
        _KNOWN,
        "looks, torch.get_default_dtype(), ",
        "looks, ",
        "a layer that computes in another default dtype looks like the one before",
        _SAME,
    ),
    Mutant(
        _KNOWN,
        "        and result.numel() > 1\n",
        "",
        "a number that a model makes and reads again is not known, and a branch by it not taken",
        _SAME,
    ),
    Mutant(
        _KNOWN,
        "not (result.is_complex() or result.is_neg())",
        "not result.is_neg()",
        "a conjugate looks like what it is the conjugate of",
        _SAME,
    ),
    Mutant(
        _KNOWN,
        "not (result.is_complex() or result.is_neg())",
        "not result.is_complex()",
        "the negative of a tensor looks like the tensor",
        _SAME,
    ),
    Mutant(
        _KNOWN,
        "        and all(isinstance(number, int) for number in (*result.shape, *result.stride()))\n",
        "",
        "a size that follows from values is the one of another run",
        _SAME,
    ),
    Mutant(
        _KNOWN,
        "                return make(mode)\n",
        "                return self.__dict__.setdefault('made', {}).setdefault(key, make(mode))\n",
        "two results that look alike are one tensor, and a write to one of them counts for both",
        _SAME,
    ),
    Mutant(
        _KNOWN,
        "        with unseen_by_function_modes():",
        "        if True:",
        "the first layer records what torch calls inside an operator and the others do not, so that none is stamped",
        _SAME,
    ),
)
