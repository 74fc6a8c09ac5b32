"""What a server says of a rank that is ready."""

from __future__ import annotations

from nitsum.engine.process_executor import ready_sentence
from nitsum.messages import Ready


def test_every_part_of_a_start_is_told() -> None:
    ready = Ready(1, 100, {"load": 1.25, "map": 0.5, "warm_up": 3.0}, {})
    assert ready_sentence(ready, 2, 2, 6.06) == (
        "Rank 1 is ready after 6.1 s (2 of 2): process 1.3, load 1.2, map 0.5, warm up 3.0."
    )
