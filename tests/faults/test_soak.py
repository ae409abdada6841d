"""A short round of the soak: random faults on real servers, then everything adds up."""

from __future__ import annotations

from pathlib import Path

from tests import soak


def test_a_short_soak(tmp_path: Path) -> None:
    report = soak.run(0.4, seed=7, every_s=1.5, folder=tmp_path)
    print(report)
    assert soak.problems(report) == {}
    assert report["faults"] > 5
    assert report["jobs"] > 1
    assert report["items"] == report["commits"] * soak.SHARD_SIZE
