"""Parts of a benchmark in processes of their own, so that a crash or a hang costs that part only."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_part(module: str, arguments: list[str], limit: float, env: dict[str, str] | None = None) -> dict:
    """Run `python -m module arguments --json FILE` from the root of the checkout.

    Returns:
        status ("ok", "failed" or "timeout"), seconds, result (what was written to FILE, which a part that writes as it
        goes leaves behind even if it ends badly), and after a failure the exit code and the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = pathlib.Path(folder) / "part.json", pathlib.Path(folder) / "log"
        command = [sys.executable, "-m", module, *arguments, "--json", str(out)]
        start = time.monotonic()
        with log.open("wb") as file:
            try:
                child = subprocess.run(
                    command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=file, stderr=file, timeout=limit
                )
                status, code = ("failed" if child.returncode else "ok"), child.returncode
            except subprocess.TimeoutExpired:
                status, code = "timeout", None
        part = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        try:
            part["result"] = json.loads(out.read_text())
        except (OSError, ValueError):
            part["status"] = "failed" if status == "ok" else status
        if part["status"] != "ok":
            part |= {"code": code, "error": log.read_text(errors="replace")[-4000:]}
        return part
