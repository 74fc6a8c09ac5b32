"""Key files: who gets in, as what, how much, and what changes while the server runs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from nitsum.cli import main
from nitsum.engine.fake_client import FakeEngineClient
from nitsum.errors import ApiError, ConfigError
from nitsum.ledger.records import Prices
from nitsum.server.keyfile import (
    Key,
    Tenant,
    change_keys,
    hash_token,
    new_token,
    read_keys,
)
from nitsum.server.keys import KeyRing
from nitsum.server.quota import Quotas
from nitsum.tier import TierSet
from tests.server.server_kit import MODEL, Bench, error_of, events_of, served

BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class Keyed:
    """A bench with a key file; `make` adds a key and returns its token."""

    def __init__(self, checkpoint: Path, folder: Path, **changes: Any) -> None:
        self.path = folder / "keys.json"
        change_keys(self.path, lambda keys: keys)
        self.bench = Bench(checkpoint, changes.pop("engine", None), keys=self.path, **changes)
        self.bench.says("x")

    def make(self, **limits: Any) -> str:
        token = new_token()
        key = Key(id=f"key_{token[3:9]}", sha256=hash_token(token), **limits)
        change_keys(self.path, lambda keys: [*keys, key])
        self.reread()
        return token

    def change(self, **limits: Any) -> None:
        """Give all keys these limits."""
        change_keys(
            self.path, lambda keys: [msgspec.structs.replace(key, **limits) for key in keys]
        )
        self.reread()

    def limit(self, tenant: str, **limits: int) -> None:
        """Give all keys of a tenant these limits together."""
        flags = [text for name, limit in limits.items() for text in (f"--{name}", str(limit))]
        assert main(["keys", "limit", tenant, "--keys", str(self.path), *flags]) == 0
        self.reread()

    def reread(self) -> None:
        ring = self.bench.app.state.service.keys
        ring._next_look_s = 0.0  # the file's time, without the wait between two looks at it

    def chat(self, token: str, **fields: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        return self.bench.post("/v1/chat/completions", {**BODY, **fields}, headers=headers)


@pytest.fixture
def keyed(checkpoint: Path, tmp_path: Path) -> Keyed:
    return Keyed(checkpoint, tmp_path)


# --- who gets in ----------------------------------------------------------------------------------


def test_only_known_keys_get_in(keyed: Keyed) -> None:
    token = keyed.make(tenant="a")
    assert keyed.chat(token).status_code == 200
    for wrong in ("", "nk-wrong", token[:-1], hash_token(token)):
        response = keyed.chat(wrong)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    assert keyed.bench.get("/v1/models").status_code == 401
    assert keyed.bench.get("/health").status_code == 200


def test_the_file_never_holds_a_key(keyed: Keyed) -> None:
    token = keyed.make()
    assert token not in keyed.path.read_text()
    assert keyed.path.stat().st_mode & 0o077 == 0


def test_changes_count_without_a_restart(keyed: Keyed) -> None:
    token = keyed.make()
    assert keyed.chat(token).status_code == 200
    keyed.change(revoked_s=1)
    assert "revoked" in error_of(keyed.chat(token))["message"]
    keyed.change(revoked_s=None, expires_s=int(time.time()) - 1)
    assert "expired" in error_of(keyed.chat(token))["message"]
    keyed.change(expires_s=int(time.time()) + 60)
    assert keyed.chat(token).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b'{"keys": [{"id": "x"}]}', b'{"other": 1}'])
def test_a_file_that_broke_changes_nothing(keyed: Keyed, content: bytes) -> None:
    token = keyed.make()
    assert keyed.chat(token).status_code == 200
    keyed.path.write_bytes(content)
    keyed.reread()
    assert keyed.chat(token).status_code == 200
    keyed.path.unlink()
    keyed.reread()
    assert keyed.chat(token).status_code == 200


def test_a_bad_file_at_start_is_said(tmp_path: Path) -> None:
    tiers = TierSet()
    with pytest.raises(ConfigError, match="nitsum keys add"):
        KeyRing(tmp_path / "none.json", tiers)
    path = tmp_path / "keys.json"
    change_keys(path, lambda _: [Key(id="a", sha256="1", max_tier="gold")])
    with pytest.raises(ConfigError, match="gold"):
        KeyRing(path, tiers)
    with pytest.raises(ConfigError, match="two keys"):
        change_keys(path, lambda keys: [*keys, *keys])
    assert len(read_keys(path)) == 1


def test_the_single_key_still_opens_everything(checkpoint: Path, tmp_path: Path) -> None:
    keyed = Keyed(checkpoint, tmp_path, api_key="single")
    token = keyed.make(max_tier="flex")
    assert keyed.chat("single", service_tier="priority").json()["service_tier"] == "priority"
    assert keyed.chat(token, service_tier="priority").json()["service_tier"] == "flex"
    assert keyed.chat("other").status_code == 401


def test_sighup_reads_the_file_at_once(checkpoint: Path, tmp_path: Path) -> None:
    keyed = Keyed(checkpoint, tmp_path)
    token = keyed.make()
    headers = {"authorization": f"Bearer {token}"}

    async def main() -> None:
        async with served(keyed.bench) as url, httpx.AsyncClient(base_url=url) as http:
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
            keyed.change(revoked_s=1)
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.01)
            assert (await http.get("/v1/models", headers=headers)).status_code == 401

    asyncio.run(main())


# --- as what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_clamps_the_tier_and_says_so(keyed: Keyed, stream: bool) -> None:
    token = keyed.make(max_tier="default")
    response = keyed.chat(token, service_tier="priority", stream=stream)
    body = events_of(response)[0] if stream else response.json()
    assert body["service_tier"] == "default"
    assert "default at most" in response.headers["x-nitsum-reason"]
    request = keyed.bench.sent
    assert (request.tier, request.tier_asked) == ("default", "priority")


def test_less_than_allowed_is_not_clamped(keyed: Keyed) -> None:
    response = keyed.chat(keyed.make(max_tier="default"), service_tier="batch")
    assert response.json()["service_tier"] == "batch"
    assert "x-nitsum-reason" not in response.headers


def test_auto_is_the_keys_default(keyed: Keyed) -> None:
    token = keyed.make(default_tier="flex")
    assert keyed.chat(token).json()["service_tier"] == "flex"
    assert keyed.chat(token, service_tier="auto").json()["service_tier"] == "flex"
    assert keyed.chat(token, service_tier="priority").json()["service_tier"] == "priority"


def test_the_keys_reason_and_the_engines_are_both_told(checkpoint: Path, tmp_path: Path) -> None:
    engine = FakeEngineClient(tier=lambda request: ("flex", "over capacity"))
    keyed = Keyed(checkpoint, tmp_path, engine=engine)
    response = keyed.chat(keyed.make(max_tier="default"), service_tier="priority")
    reason = response.headers["x-nitsum-reason"]
    assert "default at most" in reason
    assert "over capacity" in reason


def test_fairness_is_between_tenants_not_between_names_a_client_invents(keyed: Keyed) -> None:
    keyed.chat(keyed.make(tenant="team"), user="someone else")
    assert keyed.bench.sent.tenant == "team"


# --- how much -------------------------------------------------------------------------------------


def test_requests_a_minute(keyed: Keyed) -> None:
    token = keyed.make(rpm=2)
    first = keyed.chat(token)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert keyed.chat(token).status_code == 200
    third = keyed.chat(token)
    assert (third.status_code, error_of(third)["code"]) == (429, "insufficient_quota")
    assert third.headers["x-should-retry"] == "false"
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < float(third.headers["retry-after-ms"]) <= 30_000
    assert len(keyed.bench.engine.requests) == 2
    assert keyed.chat(keyed.make()).status_code == 200, "other keys have their own"


def test_tokens_a_minute_count_prompt_and_answer(keyed: Keyed) -> None:
    token = keyed.make(tpm=10_000)
    usage = keyed.chat(token).json()["usage"]
    left = int(keyed.chat(token).headers["x-ratelimit-remaining-tokens"])
    spent = 10_000 - left
    # The second answer is not out when its headers are written, or is: both are fine.
    assert 2 * usage["prompt_tokens"] + usage["completion_tokens"] <= spent + 60
    assert spent <= 2 * usage["total_tokens"]
    keyed.change(tpm=5)
    error = error_of(keyed.chat(token))
    assert "5 tokens a minute" in error["message"], "a prompt that never fits says so"


def test_requests_at_a_time(checkpoint: Path, tmp_path: Path) -> None:
    keyed = Keyed(checkpoint, tmp_path, engine=FakeEngineClient(delay_s=60.0))
    token = keyed.make(concurrency=1)
    headers = {"authorization": f"Bearer {token}"}

    async def main() -> None:
        url = "/v1/chat/completions"
        first = asyncio.create_task(keyed.bench.acall("POST", url, BODY, headers=headers))
        while not keyed.bench.engine.requests:
            await asyncio.sleep(0.001)
        second = await keyed.bench.acall("POST", url, BODY, headers=headers)
        assert (second.status_code, error_of(second)["code"]) == (429, "rate_limit_exceeded")
        assert "x-should-retry" not in second.headers, "its turn comes"
        keyed.bench.engine.die()
        await first
        third = await keyed.bench.acall("POST", url, BODY, headers=headers)
        assert third.status_code == 503, "admitted again, by a dead engine"

    asyncio.run(main())


def test_a_budget_ends(checkpoint: Path, tmp_path: Path) -> None:
    keyed = Keyed(checkpoint, tmp_path, prices=Prices(1e6, 1e6))  # 1 a token
    token = keyed.make(budget=1.0)
    assert keyed.chat(token).status_code == 200, "nothing is spent yet"
    response = keyed.chat(token)
    assert (response.status_code, error_of(response)["code"]) == (429, "insufficient_quota")
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers
    keyed.change(budget=1e9)
    assert keyed.chat(token).status_code == 200


@pytest.mark.parametrize(("limit", "what"), [("rpm", "requests"), ("tpm", "tokens")])
def test_keys_of_a_tenant_share_its_minute(keyed: Keyed, limit: str, what: str) -> None:
    """Limits that count at once; a key's own stay beside them."""
    first, second = keyed.make(tenant="acme"), keyed.make(tenant="acme", rpm=100, tpm=10_000)
    other, alone = keyed.make(tenant="zeta"), keyed.make()
    num_prompt = keyed.chat(first).json()["usage"]["prompt_tokens"]
    keyed.limit("acme", **{limit: 1 if limit == "rpm" else num_prompt})
    assert keyed.chat(first).status_code == 200
    refused = keyed.chat(second)
    assert (refused.status_code, error_of(refused)["code"]) == (429, "insufficient_quota")
    assert "of tenant 'acme'" in error_of(refused)["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert float(refused.headers["retry-after-ms"]) > 0
    assert refused.headers[f"x-ratelimit-remaining-{what}"] == "0", "the tenant's: it is less"
    assert keyed.chat(other).status_code == keyed.chat(alone).status_code == 200
    keyed.limit("acme")
    assert keyed.chat(second).status_code == 200


def test_keys_of_a_tenant_share_its_requests_at_a_time() -> None:
    quotas = Quotas(lambda: 0.0, quota_of=lambda tenant: Tenant(name=tenant, concurrency=2))
    a, b = (Key(id=name, sha256=name, tenant="acme", concurrency=1) for name in "ab")
    c, other = Key(id="c", sha256="c", tenant="acme"), Key(id="d", sha256="d")
    quotas.admit(a, 1)
    with pytest.raises(ApiError, match="this key, 1 requests at a time"):
        quotas.admit(a, 1)
    quotas.admit(b, 1)
    for _ in range(3):
        quotas.admit(other, 1)
    with pytest.raises(ApiError, match="tenant 'acme', 2 requests at a time") as refused:
        quotas.admit(c, 1)
    assert (refused.value.code, refused.value.retry_after_s) == ("rate_limit_exceeded", 1.0)
    quotas.settle(a, 5)
    quotas.admit(c, 1)


def test_what_a_tenant_refuses_takes_nothing_from_the_key() -> None:
    quotas = Quotas(lambda: 0.0, quota_of=lambda tenant: Tenant(name=tenant, tpm=100))
    key = Key(id="k", sha256="", tenant="acme", rpm=60, tpm=1000)
    quotas.admit(key, 80)
    for _ in range(5):
        with pytest.raises(ApiError, match="100 tokens a minute of tenant 'acme'"):
            quotas.admit(key, 80)
    assert quotas.headers(key)["x-ratelimit-remaining-requests"] == "59"
    assert quotas.headers(key)["x-ratelimit-limit-tokens"] == "100"


def test_refused_work_takes_nothing_from_the_meters() -> None:
    now_s = 0.0
    quotas = Quotas(lambda: now_s)
    key = Key(id="k", sha256="", rpm=60, tpm=100)
    quotas.admit(key, 80)
    for _ in range(5):
        with pytest.raises(ApiError, match="tokens a minute"):
            quotas.admit(key, 80)
    assert quotas.headers(key)["x-ratelimit-remaining-requests"] == "59"
    quotas.settle(key, 50)
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "0", "overdrawn by the answer"
    now_s = 66.1
    quotas.admit(key, 80)
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "0"
    now_s = 1e6
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "100", "never more than a minute"
    assert quotas.headers(key)["x-ratelimit-reset-tokens"] == "0ms"


# --- the command ----------------------------------------------------------------------------------


def test_a_listed_id_is_whole_in_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = str(tmp_path / "keys.json")
    limits = ["--rpm", "600", "--tpm", "200000", "--concurrency", "64", "--budget", "50"]
    assert main(["keys", "add", "--keys", path, "--tenant", "acme", *limits]) == 0
    assert main(["keys", "list", "--keys", path]) == 0
    (key,) = read_keys(Path(path))
    assert f" {key.id} " in capsys.readouterr().out


def test_keys_are_made_listed_and_revoked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sub" / "keys.json"
    flags = ["--tenant", "t", "--max-tier", "flex", "--rpm", "5", "--expires", "30d"]
    assert main(["keys", "add", "--keys", str(path), *flags]) == 0
    token = capsys.readouterr().out.split()[-1]
    (key,) = read_keys(path)
    assert (key.tenant, key.max_tier, key.rpm, key.sha256) == ("t", "flex", 5, hash_token(token))
    assert key.expires_s is not None
    assert key.expires_s - time.time() == pytest.approx(30 * 86_400, abs=60)

    bench = Bench(checkpoint, keys=path).says("x")
    headers = {"authorization": f"Bearer {token}"}
    assert bench.post("/v1/chat/completions", BODY, headers=headers).status_code == 200
    assert main(["keys", "list", "--keys", str(path), "--json"]) == 0
    listed = msgspec.json.decode(capsys.readouterr().out)
    assert listed["keys"][0]["id"] == key.id
    assert listed["keys"][0]["sha256"] != key.sha256
    assert main(["keys", "limit", "t", "--keys", str(path), "--tpm", "900"]) == 0
    assert main(["keys", "limit", "nobody", "--keys", str(path), "--tpm", "900"]) == 2
    capsys.readouterr()
    assert main(["keys", "list", "--keys", str(path), "--json"]) == 0
    (tenant,) = msgspec.json.decode(capsys.readouterr().out)["tenants"]
    assert (tenant["name"], tenant["rpm"], tenant["tpm"]) == ("t", None, 900)
    assert main(["keys", "revoke", "--keys", str(path), key.id]) == 0
    assert main(["keys", "revoke", "--keys", str(path), "key_none"]) == 2
    bench.app.state.service.keys.reload()
    assert bench.post("/v1/chat/completions", BODY, headers=headers).status_code == 401
