#!/usr/bin/env bash
# Everything that is asked of a GPU, in nine minutes at most: bash tests/gpu_day.sh OUT
# The same on a CPU, in tiny shapes: bash tests/gpu_day.sh OUT --dry
# What it runs, and what it writes into OUT: tests/gpu_day.py. What it installs: tests/gpu_pack.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tests/gpu_day.py "$@"
