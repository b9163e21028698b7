"""Compiles BPF C with BCC, in a process of its own: BCC maps LLVM, and it is gone when this ends.

Run by path, not as a module, and so on nothing but the standard library and bcc: it also works under
another interpreter than tidegate's. Request (JSON on stdin): {"cflags": [..], "text": C of all programs,
"functions": {name: function}}. Answer (JSON on stdout): {"objects": {name: base64 of the instructions}},
or {"error": "no_bcc" | "no_headers" | "compile", "detail": text}.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any


def _headers_present() -> bool:
    return os.path.exists(f"/lib/modules/{os.uname().release}/build/include") or os.path.exists(
        "/sys/kernel/kheaders.tar.xz"
    )


def compile_all(request: dict[str, Any]) -> dict[str, Any]:
    try:
        from bcc import BPF
    except ImportError as error:
        return {"error": "no_bcc", "detail": str(error)}
    try:
        module = BPF(text=request["text"], cflags=list(request["cflags"]))
        objects = {
            name: base64.b64encode(module.dump_func(function.encode())).decode()
            for name, function in request["functions"].items()
        }
    except Exception as error:  # BCC raises bare Exception
        return {"error": "compile" if _headers_present() else "no_headers", "detail": str(error)}
    return {"objects": objects}


def main() -> None:
    # BCC and clang write where they like: the answer goes to a copy of stdout, all else to stderr
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    answer = compile_all(json.load(sys.stdin))
    with os.fdopen(answer_fd, "w") as out:
        json.dump(answer, out)


if __name__ == "__main__":
    main()
