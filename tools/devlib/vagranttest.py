"""tools/dev vagrant-test: `vagrant up` for real, the kernel tests and the demo inside, nothing left.

Everything that would change the host runs in namespaces of its own: libvirt's bridge, iptables chains and
ip_forward belong to a network namespace, its files lie on tmpfs mounts, its processes in a PID namespace.
When that ends, whatever way, all of it is gone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devlib import box, vmtest
from devlib.common import ROOT, BuildError, cache_folder, end_on_signals, run, say, scratch

_INSIDE = "TIDEGATE_VAGRANT_TEST_INSIDE"
_PORT = 8080
_TIME_SCALE = 4
_STEP_S = 1800.0
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# what libvirt writes to: each gets a tmpfs, /etc/libvirt a copy
_OWN_FOLDERS = ("/run/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt")
_QEMU_CONF = """\
stdio_handler = "file"
user = "root"
group = "root"
cgroup_controllers = [ ]
remember_owner = 0
security_driver = "none"
"""
_LIBVIRTD_CONF = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_group = "root"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
"""
# run in the guest, from the checkout: the demo, a request, ages while the worker stands still, a new worker
_DEMO = f"""\
set -e
systemd-run --quiet --collect --unit=demo "$PWD/.venv/bin/tidegate" demo --host 0.0.0.0 --port {_PORT}
for _ in $(seq 240); do
    curl -s -o /dev/null http://127.0.0.1:{_PORT}/ && break
    sleep 0.5
done
curl -sS -i http://127.0.0.1:{_PORT}/ || {{ journalctl --no-pager -u demo; exit 1; }}
control=$(ls /tmp/tidegate-demo-*/control.sock)
tidegate() {{ echo "$ tidegate $1 ${{*:2}}"; .venv/bin/tidegate "$@" --control "$control"; }}
worker=$(pgrep -f '^tidegate: worker 0' | head -n 1)
kill -STOP "$worker"
for _ in 1 2 3; do curl -s -m 2 -o /dev/null http://127.0.0.1:{_PORT}/ & done
sleep 2
tidegate ages {_PORT}
kill -CONT "$worker"
sleep 2
tidegate ages {_PORT}
kill -KILL "$worker"
curl -sS -i --retry 5 --retry-all-errors http://127.0.0.1:{_PORT}/ | head -n 1
tidegate workers
"""


def _shell(script: str, what: str, show: Callable[[str], None], limit_s: float = _STEP_S) -> str:
    """Runs a shell command, its output shown line by line as it comes and returned.

    Raises:
        BuildError: it failed, or took longer than `limit_s`.
    """
    process = subprocess.Popen(
        ["bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(int(limit_s))
    lines = []
    for line in process.stdout:
        text = _ESCAPES.sub("", line.rstrip("\n").split("\r")[-1])
        # thousands of them, each one a line when there is no terminal
        if not text.startswith("Progress: "):
            lines.append(text)
            show(text)
    status = process.wait()
    signal.alarm(0)
    if status != 0:
        raise BuildError(f"{what} failed (status {status})")
    return "\n".join(lines)


def _start_libvirt(folder: Path) -> None:
    for place in _OWN_FOLDERS:
        Path(place).mkdir(parents=True, exist_ok=True)
        run(["mount", "-t", "tmpfs", "tmpfs", place], f"a tmpfs on {place}")
    configuration = folder / "etc-libvirt"
    shutil.copytree("/etc/libvirt", configuration)
    (configuration / "qemu.conf").write_text(_QEMU_CONF)
    (configuration / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
    shutil.rmtree(configuration / "qemu/networks", ignore_errors=True)
    run(["mount", "--bind", str(configuration), "/etc/libvirt"], "a copy of /etc/libvirt")
    run(["ip", "link", "set", "lo", "up"], "lo")
    log = (folder / "libvirtd.log").open("wb")
    subprocess.Popen(
        ["libvirtd", "-p", "/run/libvirt/libvirtd.pid"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    deadline = time.monotonic() + 60
    while subprocess.run(["virsh", "-c", "qemu:///system", "version"], capture_output=True).returncode != 0:
        if time.monotonic() > deadline:
            raise BuildError(f"libvirtd does not answer:\n{(folder / 'libvirtd.log').read_text()[-2000:]}")
        time.sleep(0.2)


def _inside(folder: Path, boxed: box.Box, tests: list[str]) -> None:
    """The run itself, in namespaces of its own; `folder` is removed by the one who made them."""
    _start_libvirt(folder)
    boot = folder / "boot"
    (boot / "pool").mkdir(parents=True)
    for name in ("vmlinuz", "initrd"):
        (boot / name).symlink_to(boxed.folder / name)
    os.environ.update(
        VAGRANT_HOME=str(folder / "home"),
        VAGRANT_DOTFILE_PATH=str(folder / "dot"),
        VAGRANT_CWD=str(ROOT / "vagrant"),
        VAGRANT_CHECKPOINT_DISABLE="1",
        VAGRANT_DEFAULT_PROVIDER="libvirt",
        VAGRANT_NO_COLOR="1",
        TIDEGATE_VAGRANT_BOX="tidegate-test",
        TIDEGATE_VAGRANT_BOOT=str(boot),
    )

    def show(line: str) -> None:
        print(f"[vagrant] {line}", flush=True)

    def guest(script: str, what: str) -> str:
        # as Vagrant's own user, by the README's words
        return _shell(f"vagrant ssh -c {_quote(f'cd /{box.CHECKOUT} && {script}')}", what, show)

    began = time.monotonic()
    _shell("vagrant validate", "vagrant validate", show)
    _shell(
        f"vagrant box add --name tidegate-test --force {boxed.file} 2>&1 | tail -n 1", "vagrant box add", show
    )
    try:
        _shell("vagrant up", "vagrant up", show)
        say(f"up and provisioned after {time.monotonic() - began:.0f} s")
        environment = f"CI=true TIDEGATE_TIME_SCALE={_TIME_SCALE}"
        pytest = (
            f".venv/bin/python -m pytest -q -o timeout={120 * _TIME_SCALE} {' '.join(map(_quote, tests))}"
        )
        guest(f"sudo env {environment} {pytest}", "the tests in the guest")
        seen = guest(f"sudo bash -c {_quote(_DEMO)}", "the demo in the guest")
        if str(_PORT) not in seen.split("HTTP/1.1 200", 1)[-1]:
            raise BuildError("tidegate ages did not show the demo's listener")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/", timeout=30) as answer:
                show(f"from the host, through the forwarded port: {answer.status} {answer.read(80)!r}")
        except OSError as error:
            raise BuildError(f"no answer through the forwarded port: {error}") from None
        guest("sudo .venv/bin/tidegate doctor", "tidegate doctor in the guest")
    finally:
        _shell("vagrant destroy -f", "vagrant destroy", show)
    say(f"destroyed after {time.monotonic() - began:.0f} s")


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _host_state() -> dict[str, str]:
    """What libvirt is known to change on a host."""
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=False).stdout
    chains = [line.split()[0] for line in rules.splitlines() if line.startswith((":", "-A"))]
    forward = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    links = sorted(os.listdir("/sys/class/net"))
    daemons = subprocess.run(
        ["pgrep", "-a", "libvirtd|dnsmasq|qemu-system"], capture_output=True, text=True, check=False
    )
    etc = sorted(str(path) for path in Path("/etc/libvirt").rglob("*"))
    return {
        "iptables": "\n".join(chains),
        "ip_forward": forward,
        "links": " ".join(links),
        "daemons": daemons.stdout,
        "/etc/libvirt": "\n".join(etc),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/dev vagrant-test", description=__doc__)
    parser.add_argument("tests", nargs="*", help="arguments for pytest in place of vm-test's set (after --)")
    options = parser.parse_args(argv)
    tests = options.tests or vmtest.default_tests()
    try:
        if inside := os.environ.get(_INSIDE):
            _inside(Path(inside), box.Box(Path(os.environ["TIDEGATE_VAGRANT_BOX_FOLDER"])), tests)
            return 0
        os.nice(10)
        end_on_signals()
        boxed = box.ensure()
        before = _host_state()
        with scratch(cache_folder(), f"run-{os.getpid()}") as folder:
            done = subprocess.run(
                [
                    *(
                        "unshare",
                        "--mount",
                        "--net",
                        "--pid",
                        "--ipc",
                        "--fork",
                        "--kill-child",
                        "--mount-proc",
                    ),
                    *("--propagation", "private", sys.executable, __file__, "--", *tests),
                ],
                env={**os.environ, _INSIDE: str(folder), "TIDEGATE_VAGRANT_BOX_FOLDER": str(boxed.folder)},
                check=False,
            )
        after = _host_state()
        changed = [name for name in before if before[name] != after[name]]
        for name in changed:
            say(f"the host's {name} changed:\n{before[name]}\n->\n{after[name]}")
        passed = done.returncode == 0 and not changed
        say(f"vagrant-test {'passed; the host is as it was' if passed else 'FAILED'}")
        return 0 if passed else 1
    except BuildError as error:
        print(f"tools/dev vagrant-test: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
