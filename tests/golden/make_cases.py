"""Make reference cases with the model classes of transformers 4.37.2.

    python tests/golden/make_cases.py [CASE ...]

writes one folder a case beside this file, in the format that README.md there describes. It needs only torch,
safetensors, numpy<2 and `transformers==4.37.2`: the last release whose BERT classes still know the relative position
embeddings. The cases are listed in cases_bert.py and cases_mega.py. Every case is a pure function of its name and of
the versions in its case.json.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import cases_bert
import cases_mega
import torch
import transformers
from golden_case import Case
from safetensors.torch import save_file
from transformers import PreTrainedModel

TRANSFORMERS = "4.37.2"
# Leaving out any one tensor must move a logit by more than this; the comparisons that use the cases allow 1e-5.
SMALLEST_EFFECT = 1e-3

CASES: dict[str, Case] = {**cases_bert.CASES, **cases_mega.CASES}


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


def make_case(name: str, root: Path) -> None:
    """Write the case's folder, checking that the saved model gives the saved outputs."""
    case, folder = CASES[name], root / name
    seed = zlib.crc32(name.encode()) + case.draw
    model = case.make_model(seed)
    inputs = case.make_inputs(model.config, torch.Generator().manual_seed(seed))
    check_every_tensor_shows(case, model, inputs)
    outputs = run(case, model, inputs)

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
    print(f"{name}: loss {outputs['loss'].item():.6f}, {size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the reference cases beside this file.")
    parser.add_argument("case", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the folders go")
    arguments = parser.parse_args()
    names = arguments.case or list(CASES)
    if transformers.__version__ != TRANSFORMERS:
        raise SystemExit(f"transformers is {transformers.__version__}; the cases are made with {TRANSFORMERS}")
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"no case named {unknown[0]!r}; there are: {', '.join(CASES)}")
    torch.set_num_threads(1)
    for name in names:
        make_case(name, arguments.out)


if __name__ == "__main__":
    main()
