"""Layout: every cluster up to eight nodes of eight GPUs, every tensor degree that fits."""

from __future__ import annotations

import itertools

import pytest

from hpcft.errors import Refusal
from hpcft.plan.layout import Axis, Layout


def every_layout() -> list[Layout]:
    layouts = []
    for nodes, per_node in itertools.product(range(1, 9), range(1, 9)):
        for tp in (degree for degree in range(1, per_node + 1) if per_node % degree == 0):
            rest = nodes * per_node // tp
            layouts.append(Layout(nodes, per_node, (Axis("dp", rest), Axis("tp", tp))))
            if rest % nodes == 0 and nodes > 1:  # replicas over nodes of a model sharded inside them
                axes = (Axis("dp_replicate", nodes), Axis("dp_shard", rest // nodes), Axis("tp", tp))
                layouts.append(Layout(nodes, per_node, axes))
    return layouts


LAYOUTS = every_layout()


def test_places_are_a_permutation_of_nodes_times_local_ranks_in_block_order() -> None:
    for layout in LAYOUTS:
        places = [layout.place(rank) for rank in range(layout.world_size)]
        assert [place.rank for place in places] == list(range(layout.world_size))
        expected = list(itertools.product(range(layout.nodes), range(layout.ranks_per_node)))
        assert [(place.node, place.local_rank) for place in places] == expected


def test_coordinates_name_every_rank_once_within_their_degrees() -> None:
    for layout in LAYOUTS:
        coordinates = [tuple(layout.place(rank).coordinates.values()) for rank in range(layout.world_size)]
        assert sorted(coordinates) == sorted(itertools.product(*(range(axis.degree) for axis in layout.axes)))


def test_the_groups_of_each_axis_partition_the_world_into_groups_of_its_degree() -> None:
    for layout in LAYOUTS:
        for axis in layout.axes:
            groups = layout.groups(axis.name)
            assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
            assert {len(group) for group in groups} == {axis.degree}


def test_two_axes_meet_in_one_rank_at_most() -> None:
    for layout in LAYOUTS:
        for one, other in itertools.combinations(layout.axes, 2):
            for group, across in itertools.product(layout.groups(one.name), layout.groups(other.name)):
                assert len(set(group) & set(across)) <= 1


def test_a_tensor_group_is_made_of_neighbours_in_one_node() -> None:
    for layout in LAYOUTS:
        for group in layout.groups("tp"):
            assert list(group) == list(range(group[0], group[0] + len(group)))
            assert len({layout.place(rank).node for rank in group}) == 1


def test_ranks_of_one_tensor_group_read_the_same_data_and_the_groups_differ() -> None:
    for layout in LAYOUTS:
        readers = [{layout.data_coordinate(rank) for rank in group} for group in layout.groups("tp")]
        assert all(len(one) == 1 for one in readers)
        assert sorted(one.pop() for one in readers) == list(range(layout.data_parallel))


@pytest.mark.parametrize(("nodes", "per_node", "dp", "tp"), [(2, 4, 4, 1), (1, 8, 2, 2), (3, 1, 2, 1)])
def test_axes_that_do_not_multiply_to_the_ranks_are_refused_with_the_arithmetic(
    nodes: int, per_node: int, dp: int, tp: int
) -> None:
    with pytest.raises(Refusal, match=rf"dp {dp} × tp {tp} = {dp * tp}.*= {nodes * per_node} ranks"):
        Layout(nodes, per_node, (Axis("dp", dp), Axis("tp", tp)))


def test_a_tensor_axis_that_would_leave_its_node_is_refused_with_the_degrees_that_stay() -> None:
    with pytest.raises(Refusal) as caught:
        Layout(3, 6, (Axis("dp", 2), Axis("tp", 9)))
    assert caught.value.problems[0].choices == ("1", "2", "3", "6")


@pytest.mark.parametrize("rank", [-1, 8, 1000])
def test_a_rank_outside_the_world_has_no_place(rank: int) -> None:
    with pytest.raises(IndexError):
        Layout(2, 4, (Axis("dp", 8),)).place(rank)


def test_ten_thousand_ranks_are_laid_out_at_once() -> None:
    layout = Layout(1250, 8, (Axis("dp", 1250), Axis("tp", 8)))
    assert layout.place(9999).node == 1249
    assert len(layout.groups("tp")) == 1250
