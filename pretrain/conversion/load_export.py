"""What an export computes, in a process that knows nothing of Farspan (started as a file by ``verify``):

    python -P load_export.py FOLDER AUTO_CLASS INPUTS.safetensors OUTPUTS.safetensors trusted|untrusted

Inputs are those of the class; outputs are float64.  Nothing is downloaded; code of the folder runs where it is trusted.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

NAMES = {"prediction_logits": "logits", "logits": "logits", "seq_relationship_logits": "seq_relationship_logits"}


def main(folder: str, auto_class: str, inputs: str, outputs: str, trust: str) -> None:
    batches: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(inputs).items():
        number, name = key.split(".", 1)
        batches.setdefault(number, {})[name] = value
    model, told = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=trust == "trusted", output_loading_info=True, torch_dtype=torch.float32
    )
    model = model.eval().double()
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, given in batches.items():
            given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
            output = model(**given)
            for name in ("prediction_logits", "logits", "seq_relationship_logits", "last_hidden_state"):
                if output.get(name) is not None:
                    found[f"{number}.{NAMES.get(name, name)}"] = output[name].double().contiguous().clone()
    save_file(found, outputs)
    print(json.dumps({"missing": sorted(told["missing_keys"]), "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
