"""HTTP in, tokens out: OpenAI's API, the tokenizer, tiers, streams, metrics."""
