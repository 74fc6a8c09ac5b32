"""Two tiers at once: people who wait for an answer, and work in the background."""

from __future__ import annotations

import json

from locust import HttpUser, between, task


class Caller(HttpUser):
    abstract = True
    tier = ""
    num_tokens = 8

    def ask(self) -> None:
        body = {
            "messages": [{"role": "user", "content": "Name a river."}],
            "max_tokens": self.num_tokens,
            "service_tier": self.tier,
            "stream": True,
        }
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name=self.tier
        ) as answer:
            self.judge(answer)

    def judge(self, answer) -> None:
        if answer.status_code == 429 and "retry-after-ms" in answer.headers:
            answer.success()  # refused as it should be
            return
        lines = [line for line in answer.iter_lines() if line]
        if answer.status_code != 200 or lines[-1] != b"data: [DONE]":
            answer.failure(f"{answer.status_code}: {lines[-1:]}")
            return
        tiers = {json.loads(line[6:])["service_tier"] for line in lines[:-1]}
        if not tiers <= {self.tier, "default"}:
            answer.failure(f"served as {tiers}")


class Person(Caller):
    tier = "priority"
    wait_time = between(0.5, 1.5)
    weight = 2

    @task
    def chat(self) -> None:
        self.ask()


class Background(Caller):
    tier = "flex"
    num_tokens = 24
    wait_time = between(0, 0.1)
    weight = 3

    @task
    def work(self) -> None:
        self.ask()
