"""The obeying loop of a GPU rank: take what has arrived, launch it, report what is done."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Protocol

import torch

from nitsum.messages import FromWorker, Shutdown, to_worker_decoder
from nitsum.worker.cuda.runner import POLL_S, CudaRunner

_PR_SET_TIMERSLACK = 29


class Link(Protocol):
    """The worker's sockets."""

    def receive(self) -> bytes: ...

    def receive_now(self) -> bytes | None: ...

    def send(self, reply: FromWorker) -> None: ...


@torch.inference_mode()
def obey_until_shutdown(runner: CudaRunner, link: Link) -> None:
    """Sleeps only when there is nothing under way, or nothing new to see."""
    _sharpen_timers()
    while True:
        raw = link.receive() if runner.is_idle else link.receive_now()
        if raw is not None:
            message = to_worker_decoder.decode(raw)
            if isinstance(message, Shutdown):
                return
            for _ in runner.obey(message):
                _report(runner, link)
        if not _report(runner, link) and raw is None:
            time.sleep(POLL_S)


def _report(runner: CudaRunner, link: Link) -> int:
    """Send what is done by now; how many replies that were."""
    num_sent = 0
    for reply in runner.finished():
        link.send(reply)
        num_sent += 1
    return num_sent


def _sharpen_timers() -> None:
    """Linux rounds short sleeps up by 50 microseconds unless told not to."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
