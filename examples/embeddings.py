"""Which note is nearest to a question: vectors as background work, compared by their product.

A chat model compares texts only so well; serve a model that was trained for it, and the rest stays.
"""

from __future__ import annotations

import os

import openai

URL = os.environ.get("NITSUM_URL", "http://127.0.0.1:8000")
NOTES = ["The Rhine flows into the North Sea.", "Bread needs flour, water, salt and time."]
QUESTION = "Where does the Rhine end?"


def main() -> None:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("NITSUM_API_KEY", "none"))
    model = client.models.list().data[0].id
    answer = client.embeddings.create(model=model, input=[*NOTES, QUESTION])
    *notes, question = (one.embedding for one in answer.data)
    for text, note in zip(NOTES, notes, strict=True):
        print(f"{product(note, question):.3f}  {text}")
    print(f"{answer.usage.prompt_tokens} tokens, vectors of {len(question)} numbers")


def product(a: list[float], b: list[float]) -> float:
    """The cosine of the angle between them, since both have length 1."""
    return sum(x * y for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
