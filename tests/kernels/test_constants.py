import subprocess
import sys

import torch

from farspan.kernels.constants import constant_when_compiled


def test_functions_are_marked_as_torch_marks_them():
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert constant_when_compiled(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_a_marked_function_is_called_when_it_is_compiled_and_not_again():
    calls = []

    @constant_when_compiled
    def factor() -> float:
        calls.append(1)
        return 2.0

    @torch.compile(fullgraph=True, backend="eager")
    def product(x: torch.Tensor) -> torch.Tensor:
        return x * factor()

    assert product(torch.ones(2)).tolist() == [2.0, 2.0]
    assert product(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(calls) == 1


def test_models_are_imported_without_a_compiler():
    program = (
        "import sys, farspan.pretrain.models.base, farspan.parallel.pipeline\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
