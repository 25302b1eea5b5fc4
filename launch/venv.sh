# Sourced by launch/quickstart.sh and tests/run.sh from the root of the clone: .venv with what constraints.txt pins.
# FARSPAN_PYTHON=python3.x names the interpreter that makes it.

fail() {
  echo "$0: $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${FARSPAN_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or later${FARSPAN_PYTHON:+ at $FARSPAN_PYTHON}: install one, or set FARSPAN_PYTHON to its path"
}

# make_venv EXTRA: installs this clone with that extra, unless .venv has it already, made from the same files.
make_venv() {
  local extra=$1 base stamp
  stamp=".venv/$extra-$(cat pyproject.toml constraints.txt version.py | cksum | tr ' ' '-')"
  if [[ -e $stamp ]] && .venv/bin/python -P -c 'import farspan.version' 2>/dev/null; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    "$base" -m venv --clear .venv || fail "$base could not make a virtual environment: see above"
  fi
  echo "== install into .venv (the first time this takes minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
  rm -f ".venv/$extra"-*
  touch "$stamp"
}

# make_tensorflow_venv: .venv-tensorflow with TensorFlow alone, unless it is there already.
make_tensorflow_venv() {
  local stamp=".venv-tensorflow/$(cksum <constraints.txt | tr ' ' '-')"
  [[ -e $stamp ]] && return
  echo "== install TensorFlow into .venv-tensorflow (once)"
  "$(find_python)" -m venv --clear .venv-tensorflow || fail "could not make a virtual environment: see above"
  .venv-tensorflow/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt tensorflow-cpu
  touch "$stamp"
}
