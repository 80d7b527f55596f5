"""An expert's distance from the seed is published, so it is the same for any number of threads."""

from __future__ import annotations

from pathlib import Path

import torch

from btx.checkpoints.reader import one_thread, opened
from btx.merge.lineage import distance, distances
from tests.support.models import config_of, save_model


def test_distances_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    config = config_of("llama", hidden_size=256, intermediate_size=640)
    seed, other = (save_model(tmp_path / f"m{noise}", config, noise=noise) for noise in (0.0, 0.01))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with opened(seed) as a, opened(other) as b:
                found += distances(a, {str(name): b for name in range(8)}).values()
                with one_thread():
                    found.append(distance(a, b))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 27
    assert all(one == found[0] for one in found)
    assert 0 < found[0]["change"] < 1
