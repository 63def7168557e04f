#!/usr/bin/env bash
# check_wheel.sh WHEEL: installs the wheel into a fresh environment, and runs its kernels as a user without a compiler.
# PYTHON names the interpreter; TORCH the requirement of torch, and further options of pip.
set -euo pipefail
wheel=$(realpath "$1")
limit=$((60 * 1000 * 1000)) # bytes that a wheel may have

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
# shellcheck disable=SC2086
"$work/venv/bin/pip" install --quiet ${TORCH:-torch --index-url https://download.pytorch.org/whl/cpu}
"$work/venv/bin/pip" install --quiet "$wheel"

cd "$work" # not the clone, whose sources Python would import
run() { env -i HOME="$work" PATH="$work/venv/bin" "$work/venv/bin/python" "$@"; }
run - "$limit" "$wheel" <<'CHECK'
import os, sys
import fused_attn._cuda  # loads without a driver
from fused_attn import _C
limit, wheel = int(sys.argv[1]), sys.argv[2]
size = os.path.getsize(wheel)
assert size <= limit, f"{wheel} has {size} bytes, expected at most {limit}"
print(f"{size / 1e6:.1f} MB, CPU kernels {_C.build_info()['cpu_isas']}")
CHECK
run -m fused_attn info
run -m fused_attn check
