"""Jobs over the results of other jobs, and chains of them from a file, through the console script."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import flow
from tests.flow import check_all, pictures, prepare, run, run_json, workers
from tests.invariants import rows

Stack = dict[str, str]
COUNT = 240  # more shards than a worker takes in hand at once

CHAIN = """
steps:
  - name: crops
    do: annotate
    from: first
    as: crops
    label: dog
    model: stub
    shard_size: 8
  - name: first
    do: annotate
    source: {source}
    model: stub
    params: {{delay_ms: 200}}
    shard_size: 4
"""


@pytest.fixture
def laptop(home: Path) -> Stack:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def running(laptop: Stack) -> Iterator[Stack]:
    """A laptop with a worker that stays."""
    with workers(laptop):
        yield laptop


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "chain.yaml"
    path.write_text(text)
    return path


@flow.by_default("laptop")
def test_a_chain_runs_while_its_first_step_still_does(stack: Stack, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "images", COUNT)
    prepare(stack)
    path = written(tmp_path, CHAIN.format(source=tmp_path / "images"))
    with workers(stack) if flow.is_fleet(stack) else nullcontext():
        first, crops = run_json(stack, "run", str(path))
        again = run_json(stack, "run", str(path))
    assert (first["name"], first["state"], first["results"]) == ("first", "done", COUNT)
    dogs = sum(count for _, count in labels(stack, "dog"))
    assert (crops["name"], crops["state"], crops["results"]) == ("crops", "done", dogs)
    times = rows(flow.database_url(stack), "SELECT job_id, action, at FROM event WHERE job_id IS NOT NULL")
    began = min(row.at for row in times if row.job_id == crops["id"] and row.action == "claim")
    ended = max(row.at for row in times if row.job_id == first["id"] and row.action == "commit")
    assert began < ended, "the second step waited for the whole of the first"
    assert [(step["planned"], step["fresh"]) for step in again] == [(0, COUNT), (0, dogs)]
    for step in (first, crops):
        run(stack, "verify", str(step["id"]))
    boxes = [f"{key}#{i}" for key, count in labels(stack, "dog") for i in range(count)]
    check_all(stack, {str(first["dataset"]): keys, str(crops["dataset"]): boxes})


def labels(stack: Stack, label: str) -> list[tuple[str, int]]:
    """(key, objects of a label) of the first job."""
    sql = f"""SELECT item.key, item_label.objects FROM item JOIN item_label ON item_label.item_id = item.id
              WHERE item.job_id = 1 AND item_label.label = '{label}'"""  # noqa: S608
    return [(row.key, row.objects) for row in rows(flow.database_url(stack), sql)]


def test_crops_are_what_the_boxes_cover(running: Stack, tmp_path: Path) -> None:
    """Only a label's boxes become items, and a retry finds their crops again."""
    pictures(tmp_path / "images", 12)
    base = ("--model", "stub", "--device", "cpu", "--quiet")
    run(running, "annotate", str(tmp_path / "images"), *base)
    run(running, "annotate", "results:1?as=crops&label=dog", *base, "--param", "fail_every=5", "--max-failures", "1")
    keys = {row.key for row in rows(flow.database_url(running), "SELECT key FROM item WHERE job_id = 2")}
    assert keys == {f"{key}#{i}" for key, count in labels(running, "dog") for i in range(count)}
    failed = "SELECT key FROM item WHERE job_id = {} AND NOT ok"
    before = {row.key for row in rows(flow.database_url(running), failed.format(2))}
    assert before
    run(running, "retry", "2")
    run(running, "annotate", "results:1?as=crops&label=dog", *base, "--param", "fail_every=5", "--max-failures", "1")
    assert {row.key for row in rows(flow.database_url(running), failed.format(3))} == before


@pytest.mark.slow
def test_photos_of_a_label_are_a_dataset(running: Stack, tmp_path: Path) -> None:
    pictures(tmp_path / "images", 30)
    base = ("--model", "stub", "--device", "cpu", "--quiet")
    run(running, "annotate", str(tmp_path / "images"), *base, "--name", "all")
    run(running, "annotate", "results:all?label=cat&min_score=0.8", *base)
    wanted = "SELECT i.key FROM item i JOIN item_label l ON l.item_id = i.id WHERE i.job_id = 1 AND l.label = 'cat'"
    expected = {row.key for row in rows(flow.database_url(running), f"{wanted} AND l.top_score >= 0.8")}
    assert 0 < len(expected) < 30
    assert {r.key for r in rows(flow.database_url(running), "SELECT key FROM item WHERE job_id = 2")} == expected


def test_variants_are_items_of_their_own(laptop: Stack, tmp_path: Path) -> None:
    pictures(tmp_path / "images", 5)
    done = run_json(laptop, "annotate", f"variants:?n=3&of={tmp_path / 'images'}", "--model", "stub", "--device", "cpu")
    assert (done["planned"], done["results"]) == (15, 15)


def test_results_of_a_job_that_was_cancelled_prune_nothing(laptop: Stack, tmp_path: Path) -> None:
    source = str(tmp_path / "images")
    pictures(tmp_path / "images", 20)
    base = ("--model", "stub", "--device", "cpu", "--quiet")
    run(laptop, "annotate", source, *base)
    run(laptop, "annotate", "results:1?as=boxes", *base)
    run(laptop, "annotate", source, *base, "--force", "--detach")
    run(laptop, "cancel", "3")
    refused = run(laptop, "annotate", "results:1?as=boxes", *base, code=2)
    assert "ended cancelled; run it again first" in refused.stderr
    pruned = "SELECT count(*) AS n FROM item WHERE pruned_at IS NOT NULL"
    assert rows(flow.database_url(laptop), pruned)[0].n == 0
    run(laptop, "annotate", source, *base)
    assert run_json(laptop, "annotate", "results:1?as=boxes", "--model", "stub", "--device", "cpu")["fresh"] == 20


STEP = "- {name: a, do: annotate, source: /x, model: stub"
WRONG = {
    "no file": (None, "cannot read the pipeline"),
    "no yaml": ("steps: [", "is no YAML"),
    "no steps": ("step: 1", "is no pipeline"),
    "an empty list": ("steps: []", "is no pipeline"),
    "a word": ("steps: [hello]", "step 1: expected keys"),
    "a misspelt key": (f"steps:\n {STEP}, modle: x}}", "unknown key 'modle'; did you mean 'model'"),
    "a wrong type": (f"steps:\n {STEP}, shard_size: many}}", "shard_size must be a int, but got 'many'"),
    "no model": ("steps:\n - {name: a, do: annotate, source: /x}", "step 1 lacks 'model'"),
    "an unknown command": ("steps:\n - {name: a, do: dance, source: /x, model: stub}", "unknown command 'dance'"),
    "no source": ("steps:\n - {name: a, do: annotate, model: stub}", "either a source or a from"),
    "a source and a from": (f"steps:\n {STEP}, from: b}}", "either a source or a from"),
    "a label of a folder": (f"steps:\n {STEP}, label: dog}}", "choose among the results of a from"),
    "the same name twice": (f"steps:\n {STEP}}}\n {STEP}}}", "two steps have the same name"),
    "an unknown step": ("steps:\n - {name: a, do: annotate, from: b, model: stub}", "there is no such step"),
    "a circle": (
        "steps:\n - {name: a, do: annotate, from: b, model: stub}\n - {name: b, do: annotate, from: a, model: stub}",
        "wait for each other in a circle",
    ),
    "an unknown model": ("steps:\n - {name: a, do: annotate, source: /, model: stup}", "step 'a': unknown model"),
    "a parameter out of range": (f"steps:\n {STEP}, params: {{objects: -1}}}}", "step 'a'"),
    "images of a detector": (
        f"steps:\n {STEP}}}\n - {{name: b, do: annotate, from: a, as: images, model: stub}}",
        "has made no images",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_submitted(name: str, laptop: Stack, tmp_path: Path) -> None:
    text, expected = WRONG[name]
    images = tmp_path / "images"
    pictures(images, 2)
    path = written(tmp_path, text.replace("/x", str(images))) if text else tmp_path / "missing.yaml"
    done = run(laptop, "run", str(path), code=2)
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert run_json(laptop, "jobs") == []
