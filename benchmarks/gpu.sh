#!/usr/bin/env bash
# Run the GPU tests and every benchmark on a GPU machine in one call, in under 9 minutes, without ray, faiss or network,
# and write benchmarks/results/<device>-<date>.json.
# pydantic and its core have to be there: bring their wheels along where the machine has none.
# Without a GPU (or with --quick) the same benchmarks run at reduced size, to see that the script is in order.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
quick=""
if ! nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || [ "${1:-}" = "--quick" ]; then quick="--quick"; fi
timeout 90 "$python" -m pytest -x -q -m "not ray and not cluster and not wheel" \
  tests/data/test_cache.py tests/data/test_transforms_batch.py tests/engine tests/gcn tests/neighbors \
  -k "gpu or cuda or batch or fused or bfloat or broken or pyg or reference"
tests=$?
timeout 430 "$python" benchmarks/run_all.py $quick --timeout 100 epoch run input labelling neighbors evaluation
benchmarks=$?
echo "tests: $tests, benchmarks: $benchmarks"
exit $((tests | benchmarks))
