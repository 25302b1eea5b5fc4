#!/usr/bin/env bash
# Everything that must hold, on a CPU alone: ruff, mypy, pytest.
#
#   ./tests/run.sh [pytest's arguments]      such as: ./tests/run.sh tests/kernels -k dropout
#
# The first time it makes .venv in the clone and installs what constraints.txt pins; later only where that has changed.
# FARSPAN_PYTHON=/path/to/python takes the environment of that interpreter, as it is.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

fail() {
  echo "tests/run.sh: $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or later is on PATH: install one, or set FARSPAN_PYTHON to an interpreter"
}

make_environment() {
  python="$root/.venv/bin/python"
  local base stamp
  stamp=".venv/tested-with-$(cat pyproject.toml constraints.txt version.py | cksum | tr ' ' '-')"
  if [[ -e $stamp && -x $python ]]; then
    return
  fi
  echo "== install into .venv (the first time this takes minutes)"
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    "$base" -m venv --clear .venv || fail "$base could not make a virtual environment: see above"
  fi
  "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
  rm -f .venv/tested-with-*
  touch "$stamp"
}

if [[ -n ${FARSPAN_PYTHON:-} ]]; then
  python=$FARSPAN_PYTHON
else
  make_environment
fi
found=$("$python" -P -c 'import farspan, os; print(os.path.dirname(os.path.realpath(farspan.__file__)))') ||
  fail "$python cannot import farspan: $python -m pip install -c constraints.txt -e '.[test]'"
[[ $found == "$root" ]] || fail "$python imports farspan from $found, not from this clone: install this one, editable"

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
"$python" -P -m pytest "$@"
