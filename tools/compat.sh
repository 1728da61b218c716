#!/usr/bin/env bash
# compat.sh PYTHON oldest|newest TESTS…: install with the oldest or newest allowed dependencies, and run tests.
set -euo pipefail
python=$1 age=$2
shift 2
env=build/compat/$(basename "$python")-$age
rm -rf "$env"
"$python" -m venv "$env"
pip() { "$env/bin/python" -m pip install -q "$@"; }
if [ "$age" = oldest ]; then
  pip torch==2.11.0
  pip -r requirements/oldest.txt
else
  pip "torch>=2.11"
  pip setuptools wheel ninja pytest hypothesis pybind11
fi
NORMFUSE_CUDA=${NORMFUSE_CUDA:-0} pip --no-build-isolation ".[plot]"
rm -rf "$env/tests" && mkdir "$env/tests"
cp -r tests examples pyproject.toml "$env/tests"
echo "$python, $age: $("$env/bin/python" -c 'import torch, onnx, onnxruntime; print(torch.__version__, onnx.__version__, onnxruntime.__version__)')"
cd "$env/tests" && ../bin/python -m pytest -q "$@"
