#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, step by step or all of it:
#
#   scripts/gpu_check.sh [build] [test] [sanitize] [bench]
#
# build     both extensions, in place, with the python of $PYTHON (default python3; torch with CUDA)
# test      every test, with CUDA tensors on native and Triton
# sanitize  compute-sanitizer's memcheck, racecheck and initcheck over small shapes
# bench     against the copy bandwidth and the peers that are installed; writes
#           benchmarks/results/<gpu>/ (or $RESULTS); $OPS picks the ops
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

build() {
  TEMPNET_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
  "$PYTHON" -m tempnet_kernels env
}

tests() {
  "$PYTHON" -m pytest -n "${JOBS:-8}" --dist worksteal
}

sanitize() {
  local tool
  # Every allocation on its own, so that an access past its end is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    echo "== $tool"
    # initcheck must see torch's kernels, too: they initialise what ours read.
    local ours=(--kernel-name kns=tempnet)
    [[ $tool == initcheck ]] && ours=()
    compute-sanitizer --tool "$tool" "${ours[@]}" --error-exitcode 1 \
      "$PYTHON" tests/gpu_small_shapes.py
  done
}

bench() {
  local gpu results op
  gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower())')
  results=${RESULTS:-benchmarks/results/$gpu}
  mkdir -p "$results"
  for op in ${OPS:-dro_cross_entropy linear_dro_cross_entropy tempered_softmax optimal_temperature dro_contrastive}; do
    "$PYTHON" -m pytest "benchmarks/bench_$op.py" -q --benchmark-json="$results/$op.json"
    "$PYTHON" benchmarks/report.py "$results/$op.json"
  done
}

for step in "${@:-build test sanitize bench}"; do
  for name in $step; do
    case $name in
      build | sanitize | bench) "$name" ;;
      test) tests ;;
      *)
        echo "gpu_check.sh: unknown step '$name': expected build, test, sanitize or bench" >&2
        exit 2
        ;;
    esac
  done
done
