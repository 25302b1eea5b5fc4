#!/usr/bin/env bash
# Everything that must hold, on a CPU alone: ruff, mypy, pytest.
#
#   ./tests/run.sh [pytest's arguments]      such as: ./tests/run.sh tests/kernels -k dropout
#
# Without arguments everything runs but what takes minutes (-m long: what clusters and networks do to runs; the whole of it
# on SLURM is tests/slurm/run.sh): in FARSPAN_TEST_WORKERS processes (2), and then one by one what has ranks of its own
# or measures time or memory.
#
# Uses the active virtual environment where this clone and its test extra are installed in it.  Else it makes .venv in
# the clone the first time, and installs what constraints.txt pins; later only where that has changed.
# FARSPAN_PYTHON=python3.x names the interpreter that makes .venv.  TensorFlow, which reads its own checkpoints, gets an
# environment of its own, .venv-tensorflow: where it is installed, TensorBoard loads it into every process that logs.
# FARSPAN_TENSORFLOW_PYTHON names an interpreter that has it already.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

. launch/venv.sh

# Whether an interpreter has this clone, and what the tests need.
is_ready() {
  "$1" -P - "$root" 2>/dev/null <<'PYTHON'
import sys
from importlib.util import find_spec
from pathlib import Path

ready = all(find_spec(name) for name in ("hypothesis", "matplotlib", "mypy", "pytest", "pytest_timeout", "ruff", "transformers", "xdist"))
spec = find_spec("farspan")
sys.exit(not (ready and spec and Path(spec.origin).resolve().parent == Path(sys.argv[1])))
PYTHON
}

if [[ -n ${VIRTUAL_ENV:-} ]] && is_ready "$VIRTUAL_ENV/bin/python"; then
  python=$VIRTUAL_ENV/bin/python
else
  make_venv test
  python=$root/.venv/bin/python
  [[ -n ${FARSPAN_TENSORFLOW_PYTHON:-} ]] || make_tensorflow_venv
  export FARSPAN_TENSORFLOW_PYTHON=${FARSPAN_TENSORFLOW_PYTHON:-$root/.venv-tensorflow/bin/python}
fi

echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .

echo "== mypy"
# The clone is the package, whatever its folder is called: mypy sees it under the package's name.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
ln -s "$root" "$package/farspan"
(cd "$package" && "$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" -p farspan)

echo "== pytest"
# -P: the clone's folder `kernels` must not pass for the package of that name that transformers looks for.
if (($#)); then
  "$python" -P -m pytest "$@"
else
  failed=0
  "$python" -P -m pytest -n "${FARSPAN_TEST_WORKERS:-2}" --dist loadfile -m "not alone and not long" || failed=1
  "$python" -P -m pytest -m "alone and not long" || failed=1
  exit $failed
fi
