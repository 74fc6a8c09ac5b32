"""The real HTTP server over an engine that answers at once: for thousands of requests a minute.

Run with the interpreter that has Nitsum, from the repository's root.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.server.run import serve
from tests.server.server_kit import MODEL, make_checkpoint, settings_of


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(make_checkpoint(Path(folder) / "tiny"))
        engine = FakeEngineClient(plans=("2xTP1", "TP2"))
        serve(settings, engine, on_ready=lambda url: print(f"Serving {MODEL} at {url}", flush=True))


if __name__ == "__main__":
    main()
