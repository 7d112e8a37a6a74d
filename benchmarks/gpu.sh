#!/usr/bin/env bash
# All that is measured on a GPU, in one go of some eight minutes: tests, RoI operators, deterministic gradients, training steps, heads,
# launches. Writes gpu.json and gpu.md, a table with the targets beside what was measured.
#
#   bash benchmarks/gpu.sh [--out FOLDER] [--minutes 8] [--only operators heads]
#   bash benchmarks/gpu.sh --device cpu --smoke     # tiny sizes, some seconds of each: does it run?
#
# PYTHON names the interpreter (python3). Packages that are missing are named first; a machine without a network takes them as wheels:
#
#   pip download --only-binary=:all: --python-version 3.12 -d wheels NAMES      # where there is a network
#   python3 -m pip install --no-index --find-links wheels NAMES                 # there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
