#!/usr/bin/env bash
# check_wheel.sh WHEEL MODULE...: installs the wheel into a fresh environment, imports these compiled modules there, and
# runs the CPU kernels, all without a compiler on the PATH.
# PYTHON names the interpreter. TORCH_SITE names a folder of packages to take torch from; otherwise pip fetches torch.
set -euo pipefail
wheel=$(realpath "$1")
modules=("${@:2}")
limit=$((60 * 1000 * 1000)) # bytes

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
if [[ -n ${TORCH_SITE:-} ]]; then
  site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$TORCH_SITE" >"$site/torch.pth" # comes after the wheel's own package on Python's path
  "$work/venv/bin/pip" install --quiet --no-deps "$wheel"
else
  "$work/venv/bin/pip" install --quiet torch --index-url https://download.pytorch.org/whl/cpu
  "$work/venv/bin/pip" install --quiet "$wheel"
fi

cd "$work" # not the clone, whose sources Python would import
# A GPU stays hidden: Triton, whose kernels `check` would run on one, needs a C compiler at its first launch.
run() { env -i HOME="$work" PATH="$work/venv/bin" CUDA_VISIBLE_DEVICES= "$work/venv/bin/python" "$@"; }
run - "$wheel" "$limit" "${modules[@]}" <<'CHECK'
import importlib, os, sys
import fused_attn

wheel, limit, modules = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
assert fused_attn.__file__.startswith(sys.prefix), f"{fused_attn.__file__} is not the wheel's"
size = os.path.getsize(wheel)
assert size <= limit, f"{wheel} has {size} bytes, expected at most {limit}"
for module in modules:
    importlib.import_module(f"fused_attn.{module}")  # _cuda loads without a driver, too
print(f"{os.path.basename(wheel)}: {size / 1e6:.1f} MB, {' and '.join(modules)} load")
CHECK
run -m fused_attn check --no-speed
