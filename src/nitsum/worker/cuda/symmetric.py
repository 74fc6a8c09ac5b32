"""Memory that peers map: process groups for the exchange of handles, and buffers over them.

Everything here is made at start, by all ranks, in one order, and lives as long as the process:
graphs hold its addresses, and destroying a group after capture can hang.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nitsum.plan import Group

OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Set to 1, several ranks may share a GPU: slow, and good for nothing but tests."""


def prepare_environment() -> None:
    """To be called before any device work of the process.

    Multicast objects are never made: nothing here needs them, and on shared hosts a process that
    dies with one can take the other GPUs' fabric down with it.
    """
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["TORCH_SYMMMEM_IMPLICIT_POOL"] = "0"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def ranks_share_devices() -> bool:
    return os.environ.get(OVERLAPPING) == "1"


@dataclass(frozen=True)
class Shared:
    """One buffer a rank, all of one shape; `peers[i]` is the i-th member's, `own` this rank's."""

    own: torch.Tensor
    peers: tuple[torch.Tensor, ...]
    handle: Any
    """What keeps the mappings alive, and makes barriers; None where there is one rank."""
    group_name: str = ""

    def addresses(self) -> torch.Tensor:
        """[members] int64 on the device: where each member's buffer begins."""
        pointers = [peer.data_ptr() for peer in self.peers]
        return torch.tensor(pointers, dtype=torch.int64, device=self.own.device)


class SymmetricMemory:
    """Groups of one generation, and what is allocated over them."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        groups: Sequence[Group],
        device: torch.device,
        folder: Path,
        timeout_s: float,
    ) -> None:
        """Meets all other ranks over a file in `folder`; waits up to `timeout_s` for them."""
        self._rank = rank
        self._device = device
        self._world: Any = None
        self._groups: dict[Group, Any] = {}
        self._kept: list[Shared] = []
        if num_ranks == 1:
            return
        store = dist.FileStore(  # pyright: ignore[reportPrivateImportUsage]
            str(folder / "store"), num_ranks
        )
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout
        )
        self._world = dist.group.WORLD
        for group in groups:
            if group.degree > 1:
                self._groups[group] = dist.new_group(list(group.ranks), backend="gloo")

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, group: Group | None) -> Shared:
        """Zeros on every member of `group` (None: on all ranks), mapped by every member.

        Collective over the group, and in one order for all that a rank is in.
        """
        members = self._world if group is None else self._groups.get(group)
        if members is None:
            own = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
            return self._keep(Shared(own, (own,), None))
        return self._keep(self._map(shape, dtype, members))

    def barrier(self, group: Group | None = None) -> None:
        """All hosts of the group (None: of all ranks) meet."""
        members = self._world if group is None else self._groups.get(group)
        if members is not None:
            dist.barrier(members)

    def smallest(self, value: int) -> int:
        """The least `value` any rank gave."""
        if self._world is None:
            return value
        given = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(given, op=dist.ReduceOp.MIN)
        return int(given)

    def _map(self, shape: Sequence[int], dtype: torch.dtype, members: Any) -> Shared:
        import torch.distributed._symmetric_memory as symm

        own = symm.empty(tuple(shape), dtype=dtype, device=self._device)
        own.zero_()
        torch.cuda.synchronize(self._device)
        handle = symm.rendezvous(own, members)
        peers = tuple(
            own if member == handle.rank else handle.get_buffer(member, tuple(shape), dtype)
            for member in range(handle.world_size)
        )
        assert all(peer.numel() == prod(shape) for peer in peers)
        return Shared(own, peers, handle, members.group_name)

    def _keep(self, shared: Shared) -> Shared:
        self._kept.append(shared)
        return shared
