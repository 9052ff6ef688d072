"""Views and their size."""

import pytest

from elastic_run.runtime.protocol import codec
from elastic_run.runtime.protocol.ids import Incarnation, LogicalRank, NodeId, ViewNumber
from elastic_run.runtime.protocol.view import Hosting, Member, Placement, View, ViewStatus


def view_of(*nprocs: int) -> View:
    members = tuple(
        Member(node=NodeId(f"gpu-node-{i:05d}"), incarnation=Incarnation(f"{i:012x}"), address="10.123.45.67", nproc=n)
        for i, n in enumerate(nprocs)
    )
    return View(
        number=ViewNumber(3),
        status=ViewStatus.PROPOSED,
        members=members,
        restart_count=0,
        reason="r",
        proposed_at=0.0,
    )


def test_a_view_of_ten_thousand_single_worker_nodes_fits_one_etcd_value() -> None:
    assert len(codec.encode(view_of(*[1] * 10_000))) < codec.DOCUMENT_BYTES_MAX


def test_ranks_are_dealt_out_by_group_rank_without_gap() -> None:
    placement = Placement.of(view_of(2, 1, 3))
    hosts = [placement.host(LogicalRank(rank)) for rank in range(placement.world_size)]
    assert hosts == [Hosting(0, 0), Hosting(0, 1), Hosting(1, 0), Hosting(2, 0), Hosting(2, 1), Hosting(2, 2)]
    with pytest.raises(IndexError):
        placement.host(LogicalRank(6))


def test_a_node_is_a_member_once() -> None:
    view = view_of(1)
    with pytest.raises(ValueError, match="twice"):
        View(
            number=view.number,
            status=view.status,
            members=view.members * 2,
            restart_count=0,
            reason="",
            proposed_at=0.0,
        )
