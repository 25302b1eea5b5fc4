"""Make reference cases with the model classes of transformers.

    python tests/golden/make_cases.py [CASE ...]

writes one folder a case beside this file, in the format that README.md there describes. It needs only torch,
safetensors and transformers: 4.37.2 (with numpy<2), the last release that has MEGA and whose BERT classes still know
the relative position embeddings, and for MRA 5.23.0, whose masks are right but for their order. It makes the cases
that the installed release can make; they are listed in the files that `MODULES` names. Every case is a pure function
of its name and of the versions in its case.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import zlib
from pathlib import Path

import torch
import transformers
from golden_case import Case
from safetensors.torch import save_file
from transformers import PreTrainedModel

# The files that list the cases, by the release of transformers that makes them. Some import only with theirs.
MODULES = {"4.37.2": ("cases_bert", "cases_mega", "cases_nystromformer"), "5.23.0": ("cases_mra",)}
# Leaving out any one tensor must move a logit by more than this; the comparisons that use the cases allow 1e-5.
SMALLEST_EFFECT = 1e-3
# And float32 must be this near to the same model in float64, relative to each tensor's largest value.
LARGEST_ERROR = 3.5e-6
# Tensors whose gradient is zero but for rounding, and those that give the scale instead.
NEIGHBOURS = {".key.bias": ".query.bias", "k_proj.bias": "k_proj.weight"}

CASES: dict[str, Case] = {
    name: case
    for module in MODULES.get(transformers.__version__, ())
    for name, case in importlib.import_module(module).CASES.items()
}


def run(case: Case, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, loss, last hidden state, next-sentence logits where there are any, and every gradient."""
    case.forget(model)
    model.zero_grad(set_to_none=True)
    inputs = {key: tensor.clone().requires_grad_(tensor.is_floating_point()) for key, tensor in inputs.items()}
    output = model(**inputs, output_hidden_states=True, return_dict=True)
    output.loss.backward()
    logits = output.prediction_logits if "prediction_logits" in output else output.logits
    tensors = {"logits": logits, "loss": output.loss, "last_hidden_state": output.hidden_states[-1]}
    if "seq_relationship_logits" in output:
        tensors["seq_relationship_logits"] = output.seq_relationship_logits
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tensors[f"grad.{name}"] = parameter.grad
    for name, tensor in inputs.items():
        if tensor.grad is not None:
            tensors[f"grad_input.{name}"] = tensor.grad
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def check_every_tensor_shows(case: Case, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Leave out each tensor in turn: the outputs at real positions must change, or the case could hide its loss."""
    real = inputs["attention_mask"].bool()

    @torch.no_grad()
    def outputs() -> torch.Tensor:
        case.forget(model)
        output = model(**inputs, return_dict=True)
        parts = [output[key][real] if "seq" not in key else output[key] for key in output if "logits" in key]
        return torch.cat([part.flatten() for part in parts])

    whole = outputs()
    if not whole.isfinite().all():
        raise AssertionError("the logits are not finite")
    for part in case.parts(model):
        kept = part.values.clone()
        part.values.fill_(part.neutral)
        effect = (outputs() - whole).abs().max().item()
        part.values.copy_(kept)
        if (effect >= SMALLEST_EFFECT) != part.shows:
            expected = "more" if part.shows else "none"
            raise AssertionError(f"without {part.name} the outputs move by {effect:.2e}: expected {expected}")


def check_digits(
    case: Case, model: PreTrainedModel, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
) -> str:
    """Compare with the same model in float64: a case whose values lose digits in float32 is no reference."""
    inputs = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}
    case.forget(model)
    with case.exactly():
        exact = run(case, copy.deepcopy(model).double(), inputs)
    errors = {}
    for key, tensor in outputs.items():
        scale = next((exact[key.replace(a, b)] for a, b in NEIGHBOURS.items() if key.endswith(a)), exact[key])
        errors[key] = ((tensor - exact[key]).abs().max() / scale.abs().max()).item()
    worst = max(errors, key=lambda key: errors[key])
    if errors[worst] > LARGEST_ERROR:
        raise AssertionError(f"float32 is {errors[worst]:.1e} off in {worst}: change the draw")
    return f"{errors[worst]:.1e} off in {worst}"


def make_case(name: str, root: Path) -> None:
    """Write the case's folder, checking that the saved model gives the saved outputs."""
    case, folder = CASES[name], root / name
    seed = zlib.crc32(name.encode()) + case.draw
    model = case.make_model(seed)
    inputs = case.make_inputs(model.config, torch.Generator().manual_seed(seed))
    check_every_tensor_shows(case, model, inputs)
    outputs = run(case, model, inputs)
    digits = check_digits(case, model, inputs, outputs)

    model.save_pretrained(folder, safe_serialization=True)
    again = run(case, type(model).from_pretrained(folder).eval(), inputs)
    for key, tensor in outputs.items():
        if not torch.equal(tensor, again[key]):
            raise AssertionError(f"{name}: the saved model gives another {key}")

    save_file(inputs, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    description = {"case": name, "model_class": case.model_class, **versions, "made_by": "make_cases.py", "seed": seed}
    (folder / "case.json").write_text(json.dumps({**description, **case.notes()}, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: loss {outputs['loss'].item():.6f}, {size / 1000:.0f} kB, {digits}{case.remark()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the reference cases beside this file.")
    parser.add_argument("case", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the folders go")
    arguments = parser.parse_args()
    names = arguments.case or list(CASES)
    others = {release: modules for release, modules in MODULES.items() if release != transformers.__version__}
    elsewhere = "; ".join(f"those of {', '.join(modules)} need {release}" for release, modules in others.items())
    if not CASES:
        raise SystemExit(f"transformers {transformers.__version__} makes none of the cases: {elsewhere}")
    if unknown := [name for name in names if name not in CASES]:
        made = f"transformers {transformers.__version__} makes: {', '.join(CASES)}"
        raise SystemExit(f"no case named {unknown[0]!r}; {made}; {elsewhere}")
    if not arguments.case:
        print(f"skipped with transformers {transformers.__version__}: {elsewhere}")
    torch.set_num_threads(1)
    for name in names:
        make_case(name, arguments.out)


if __name__ == "__main__":
    main()
