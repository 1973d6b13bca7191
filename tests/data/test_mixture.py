"""Mixtures: exact shares in every block, random access, and whole epochs of every data set."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from scale_digrap.data.errors import DataError
from scale_digrap.data.loader import TrainLoader
from scale_digrap.data.mixture import Mixture, Stream, mix
from scale_digrap.data.plan import Plan
from tests.data import made


def stream(weights, samples, *, block=100, lanes=1, seed=3, epoch="all"):
    names = [str(i) for i in range(len(weights))]
    mixture = Mixture(dict.fromkeys(names), dict(zip(names, weights, strict=True)), block, epoch)
    plans = [Plan([n // 4] * 4, seed=seed + i, window=2, lanes=lanes) for i, n in enumerate(samples)]
    return Stream(plans, mixture.shares(), block, epoch, seed, lanes)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [0.5, 0.49, 0.01], [1 / 3, 1 / 7, 0.2]])
def test_shares_hold_in_every_block(weights):
    mixed = stream(weights, [40, 80, 20][: len(weights)])
    shares = np.array(weights) / sum(weights)
    draws = np.array([mixed.draw(q)[0] for q in range(20 * 100)]).reshape(20, 100)
    total = np.zeros(len(weights))
    for block in draws:
        counts = np.bincount(block, minlength=len(weights))
        assert np.abs(counts - 100 * shares).max() < 2
        total += counts
        assert np.abs(total - total.sum() * shares).max() < 1 + 1e-6, "errors do not add up"
    assert not np.array_equal(draws[0], draws[1])
    # inside a block they are spread, not one after the other
    assert np.abs(np.diff(draws[0])).astype(bool).sum() > 3


@pytest.mark.parametrize("lanes", [1, 2])
def test_every_data_set_is_gone_through_in_its_own_order(lanes):
    mixed = stream([0.6, 0.4], [40, 80], lanes=lanes)
    seen = [[], []]
    for q in range(2000):
        source, shard, number = mixed.at(q)
        seen[source].append((shard, number))
    for source, plan in enumerate(mixed.plans):
        assert seen[source] == [plan.at(k) for k in range(len(seen[source]))]
        assert len(seen[source]) > 2 * plan.samples


def test_access_in_any_order_is_the_same():
    straight = [stream([0.2, 0.5, 0.3], [40, 80, 20]).at(q) for q in range(1500)]
    other = stream([0.2, 0.5, 0.3], [40, 80, 20])
    for q in np.random.default_rng(1).integers(0, 1500, 300).tolist():
        assert other.at(q) == straight[q]
    far = 10**12 + 12345
    assert other.at(far) == stream([0.2, 0.5, 0.3], [40, 80, 20]).at(far)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_lanes_stay_lanes_in_a_mixture(lanes):
    mixed = stream([0.6, 0.4], [160, 80], lanes=lanes)
    for q in range(600):
        source, shard, _ = mixed.at(q)
        assert shard in mixed.plans[source]._lanes[q % lanes].tolist()


def test_draws_are_counted_without_drawing():
    mixed = stream([0.2, 0.5, 0.3], [40, 80, 20], lanes=2)
    counts = Counter()
    for q in range(900):
        assert mixed.drawn(q) == [counts[source] for source in range(3)]
        counts[mixed.draw(q)[0]] += 1


def test_length_is_when_the_first_or_the_last_data_set_was_seen_whole():
    for epoch, pick in (("all", max), ("first", min)):
        mixed = stream([0.5, 0.5], [400, 100], epoch=epoch)
        ends = []
        for source, plan in enumerate(mixed.plans):
            count = 0
            for q in range(3000):
                count += mixed.draw(q)[0] == source
                if count == plan.samples:
                    ends.append(q + 1)
                    break
        assert len(mixed) == pick(ends)


def test_weights_that_cannot_be_met_are_refused():
    with pytest.raises(DataError, match=r"'b' has a share of 0\.0005, less than one draw in a block of 1000"):
        Mixture({"a": 0, "b": 0}, {"a": 0.9995, "b": 0.0005}).shares()
    for weight in (0, -1, float("nan"), float("inf"), "1"):
        with pytest.raises(DataError, match="must be a positive number"):
            Mixture({"a": 0}, {"a": weight}).shares()
    with pytest.raises(DataError, match="a weight for each"):
        Mixture({}, {}).shares()
    with pytest.raises(DataError, match="epoch one of"):
        Mixture({"a": 0}, {"a": 1}, epoch="never").shares()
    with pytest.raises(DataError, match="as many different names"):
        mix([(0, 1), (1, 1)], names=["a", "a"])
    assert Mixture({"a": 0, "b": 0}, {"a": 2, "b": 1}).shares() == [Fraction(2, 3), Fraction(1, 3)]


def test_a_loader_over_a_mixture_resumes_and_reports(tmp_path):
    shards = {}
    for name, count in (("x", 20), ("y", 30)):
        (tmp_path / name).mkdir()
        shards[name] = made.write(tmp_path / name, count, per_shard=5, text_only=None)

    def loader(**options):
        mixture = mix([(shards["x"], 0.75), (shards["y"], 0.25)], names=["x", "y"], block=8)
        return TrainLoader(
            mixture, batch_size=4, collate=lambda samples: [(s.key, len(s.extra)) for s in samples], **options
        )

    whole = made.take(loader(), 30)
    first = loader()
    assert made.take(first, 11) == whole[:11]
    state = first.state_dict()
    assert first.epochs() == {"x": pytest.approx(33 / 20), "y": pytest.approx(11 / 30)}
    second = loader(workers=2)
    second.load_state_dict(state)
    assert made.take(second, 19) == whole[11:]
    ranks = [loader(dp_rank=rank, dp_world_size=3) for rank in range(3)]
    for rank in ranks:
        rank.load_state_dict(state)
    shares = [made.flat(made.take(rank, 6)) for rank in ranks]
    assert made.flat(zip(*shares, strict=True)) == made.flat(whole[11:])[:72]
    other = TrainLoader(mix([(shards["x"], 0.5), (shards["y"], 0.5)], block=8), batch_size=4, collate=made.numbers)
    with pytest.raises(DataError, match=r"cannot resume the data: \w+ was"):
        other.load_state_dict(state)
