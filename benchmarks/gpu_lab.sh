#!/usr/bin/env bash
# Builds, checks and times everything on a machine with a GPU, in under nine minutes and without network:
#
#     bash benchmarks/gpu_lab.sh OUT [--only build,audit,tests,sanitizer,bench,ncu,plot] [--again]
#
# OUT gets summary.md (one page), lab.csv (a row per part), a log per part, the benchmarks' CSV files and figures, all as
# they come. A part that fails is reported and does not stop the others; the exit status is 1 if any failed. A second
# call goes on where the first was cut off, test by test. Without a GPU the CUDA parts are absent.
set -euo pipefail
export PYTHON="${PYTHON:-python3}"
[[ $# -ge 1 && "$1" != -* ]] || { sed -n '2,8p' "$0" >&2; exit 2; }
out="$(realpath -m -- "$1")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "$PYTHON" -m benchmarks.gpu_lab "$out" "$@"
