#!/usr/bin/env bash
# Tables 1 and 2 on a GPU: ResNet-50 at 256 x 128, 40 epochs, on the bench set (random weights) and, where ROOT is given,
# on a data set in the Market layout (ImageNet weights from the file WEIGHTS, random ones without).
# A call ends within MINUTES (8 by default) and leaves docs/results-gpu.md with what is done so far; call it until it
# exits 0. The runs lie in OUT (runs/gpu-tables). It needs neither ray nor optuna nor a network. Not run on a GPU yet;
# EXTRA takes settings, by which it was tried at reduced size on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
out="${OUT:-runs/gpu-tables}"
ends=$(awk "BEGIN { print int($SECONDS + 60 * ${MINUTES:-8}) }")
network=(backbone.name=resnet50 backbone.last_stride=1 data.height=256 data.width=128 train.precision=bf16
  train.epochs=40 train.lr_step=20 eval.every=5 train.threads=0)
status=0

# table STUDY NAME, and what tables.py takes beside
table() {
  local study=$1 name=$2 minutes
  shift 2
  minutes=$(awk "BEGIN { print ($ends - $SECONDS) / 60 }")
  "$python" benchmarks/tables.py "$study" --out "$out/$name" --minutes "$minutes" "$@" || status=1
  { printf '\n## %s, %s\n\n' "$study" "$name"; cat "$out/$name/$study.md"; } >> docs/results-gpu.md
}

{
  printf '# Results on a GPU\n\n'
  "$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch", torch.__version__)'
  printf '\n`benchmarks/gpu_tables.sh`; what the columns are: [results](results.md).\n'
} > docs/results-gpu.md
for study in table1 table2; do
  table "$study" bench --preset bench --set "${network[@]}" train.lr_new=0.05 ${EXTRA:-}
  if [ -n "${ROOT:-}" ]; then
    table "$study" "$(basename "$ROOT")" --preset recommended --data "$ROOT" \
      --set "${network[@]}" "backbone.weights=${WEIGHTS:-none}" ${EXTRA:-}
  fi
done
exit $status
