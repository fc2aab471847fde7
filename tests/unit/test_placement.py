"""Who speaks for which generator, and who exchanges samples with whom."""

from hypothesis import given
from hypothesis import strategies as st

from megarl.parallel.layout import ParallelLayout
from megarl.rollout.children import devices_of
from megarl.rollout.placement import GeneratorLayout

small = st.integers(1, 3)


@given(tensor=small, pipeline=small, data=small, per_host=st.integers(1, 6), replicas=small)
def test_groups_are_closed_and_everybody_is_in_one(tensor, pipeline, data, per_host, replicas):
    world = tensor * pipeline * data
    training = ParallelLayout(tensor, pipeline, world)
    hosts = [f"host{rank // per_host}" for rank in range(world)]
    layout = GeneratorLayout.on_hosts(training, hosts, replicas)
    groups = layout.groups()
    assert sorted(rank for group in groups for rank in group) == list(range(world))
    assert layout.num_replicas == replicas * len(set(hosts))
    for group in groups:
        for rank in group:
            assert set(training.at(rank).ranks_along("model")) <= set(group)
            assert {other for other in range(world) if hosts[other] == hosts[rank]} <= set(group)
        assert len(layout.replicas_in(group)) == replicas * len({hosts[rank] for rank in group})
    spoken_for = [replica for rank in range(world) for replica in GeneratorLayout.on_hosts(training.at(rank), hosts, replicas).spoken_for]
    assert spoken_for == list(range(layout.num_replicas))


def test_models_that_fit_a_host_exchange_nothing_between_hosts():
    layout = GeneratorLayout.on_hosts(ParallelLayout(2, 1, 8, rank=5), ["a"] * 4 + ["b"] * 4, 1)
    assert layout.groups() == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.group == (4, 5, 6, 7) and layout.replicas_in(layout.group) == (1,) and layout.data_ranks_in(layout.group) == (2, 3)
    assert layout.spoken_for == () and GeneratorLayout.on_hosts(layout.training.at(4), ["a"] * 4 + ["b"] * 4, 1).spoken_for == (1,)


def test_generators_elsewhere_report_to_the_first_rank():
    layout = GeneratorLayout.elsewhere(ParallelLayout(1, 2, 4, rank=0), 3)
    assert layout.spoken_for == (0, 1, 2) and layout.groups() == ((0, 1, 2, 3),)
    assert GeneratorLayout.elsewhere(ParallelLayout(1, 2, 4, rank=1), 3).spoken_for == ()


def test_generators_take_the_devices_behind_the_trainers():
    assert [devices_of(replica, 2, 4, 8) for replica in (0, 1)] == [(4, 5), (6, 7)]
    assert devices_of(0, 2, 1, 1) == (0, 0)  # one GPU for all
    assert devices_of(1, 1, 2, 0) == (0,)
