#!/usr/bin/env bash
# What tests/gpu_day.sh needs on a machine without network, beyond torch 2.11, triton, numpy and pillow: wheels
# for Python 3.12 on Linux, and the 4B's and the 2B's shape with a tokenizer made here. Into gpu-pack/ (git
# ignores it), at most 60 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rm -rf gpu-pack
platforms=()
for glibc in 28 27 24 17; do
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
fetch=("$python" -m pip download -q --only-binary=:all: --python-version 3.12 --implementation cp
  "${platforms[@]}" --platform manylinux2014_x86_64)
# The project's pins, but for torch; numpy and pillow are there.
"${fetch[@]}" -d gpu-pack/wheels "$(grep ^transformers== requirements.txt)" tqdm pytest einops
rm gpu-pack/wheels/numpy-*.whl
"${fetch[@]}" --no-deps -d gpu-pack/kernels "flash-linear-attention>=0.6" "fla-core>=0.6"
for size in 4b 2b; do
  "$python" tests/gpu_day.py "gpu-pack/$size" --only shape --size "$size"
done
megabytes=$(du -sm gpu-pack | cut -f1)
echo "gpu-pack/: $megabytes MB"
test "$megabytes" -le 60
