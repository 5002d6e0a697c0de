#!/usr/bin/env bash
# Runs every CUDA kernel once under a tool of compute-sanitizer, on a machine with a GPU.
#
#     bash tools/sanitize_gpu.sh memcheck|racecheck|initcheck|synccheck PYTHON [OPTION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
tool=$1
shift
# only our kernels, except initcheck, which must also see the writes of torch's kernels
only=(--kernel-name kns=simplexfix)
[ "$tool" != initcheck ] || only=()
PYTORCH_NO_CUDA_MEMORY_CACHING=1 exec compute-sanitizer --tool "$tool" "${only[@]}" --report-api-errors no \
  --error-exitcode 3 "$@" -m pytest -q -p no:cacheprovider tests/test_gpu.py -k each_kernel_once
