"""What is YOLO's own: ultralytics' loader reads it back, whatever the keys are called."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset

from storage import exporters, settings
from storage.errors import BadInput
from storage.exporters import Report
from storage.exporters.yolo import _Names, _safe
from storage.objects import open_store
from storage.shardfile import Outcome
from tests.storage.exporters.support import (
    LABELS,
    Mill,
    detected,
    detection,
    download,
    failed,
    found,
    provenance,
    shards,
)

KEYS = (
    "a.jpg",
    "a.png",
    "a.webp",
    "a.png.jpg",
    "images/deep/images/a.jpg",
    ".hidden/.b.jpg",
    "with space, comma/ünï 猫😀.jpg",
    "v1.2/c.d.jpeg",
    "old.jfif",
    "UPPER.JPG",
    "n" * 240 + ".jpg",
)


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    made = Mill(f"sqlite:///{tmp_path / 'index.db'}", open_store((tmp_path / "results").as_uri()))
    yield made
    made.db.close()


def pictures(folder: Path, keys: Sequence[str]) -> list[Outcome]:
    """Real pictures, each of another size and with other boxes."""
    outcomes = []
    for number, key in enumerate(keys):
        size = (100 + number, 60 + number)
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")
        Image.new("RGB", size, (number, 50, 90)).save(path, kind)
        outcomes.append(found(key, detected(number, (number + 1) % 4, size), uri=path.as_uri(), size=size))
    return outcomes


def export(mill: Mill, job: Any, url: str, **options: Any) -> Report:
    common = {"job": provenance(job), "settings": settings.load()}
    return exporters.export(mill.db, mill.store, job.recipe_id, "yolo", open_store(url), options=options, **common)


def loaded(folder: Path, picture_list: str = "train") -> list[dict[str, Any]]:
    data = check_det_dataset(folder / "data.yaml", autodownload=False)
    assert [data["names"][i] for i in range(len(data["names"]))] == list(LABELS)
    path = data["train"] if picture_list == "train" else str(folder / picture_list)
    return YOLODataset(img_path=path, data=data, task="detect", augment=False, imgsz=64).labels


def check_loaded(folder: Path, outcomes: Sequence[Outcome], picture_list: str = "train") -> None:
    """Every picture is there, told by its size, with its own boxes."""
    found_by_size = {label["shape"]: label for label in loaded(folder, picture_list)}
    assert set(found_by_size) == {(o.height, o.width) for o in outcomes}
    for outcome in outcomes:
        label = found_by_size[(outcome.height, outcome.width)]
        x, y, w, h = (label["bboxes"] * [outcome.width, outcome.height, outcome.width, outcome.height]).T
        boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        got = sorted(zip(label["cls"].ravel().tolist(), boxes.tolist(), strict=True))
        want = zip(outcome.result.class_ids.tolist(), outcome.result.boxes_xyxy.tolist(), strict=True)
        for (got_class, got_box), (want_class, want_box) in zip(got, sorted(want), strict=True):
            assert got_class == want_class
            assert np.allclose(got_box, want_box, rtol=0, atol=0.01)


@pytest.mark.parametrize("images", ["copy", "link"])
@pytest.mark.parametrize("picture_list", ["train", "images.txt"])
def test_ultralytics_reads_it_back(mill: Mill, tmp_path: Path, images: str, picture_list: str) -> None:
    outcomes = pictures(tmp_path / "pictures", KEYS)
    report = export(mill, mill.run(shards(outcomes, 4)), (tmp_path / "out").as_uri(), images=images)
    (tmp_path / "out").rename(tmp_path / "moved")  # a dataset may be moved
    check_loaded(tmp_path / "moved", outcomes, picture_list)
    assert report.files == 2 * len(KEYS) + 4
    links = [p.is_symlink() for p in (tmp_path / "moved" / "images").rglob("*") if not p.is_dir()]
    assert links == [images == "link"] * len(KEYS)


def test_from_s3_to_s3(mill: Mill, tmp_path: Path, s3_url: str) -> None:
    local = pictures(tmp_path / "pictures", KEYS[:4])
    source = open_store(s3_url + "/pictures")
    for outcome in local:
        source.put_file(outcome.key, tmp_path / "pictures" / outcome.key)
    outcomes = [found(o.key, o.result, uri=source.url_for(o.key), size=(o.width or 0, o.height or 0)) for o in local]
    export(mill, mill.run(shards(outcomes, 3)), s3_url + "/out")
    check_loaded(download(s3_url + "/out", tmp_path / "read"), outcomes)


def test_layout(mill: Mill, tmp_path: Path) -> None:
    outcomes = pictures(tmp_path / "pictures", ["b/one.jpg", "two.png"])
    outcomes[0] = found("b/one.jpg", detected(0, 0), uri=outcomes[0].uri, size=(100, 60))
    export(mill, mill.run(shards(outcomes, 4)), (tmp_path / "out").as_uri())
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    lists = ["data.yaml", "failures.csv", "images.txt", "images/b/one.jpg", "images/two.png"]
    assert files == sorted([*lists, "labels/b/one.txt", "labels/two.txt", "sources.csv"])
    assert (tmp_path / "out" / "images.txt").read_text() == "./images/b/one.jpg\n./images/two.png\n"
    assert (tmp_path / "out" / "labels/b/one.txt").read_text() == ""
    assert (tmp_path / "out" / "images/two.png").read_bytes() == (tmp_path / "pictures/two.png").read_bytes()


def test_same_stem_keeps_both(tmp_path: Path) -> None:
    names = _Names(tmp_path / "names.db")
    keys = ["a.jpg", "a.png", "a.png.jpg", "a.jfif", "a.jfif.png", "a.JPG", "x/a.jpg"]
    taken = [names.take(key) for key in keys]
    assert taken[:2] == [("a", "images/a.jpg"), ("a.png", "images/a.png.png")]
    assert len({label for label, _ in taken}) == len({image for _, image in taken}) == len(keys)
    assert all(image.rsplit(".", 1)[0] == f"images/{label}" for label, image in taken)
    names.close()


@pytest.mark.parametrize("keys", [("é" * 126 + ".jpg", "é" * 127 + ".jpg"), ("/".join(["d" * 100] * 10) + ".jpg",)])
def test_long_names_fit_a_disk(tmp_path: Path, keys: tuple[str, ...]) -> None:
    names = _Names(tmp_path / "names.db")
    for label, image in {names.take(key) for key in keys}:
        assert len(image.encode()) <= 950
        assert all(len(part.encode()) <= 220 for part in f"{image}/{label}".split("/"))
    names.close()


def test_boxes_are_clipped_to_the_picture(mill: Mill, tmp_path: Path) -> None:
    outcome = found("a.jpg", detection("cat", 0, (-10, 240, 700, 600)))
    export(mill, mill.run([[outcome]]), (tmp_path / "out").as_uri(), images="none")
    assert (tmp_path / "out/labels/a.txt").read_text() == "0 0.500000 0.750000 1.000000 0.500000\n"


def test_scores_are_a_sixth_column(mill: Mill, tmp_path: Path) -> None:
    job = mill.run([[found("a.jpg", detection("dog", 1, (0, 0, 320, 240)))]])
    export(mill, job, (tmp_path / "out").as_uri(), images="none", scores="true")
    assert (tmp_path / "out/labels/a.txt").read_text() == "1 0.250000 0.250000 0.500000 0.500000 0.500000\n"


def test_failures_are_no_formulas(mill: Mill, tmp_path: Path) -> None:
    messages = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "plain, with comma"]
    outcomes = [failed(f"{number}.jpg", message=message) for number, message in enumerate(messages)]
    job = mill.run(shards([*outcomes, failed("=key.jpg")], 4))
    export(mill, job, (tmp_path / "out").as_uri(), images="none")
    with (tmp_path / "out" / "failures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["message"] for row in rows[:5]] == [*(f"'{m}" for m in messages[:4]), messages[4]]
    assert rows[5] == {
        "key": "'=key.jpg",
        "stage": "decode",
        "reason": "truncated",
        "message": "the file ends too early",
    }
    assert _safe("\t=1", "\r=1", "a=1", "") == ["'\t=1", "'\r=1", "a=1", ""]


def test_a_picture_that_is_gone_is_told(mill: Mill, tmp_path: Path) -> None:
    outcomes = pictures(tmp_path / "pictures", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    (tmp_path / "pictures" / "b.jpg").unlink()
    report = export(mill, mill.run(shards(outcomes, 4)), (tmp_path / "out").as_uri())
    assert report.notes == ["1 pictures could not be copied; they are listed in failures.csv"]
    with (tmp_path / "out" / "failures.csv").open(newline="") as file:
        assert [(r["key"], r["stage"], r["reason"]) for r in csv.DictReader(file)] == [
            ("b.jpg", "export", "no-picture")
        ]
    assert (tmp_path / "out" / "labels" / "b.txt").exists()
    check_loaded(tmp_path / "out", [outcomes[0], outcomes[2], outcomes[3]])


def test_links_need_folders(mill: Mill, tmp_path: Path, s3_url: str) -> None:
    job = mill.run([[found("a.jpg", detection("cat", 0), uri="s3://bucket/a.jpg")]])
    with pytest.raises(BadInput, match=r"needs local pictures, but got 's3://bucket/a.jpg'"):
        export(mill, job, (tmp_path / "out").as_uri(), images="link")
    with pytest.raises(BadInput, match="needs a local folder"):
        export(mill, job, s3_url, images="link")
    assert not (tmp_path / "out").exists()


ODD_NAMES = [
    'q"uote',
    "back\\slash",
    "yes",
    "1.5",
    "- a: b",
    "# no",
    "emoji 😀",
    "nel\x85",
    "del\x7f",
    "ls\u2028",
    "bom\ufeff",
]


def test_any_class_name(mill: Mill, tmp_path: Path) -> None:
    job = mill.run([], labels=[*ODD_NAMES, "new\nline", "tab\t"])
    export(mill, job, (tmp_path / "out").as_uri())
    data = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == dict(enumerate([*ODD_NAMES, "new\nline", "tab\t"]))
