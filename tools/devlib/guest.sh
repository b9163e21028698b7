#!/bin/bash
# Runs inside the guest of vm-test, from the checkout that was carried in: probes, then tests. What it
# prints goes to the host through one virtio port, what it found, as JSON, through another.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec >/dev/virtio-ports/tidegate.out 2>&1 </dev/null
export HOME=/root CI=true PYTHONDONTWRITEBYTECODE=1 LANG=C.UTF-8
# TESTS (an array), TIDEGATE_TIME_SCALE
. ./.guest-job
export TIDEGATE_TIME_SCALE
exec 9>/dev/virtio-ports/tidegate.result

printf 'guest: Linux %s, %s CPUs, up %.0f s\n' "$(uname -r)" "$(nproc)" "$(cut -d' ' -f1 /proc/uptime)"
status=0
tools/dev setup || status=1
if [ "$status" = 0 ]; then
    echo "guest: trying the kernel's features"
    # exit status 1 says that something is missing here, which the host judges by what it reads
    report=$(.venv/bin/tidegate doctor --json)
    echo "guest: running the tests"
    .venv/bin/python -m pytest -v --no-header -o timeout=$((120 * TIDEGATE_TIME_SCALE)) "${TESTS[@]}" || status=$?
fi
printf '{"status": %d, "kernel": "%s", "doctor": %s}\n' "$status" "$(uname -r)" "${report:-null}" >&9
printf 'guest: ended with status %s, up %.0f s\n' "$status" "$(cut -d' ' -f1 /proc/uptime)"
exit "$status"
