"""OpenAI's client with tiers: what was asked for, what was served, and why."""

from __future__ import annotations

import os

import openai

URL = os.environ.get("NITSUM_URL", "http://127.0.0.1:8000")


def main() -> None:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("NITSUM_API_KEY", "none"))
    model = client.models.list().data[0].id
    for tier in ("priority", "default", "flex"):
        answer = client.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": "Name a river."}],
            max_tokens=16,
            service_tier=tier,
        )
        served = answer.parse()
        print(f"asked {tier}, served {served.service_tier}", end="")
        print(f" on {answer.headers['x-nitsum-lane']} of {answer.headers['x-nitsum-plan']}", end="")
        print(f" after {answer.headers['x-nitsum-queue-ms']} ms in the queue", end="")
        reason = answer.headers.get("x-nitsum-reason")
        print(f" ({reason})" if reason else "")
        print("   ", served.choices[0].message.content)


if __name__ == "__main__":
    main()
