#!/usr/bin/env bash
# From real text to a pretrained model in a Hugging Face folder, on this machine as it is:
#   ./launch/quickstart.sh
# Makes .venv, installs the versions of constraints.txt, prepares launch/text, trains with a stop and a resume in the
# middle, converts, loads the result in transformers and fills in blanks.  What it makes is in runs/quickstart*.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$*" "$((SECONDS - began))"; }

say "installing"
. launch/venv.sh
make_venv hf
farspan=.venv/bin/farspan
run=runs/quickstart
config=configs/roberta-prelayernorm-tiny-quickstart.yaml
rm -rf "$run" "$run-data" "$run-hf"

say "preparing launch/text: tokenizer and token shards"
"$farspan" prepare "$run-data" --input 'launch/text/*.txt' --vocab-size 4096 --validation-fraction 0.05

# Every GPU, as far as the batch of 40 rows divides; on a CPU two ranks.
ranks=$(.venv/bin/python -c 'import torch; print(max(n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() or 2)))')
overrides=("training.micro_batch_size=$((40 / ranks))")
say "training on $ranks ranks, stopped half-way"
"$farspan" train "$config" --ranks "$ranks" "${overrides[@]}" --stop-after 2000

say "resuming from the checkpoint"
"$farspan" train "$config" --ranks "$ranks" "${overrides[@]}"

say "converting to Hugging Face, logits compared with transformers' in a clean process"
"$farspan" convert to-hf "$run" "$run-hf" --verify

say "loading it in transformers"
.venv/bin/python -P launch/quickstart.py "$run" "$run-hf"
say "done: the run is in $run (tensorboard --logdir $run/tensorboard), the model in $run-hf"
