"""Sends requests to a running `blip2edge serve`; schemathesis makes them from the server's OpenAPI document.

    python benchmarks/fuzz_http.py BUNDLE --seconds 600 --json benchmarks/results/fuzz-http.json

Shows that no request is answered with 500, and that every status, content type and body is one that the document
declares. Options of schemathesis are in `configs/schemathesis.toml`. Needs the extra `dev`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from reporting import bundle_path, cpu_model, parser_of, write_json
from soak import served

from blip2edge.cli import run_script

CONFIG = Path(__file__).parent / "configs" / "schemathesis.toml"


def main() -> int:
    """Runs schemathesis for the given time and writes the counts."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with served(options.bundle) as service:
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
        address = f"{service.address}/openapi.json"
        done = subprocess.run(
            [*command, address, "--max-time", str(options.seconds), "--no-color"], stdout=subprocess.PIPE, text=True
        )
        answered = service.answers()
        alive = service.process.poll() is None
    print(done.stdout)
    generated = re.search(r"(\d+) generated", done.stdout)
    failures = re.search(r"(\d+) unique failure", done.stdout)
    record = {
        "processor": cpu_model(),
        "seconds": options.seconds,
        "requests": sum(answered.values()),
        "generated": int(generated[1]) if generated else 0,
        "failures": int(failures[1]) if failures else 0,
        "statuses": answered,
        "server_alive": alive,
    }
    print(record)
    if options.json:
        write_json(options.json, record)
    return int(done.returncode != 0 or not alive or "500" in answered)


if __name__ == "__main__":
    run_script(main)
