"""What is said of a load before and while it is sent, and how its flags are read."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from nitsum.bench.load import LoadState
from nitsum.cli.loading import add_workload_arguments, load_words, progress_words
from nitsum.cli.readers import weights
from nitsum.workload.items import Segment, WorkItem


def parser() -> ArgumentParser:
    found = ArgumentParser("test")
    add_workload_arguments(found)
    return found


def test_what_is_sent_and_until_when_is_said() -> None:
    items = [WorkItem(f"{i}", i, 50, "default", "", (Segment(f"{i}", 600),)) for i in range(30)]
    words = load_words("mix:own", items, 60.0, None)
    assert words.startswith(
        "Sending mix:own: 30 requests in 60 s (0.5/s), 18,000 prompt and 1,500 "
    )
    assert "once all are answered, however late (--drain" in words
    assert load_words("mix:own", items, 60.0, 5.0).endswith("It ends 5 s later at most.")


def test_progress_is_short_and_tells_of_trouble() -> None:
    state = LoadState(num_sent=36, num_open=2, num_done=33, num_tokens=1200)
    assert progress_words(state, is_all_sent=False) == "sent 36, open 2, done 33, 1200 tokens"
    state.num_failed = 1
    assert progress_words(state, is_all_sent=True) == (
        "all sent, open 2, done 33, failed 1, 1200 tokens"
    )


def test_help_tells_defaults() -> None:
    actions = [action for action in parser()._actions if action.nargs != 0]
    silent = [a.dest for a in actions if a.default and "default: " not in (a.help or "")]
    assert len(actions) > 10
    assert silent == []


def test_weights_of_tiers_come_from_a_file_too(tmp_path: Path) -> None:
    """As `nitsum simulate --tiers` reads them."""
    path = tmp_path / "weights.yaml"
    path.write_text("{priority: 1, default: 3}\n")
    args = parser().parse_args(["--tiers", str(path)])
    assert dict(args.tiers) == {"priority": 1.0, "default": 3.0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("streams: []\n", "--trace mix:FILE"),
        ("- {name: gold, level: 0}\n", "for `nitsum serve --tiers`"),
        ("just words\n", "such as priority=1,default=3"),
    ],
)
def test_other_files_say_where_they_belong(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="weights by tier are expected"):
        weights(str(path))
    with pytest.raises(SystemExit):
        parser().parse_args(["--tiers", str(path)])
    assert said in capsys.readouterr().err
