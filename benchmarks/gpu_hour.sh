#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, compare with the CPU, sanitize, measure.
#   benchmarks/gpu_hour.sh [python]
# Needs nvcc, a CUDA torch in the given Python's environment and the packages of requirements/dev.txt. Results go to
# benchmarks/results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python}
stage() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

stage "build"
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
NORMFUSE_CUDA=1 NORMFUSE_CUDA_ARCHS=$architecture "$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" -c 'import normfuse; print(normfuse.build_info())'

stage "compare with the CPU, streams, CUDA graphs"
"$python" -m pytest -q tests/cuda tests/nn/test_sync.py

if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck; do
    stage "compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q tests/cuda -k "gpu_equals_cpu and (64 and 33)"
  done
else
  echo "compute-sanitizer is not installed: nothing was sanitized"
fi

stage "measure training steps"
"$python" benchmarks/training_step.py --device cuda --seconds 4
"$python" benchmarks/training_step.py --device cuda --seconds 4 --dtype bfloat16
"$python" benchmarks/report.py
stage "decode"
"$python" benchmarks/decode.py --label gpu-host

# What is left of the hour; it goes on where it was when the script runs again.
stage "quality at width 512"
timeout 1800 "$python" benchmarks/quality.py --device cuda --state "${QUALITY_STATE:-build/quality}" \
  --only lm512:pre lm512:post --tokens 20000000 --choosing-tokens 2000000 || [ $? -eq 124 ]
stage "done"
