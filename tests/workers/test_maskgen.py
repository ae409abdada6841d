"""The masks of everything: grids, crops and tidying as segment-anything has them, for any size of picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils import amg

from storage import rle
from workers import maskgen, masks
from workers.maskgen import Candidate, Params


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (97, 61), (180, 320), (1023, 777)])
@pytest.mark.parametrize(
    "params",
    [
        Params(),
        Params(points_per_side=5, crop_n_layers=1),
        Params(points_per_side=17, crop_n_layers=3, crop_n_points_downscale_factor=2),
        Params(points_per_side=8, crop_n_layers=2, crop_overlap_ratio=0.0),
        Params(points_per_side=8, crop_n_layers=2, crop_overlap_ratio=1.0),
    ],
    ids=str,
)
def test_the_same_crops_and_points(size: tuple[int, int], params: Params) -> None:
    """But for crops without pixels, which are left out."""
    boxes, layers = amg.generate_crop_boxes(size, params.crop_n_layers, params.crop_overlap_ratio)
    grids = amg.build_all_layer_point_grids(
        params.points_per_side, params.crop_n_layers, params.crop_n_points_downscale_factor
    )
    expected = [(box, grids[layer]) for box, layer in zip(boxes, layers, strict=True)]
    expected = [((x1, y1, x2, y2), grid) for (x1, y1, x2, y2), grid in expected if x1 < x2 and y1 < y2]
    got = maskgen.crops(size, params)
    assert [crop for crop, _ in got] == [box for box, _ in expected]
    for (_, points), ((x1, y1, x2, y2), grid) in zip(got, expected, strict=True):
        assert np.allclose(points, grid * [x2 - x1, y2 - y1], rtol=1e-12)


def test_the_same_masks_after_tidying() -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for density in (0.3, 0.5, 0.62, 0.9):
        for area in (1, 3, 12, 4000):
            found = rng.random((40, 60)) < density
            found[5:20, 5:30] |= rng.random((15, 25)) < 0.9
            filled, holes = amg.remove_small_regions(found, area, mode="holes")
            tidied, islands = amg.remove_small_regions(filled, area, mode="islands")
            (mask,) = masks.coded(torch.from_numpy(found)[None])
            candidate = Candidate(mask, 0.5, (0, 0, 60, 40))
            got = maskgen._tidied(candidate, (40, 60), area)
            assert (got is not candidate) == (holes or islands)
            assert np.array_equal(rle.decode(got.mask.rle, (40, 60)), tidied)
            changed += holes or islands
    assert changed > 5


def test_of_doubles_the_one_that_needed_no_tidying_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's postprocess_small_regions, on masks of nearly one box."""
    found = np.zeros((3, 60, 80), bool)
    found[0, 10:40, 10:50] = True
    found[0, 20:22, 20:22] = False  # a hole, in the mask that is rated best
    found[1, 10:41, 10:50] = True
    found[2, 30:58, 40:78] = True
    found[2, 1:3, 1:3] = True  # an island
    boxes = torch.from_numpy(found)
    data = amg.MaskData(rles=amg.mask_to_rle_pytorch(boxes), boxes=amg.batched_mask_to_box(boxes), at=torch.arange(3))
    expected = SamAutomaticMaskGenerator.postprocess_small_regions(data, 30, 0.7)
    size, crop = (60, 80), (0, 0, 80, 60)
    candidates = [Candidate(m, r, crop) for m, r in zip(masks.coded(boxes), (0.9, 0.8, 0.7), strict=True)]
    params = Params(min_mask_region_area=30, box_nms_thresh=1.0, crop_nms_thresh=0.0)
    kept = maskgen.without_doubles(candidates, size, params)
    assert [c.rating for c in kept] == [0.8, 0.9, 0.7]  # nothing overlaps by more than 1
    params = Params(min_mask_region_area=30, box_nms_thresh=0.98, crop_nms_thresh=0.0)
    assert len(maskgen.without_doubles(candidates, size, params)) == 3
    # Let the doubles through the first look, at their ratings, and not the last.
    before = maskgen._suppressed
    looks = iter([lambda c, scores, threshold: list(c), before])
    monkeypatch.setattr(maskgen, "_suppressed", lambda *given: next(looks)(*given))
    kept = maskgen.without_doubles(candidates, size, Params(min_mask_region_area=30, box_nms_thresh=0.7))
    assert [c.rating for c in kept] == [[0.9, 0.8, 0.7][i] for i in expected["at"].tolist()] == [0.8, 0.7]
    assert [c.mask.area for c in kept] == [sum(one["counts"][1::2]) for one in expected["rles"]]
