"""A batch job: a file of requests in, a file of answers out, served when there is room."""

from __future__ import annotations

import json
import os
import time

import openai

URL = os.environ.get("NITSUM_URL", "http://127.0.0.1:8000")
RIVERS = ("Rhine", "Danube", "Elbe")


def line(name: str, model: str) -> str:
    message = {"role": "user", "content": f"Say one thing about the river {name}."}
    body = {"model": model, "messages": [message], "max_tokens": 16}
    request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(request)


def main() -> None:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("NITSUM_API_KEY", "none"))
    model = client.models.list().data[0].id
    lines = "\n".join(line(name, model) for name in RIVERS)
    file = client.files.create(file=("rivers.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.output_file_id is not None
    for answer in client.files.content(batch.output_file_id).text.splitlines():
        found = json.loads(answer)
        text = found["response"]["body"]["choices"][0]["message"]["content"]
        print(f"{found['custom_id']}: {text!r}")


if __name__ == "__main__":
    main()
