"""An agent whose calls form a chain: one id, one deadline for all of them.

What slack remains is passed on: a late call of the chain is served sooner, and the prefix that the
calls share stays cached between them.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

import openai

URL = os.environ.get("NITSUM_URL", "http://127.0.0.1:8000")
DEADLINE_S = 60.0
QUESTIONS = ("Name a river.", "Where does it begin?", "Where does it end?")


def main() -> None:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("NITSUM_API_KEY", "none"))
    model = client.models.list().data[0].id
    chain, started_s = f"chain-{uuid.uuid4().hex[:8]}", time.monotonic()
    messages: list[Any] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        left_s = DEADLINE_S - (time.monotonic() - started_s)
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=24,
            extra_headers={
                "x-nitsum-chain-id": chain,
                "x-nitsum-chain-deadline-ms": str(max(1, round(left_s * 1000))),
            },
        )
        text = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        cached = answer.usage.prompt_tokens_details.cached_tokens
        print(f"{question} {text!r} ({cached} of {answer.usage.prompt_tokens} tokens were cached)")
    print(f"{chain}: {len(QUESTIONS)} calls in {time.monotonic() - started_s:.1f} s")


if __name__ == "__main__":
    main()
