#!/usr/bin/env bash
# Run the tests and every benchmark on a GPU machine in one call (about 5 minutes), without ray, faiss or network.
# pydantic and its core have to be there: bring their wheels along where the machine has none.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || exit 2
timeout 240 python3 -m pytest -x -q -m "not ray" tests --ignore=tests/test_cli.py
tests=$?
timeout 300 python3 benchmarks/run_all.py --timeout 120
benchmarks=$?
echo "tests: $tests, benchmarks: $benchmarks"
exit $((tests | benchmarks))
