"""Where a rank stands: tensor-, data- and pipeline-parallel coordinates and groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Axis:
    """This rank's place along one kind of parallelism."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Global rank 0 is first along every axis."""

    tp: Axis
    dp: Axis
    pp: Axis
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    @property
    def vocab_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the vocabulary; None when this rank has all of it."""
        return self.tp.group if self.tp.size > 1 else None


_groups_of: tuple[dist.ProcessGroup | None, int, int] | None = None


def can_share_groups(tp_size: int, pp_size: int) -> bool:
    """Whether the policy made before in this process left groups of these sizes; if not, new ones are noted.

    Groups are never freed, and with gloo each has threads of its own: a process that makes many policies, one run after
    another, would fill up with them.
    """
    global _groups_of
    wanted = (dist.group.WORLD, tp_size, pp_size)  # groups end with the world that they are parts of
    if _groups_of is not None and _groups_of[0] is wanted[0] and _groups_of[1:] == wanted[1:]:
        return True
    _groups_of = wanted
    return False


def all_gather_cat(part: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """The equally shaped parts of all ranks of `group`, joined along `dim` in rank order. Collective."""
    return torch.cat(all_gather_list(part, group), dim=dim)


def all_gather_list(part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
