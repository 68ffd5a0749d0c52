"""What is fair beside busy loops."""

import pytest

from benchmarks.crowded import fair_share, report


@pytest.mark.parametrize(
    ("threads", "loops", "cores", "share"),
    [
        (2, 0, 2, 1.0),
        (2, 1, 2, 2 / 3),
        (2, 4, 2, 1 / 3),
        (1, 1, 2, 1.0),  # each has a core
        (1, 3, 2, 1 / 2),
        (4, 4, 2, 1 / 2),
        (2, 6, 8, 1.0),
    ],
)
def test_the_share_is_by_threads(threads: int, loops: int, cores: int, share: float) -> None:
    assert fair_share(threads, loops, cores) == pytest.approx(share)


def test_rates_are_held_against_those_alone() -> None:
    found = {(8, 1): [50.0, 40.0, 60.0], (8, 0): [100.0, 90.0, 110.0]}
    alone, beside = report(found, threads=2, cores=2)
    assert (alone["of_alone"], alone["of_fair_share"]) == (1.0, 1.0)
    assert (beside["of_alone"], beside["fair_share"], beside["of_fair_share"]) == (
        0.5,
        0.667,
        0.75,
    )
