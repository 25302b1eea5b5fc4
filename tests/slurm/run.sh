#!/usr/bin/env bash
# What clusters do to a run, on a real SLURM of two nodes that is set up here and taken down again: as root, with Debian's
# slurm-wlm and munge, which are installed where they are not there.  Some minutes; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export FARSPAN_TEST_INSTALL=1
exec "${FARSPAN_PYTHON:-python3}" -P -m pytest -v tests/slurm "$@"
