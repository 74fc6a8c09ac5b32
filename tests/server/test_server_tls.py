"""HTTPS with a certificate of our own; what a bad one says."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from nitsum.cli.build import check_tls
from nitsum.cli.settings import ServeSettings
from nitsum.errors import ConfigError
from tests.server.server_kit import Bench, served, settings_of


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=nitsum", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(key), "-out", str(cert), "-days", "1"]
    subprocess.run([openssl, "req", *kind, *files, *subject], check=True, capture_output=True)
    return cert, key


def test_https(checkpoint: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    bench = Bench(checkpoint, tls_cert=cert, tls_key=key)

    async def main() -> None:
        trust = ssl.create_default_context(cafile=str(cert))
        async with served(bench) as url, httpx.AsyncClient(base_url=url, verify=trust) as http:
            assert url.startswith("https://")
            assert (await http.get("/health")).status_code == 200
            with pytest.raises(httpx.HTTPError):
                await http.get(url.replace("https:", "http:") + "/health")

    asyncio.run(main())


def test_bad_certificates_are_said_before_the_model_is_loaded(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = (str(path) for path in certificate)
    check_tls(ServeSettings(tls_cert=cert, tls_key=key))
    with pytest.raises(ConfigError, match=r"none\.pem"):
        check_tls(ServeSettings(tls_cert=str(tmp_path / "none.pem")))
    with pytest.raises(ConfigError, match="cannot be used"):
        check_tls(ServeSettings(tls_cert=key, tls_key=cert))
    with pytest.raises(ConfigError, match="--tls-cert, too"):
        check_tls(ServeSettings(tls_key=key))
    with pytest.raises(ConfigError, match="--tls-cert, too"):
        settings_of(tmp_path, tls_key=certificate[1])
