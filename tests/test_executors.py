from pathlib import Path

import pytest

from w2v2.preparation.config import PrepareConfig
from w2v2.preparation.executors import RayExecutor
from w2v2.preparation.run import prepare


def test_ray_prepares_the_same_corpus(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="an optional extra of 200 MB")
    config = PrepareConfig(shards="flac", shard_mb=0.5)
    here = prepare(corpus, tmp_path / "here", config)
    with RayExecutor("local") as executor:
        there = prepare(corpus, tmp_path / "there", config, executor=executor)
    assert there["content_hash"] == here["content_hash"]
    assert there["splits"] == here["splits"]
