#!/usr/bin/env bash
# Installs what tests run for real, where this machine can: the servers of deploy/, and a compiler
# and an emulator for CPU kernels of another processor.
#
# Nothing happens when all are there. As root on Debian or Ubuntu the missing ones are
# installed; elsewhere one line names them, and the tests that need them skip, saying so.
set -euo pipefail

declare -A package=(
  [aarch64-linux-gnu-g++]=g++-aarch64-linux-gnu
  [chromium]=chromium
  [docker-compose]=docker-compose
  [nginx]=nginx-light
  [prometheus]=prometheus
  [promtool]=prometheus
  [qemu-aarch64]=qemu-user
)

PATH=$PATH:/usr/sbin
missing=()
for command in "${!package[@]}"; do
  command -v "$command" >/dev/null || missing+=("${package[$command]}")
done
((${#missing[@]})) || exit 0

if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "tools: ${missing[*]} not found; the tests that need them will skip" >&2
  exit 0
fi
echo "tools: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
  >"$log" 2>&1; then
  tail -n 3 "$log" >&2
  echo "tools: installation failed; the tests that need ${missing[*]} will skip" >&2
fi
