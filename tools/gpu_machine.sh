#!/usr/bin/env bash
# Tests a built wheel on a machine with a GPU that has no network. Tests, benchmark and compute-sanitizer have time
# limits, together 570 s.
#
#     SIMPLEXFIX_CUDA_ARCHS=90 python tools/wheels.py --machine x86_64 python3.12    # here: dist/simplexfix-*-cp312-*.whl
#     bash tools/gpu_machine.sh dist results                                         # there, in a copy of this tree
#
# Its `python3` needs torch, numpy and pytest. The second argument is a folder for the logs and for gpu.json, the
# benchmark's numbers. A step that fails does not stop the next one.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# = 2 ] || { echo "usage: bash tools/gpu_machine.sh FOLDER-OF-WHEELS RESULTS"; exit 2; }
mkdir -p "$2" || exit 2
results=$(cd "$2" && pwd)
tag=$(python3 -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")') || exit 2
wheel=$(ls "$1"/simplexfix-*-"$tag"-*x86_64.whl 2> /dev/null | tail -n 1)
[ -n "$wheel" ] || { echo "no wheel for $tag in $1: see the first lines of this file"; exit 2; }
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheel" || exit 2
export PYTHONPATH=$site PYTHONUNBUFFERED=1
python="python3 -P" # the current folder has the source without a library: keep it off the path

failed=
step() { # step NAME SECONDS COMMAND...: runs a command with a time limit, and keeps its output
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout "$limit" "$@" > "$results/$name.log" 2>&1
  status=$?
  [ $status = 0 ] || failed="$failed $name"
  printf '%-12s %s, %s of %s s\n' "$name" "$([ $status = 0 ] && echo passed || echo "FAILED ($status)")" $((SECONDS - begin)) "$limit"
  tail -n 3 "$results/$name.log"
}

$python -m simplexfix doctor
$python -c 'from simplexfix._native import why_not_cuda as why; import sys; sys.exit(why())' || exit 1
step tests 150 $python -m pytest -q -p no:cacheprovider tests/test_gpu.py
step benchmark 240 python3 benchmarks/gpu.py --no-compile --out "$results/gpu.json"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    step $tool 45 bash tools/sanitize_gpu.sh $tool $python
  done
else
  echo "no compute-sanitizer: left out"
fi
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
