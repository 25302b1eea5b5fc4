#!/usr/bin/env bash
# From real text to a pretrained model in a Hugging Face folder, on this machine as it is:
#   ./launch/quickstart.sh
# Makes .venv, installs the versions of constraints.txt, prepares launch/text, trains with a stop and a resume in the
# middle, converts, loads the result in transformers and fills in blanks.  What it makes is in runs/quickstart*.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$*" "$((SECONDS - began))"; }

python=""
for candidate in "${FARSPAN_PYTHON:-}" python3.13 python3.12 python3.11 python3; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || { echo "quickstart: Python 3.11 or later is needed, none was found: install it or set FARSPAN_PYTHON" >&2; exit 2; }

say "installing into .venv"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf]'
farspan=.venv/bin/farspan
run=runs/quickstart
config=configs/roberta-prelayernorm-tiny-quickstart.yaml
rm -rf "$run" "$run-data" "$run-hf"

say "preparing launch/text: tokenizer and token shards"
"$farspan" prepare "$run-data" --input 'launch/text/*.txt' --vocab-size 4096 --validation-fraction 0.05

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
ranks=2
[ "$gpus" -gt 0 ] && ranks=$gpus
say "training on $ranks ranks, stopped half-way"
# A batch of 8 rows: with more than 8 GPUs the rest would have none.
[ "$ranks" -le 8 ] || ranks=8
while [ $((8 % ranks)) -ne 0 ]; do ranks=$((ranks - 1)); done
overrides=("training.micro_batch_size=$((8 / ranks))")
"$farspan" train "$config" --ranks "$ranks" "${overrides[@]}" --stop-after 1500

say "resuming from the checkpoint"
"$farspan" train "$config" --ranks "$ranks" "${overrides[@]}"

say "converting to Hugging Face"
"$farspan" convert to-hf "$run" "$run-hf"

say "loading it in transformers"
.venv/bin/python -P launch/quickstart.py "$run" "$run-hf"
say "done: the run is in $run (tensorboard --logdir $run/tensorboard), the model in $run-hf"
