"""What every dataset scheme must do, asked of each file in jobs/sources; and the rules of keys."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import tarfile
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs import leases, lifecycle, sources
from storage import objects, shardfile
from storage.errors import BadInput
from storage.settings import Settings
from tests.clips import clip
from tests.support import claimed, new_worker, opened, outcomes_of, planned_job

IMAGES = ("a.png", "sub/b.jpg", "sub/deep/\u00e9 \U0001f600.webp")
Make = Callable[[pytest.FixtureRequest, Path], str]


def _folder(_request: pytest.FixtureRequest, tmp_path: Path) -> str:
    for name in IMAGES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bytes")
    return str(tmp_path / "photos")


def _manifest(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = Path(_folder(request, tmp_path))
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in IMAGES))
    return str(folder / "list.txt")


def _s3(request: pytest.FixtureRequest, _tmp_path: Path) -> str:
    url = str(request.getfixturevalue("s3_url"))
    store = objects.open_store(url)
    for name in IMAGES:
        store.put(f"photos/{name}", b"bytes")
    return f"{url}/photos"


def _prompts(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = Path(_folder(request, tmp_path))
    (folder / "list.csv").write_text("prompt,image\n" + "".join(f"a cat,{name}\n" for name in IMAGES))
    return f"prompts:{folder / 'list.csv'}?n=2"


def _results(_request: pytest.FixtureRequest, _tmp_path: Path) -> str:
    settings = Settings()
    with opened(settings.database) as db:
        store = objects.open_store(settings.store, settings)
        job = planned_job(db, shards=2, size=3)
        worker = new_worker(db)
        for _ in range(2):
            claim = claimed(db, worker)
            outcomes = outcomes_of(claim, failed=[1])
            done = shardfile.write(store, f"jobs/{claim.number}/a/", "detections", outcomes, {})
            assert leases.commit(db, claim, worker, done, outcomes)
        lifecycle.finish(db, job.id)
    return f"results:{job.id}?as=crops"


def _prompted(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "prompts.csv").write_text('key,boxes\na.png,"[[1,2,3,4]]"\nsub/b.jpg,"[]"\n')
    return "prompted:?" + urllib.parse.urlencode(
        {"of": _folder(request, tmp_path), "from": str(tmp_path / "prompts.csv")}
    )


def _variants(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "variants:?" + urllib.parse.urlencode({"of": _folder(request, tmp_path), "n": 2})


def _webdataset(_request: pytest.FixtureRequest, tmp_path: Path) -> str:
    for number in range(2):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as tar:
            for name in IMAGES:
                member = tarfile.TarInfo(name)
                member.size = 5
                tar.addfile(member, io.BytesIO(b"bytes"))
    return str(tmp_path / "train-{0..1}.tar")


def _video(_request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(clip(tmp_path / "clip.mp4", 5))


# One line for each file in jobs/sources: what makes a dataset of a few images and gives its URI. A source that is not
# named here says how itself, in a function example(folder) of its file.
DATASETS: dict[str, Make] = {
    "folder": _folder,
    "manifest": _manifest,
    "prompted": _prompted,
    "prompts": _prompts,
    "results": _results,
    "s3": _s3,
    "variants": _variants,
    "video": _video,
    "webdataset": _webdataset,
}


@pytest.fixture(params=sources.names())
def name(request: pytest.FixtureRequest) -> str:
    module = importlib.import_module(f"jobs.sources.{request.param}")
    if request.param not in DATASETS and not hasattr(module, "example"):
        pytest.fail(f"jobs/sources/{request.param}.py has no dataset to try it on: add one to DATASETS in {__file__}")
    return str(request.param)


@pytest.fixture
def uri(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if name not in DATASETS:
        return str(importlib.import_module(f"jobs.sources.{name}").example(tmp_path))
    return DATASETS[name](request, tmp_path)


def test_every_dataset_here_has_its_source() -> None:
    assert set(DATASETS) <= set(sources.names())


def test_its_own_source_claims_it(name: str, uri: str) -> None:
    assert sources.find(uri).__name__ == f"jobs.sources.{name}"


def test_no_other_source_claims_it(name: str, uri: str) -> None:
    """Else a new file in the folder could change what an old URI means."""
    if uri.startswith(f"{name}:"):
        return  # a scheme that is named comes before all others
    claiming = [other for other in sources.names() if importlib.import_module(f"jobs.sources.{other}").claims(uri)]
    assert claiming == [name]


def test_it_is_streamed(uri: str) -> None:
    found = sources.refs(uri, Settings())
    assert isinstance(found, Iterator)
    assert inspect.isgenerator(found), "a list would hold a hundred million images in memory"
    assert len(list(islice(found, 1))) == 1
    found.close()


def test_keys_are_unique_safe_and_stable(uri: str) -> None:
    first = list(sources.refs(uri, Settings()))
    assert list(sources.refs(uri, Settings())) == first
    keys = [ref.key for ref in first]
    assert keys
    assert len(set(keys)) == len(keys)
    assert [sources.safe_key(key) for key in keys] == keys


def test_fingerprints_and_uris_are_filled(uri: str) -> None:
    for ref in sources.refs(uri, Settings()):
        assert ref.fingerprint
        assert "://" in ref.uri
        assert ref.uri.encode()


def test_canonical_is_absolute_and_final(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spelled = sources.canonical(uri)
    monkeypatch.chdir(tmp_path)
    assert sources.canonical(spelled) == spelled
    assert spelled.startswith("/") or "://" in spelled or spelled.partition(":")[0] in sources.names()
    assert not spelled.endswith("/")
    assert list(sources.refs(spelled, Settings())) == list(sources.refs(uri, Settings()))


@pytest.mark.parametrize(
    "word", ["", "ftp://host/photos", "no such thing.xyz", "s3:/typo", "http://host/list.csv", "\0"]
)
def test_an_unknown_word_is_bad_input(word: str) -> None:
    for ask in (sources.find, sources.canonical, lambda text: sources.refs(text, Settings())):
        with pytest.raises(BadInput, match="expected an existing folder"):
            ask(word)


@given(word=st.text(max_size=60))
def test_no_source_breaks_on_any_word(word: str) -> None:
    for prefix in ("", "s3://", "file://", "/"):
        for other in sources.names():
            module = importlib.import_module(f"jobs.sources.{other}")
            if module.claims(prefix + word):
                with contextlib.suppress(BadInput):
                    spelled = module.canonical(prefix + word)
                    assert module.canonical(spelled) == spelled


_NAMES = st.text(st.one_of(st.characters(), st.sampled_from("./\\%:25cCFfeE\u0301\x00\udcff")), min_size=1, max_size=40)


@given(text=_NAMES)
def test_a_safe_key_is_final_or_refused(text: str) -> None:
    try:
        key = sources.safe_key(text)
    except BadInput:
        return
    assert sources.safe_key(key) == key == unicodedata.normalize("NFC", text)
    assert key.encode()
    parts = key.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert "\\" not in key


@given(text=_NAMES)
def test_an_escaped_key_is_safe_and_leaves_safe_names_alone(text: str) -> None:
    key = sources.escaped_key(text)
    assert sources.safe_key(key) == key
    if "%" not in text:
        try:
            assert key == sources.safe_key(text)
        except BadInput:
            assert "%" in key


@example(first="a%5C", second="a%255C")
@example(first="a\\", second="a%5C")
@example(first="a//b", second="a/%2Fb")
@given(first=st.text("a./\\%25CF:\x01\udcff", min_size=1), second=st.text("a./\\%25CF:\x01\udcff", min_size=1))
def test_two_names_have_two_escaped_keys(first: str, second: str) -> None:
    assert (sources.escaped_key(first) == sources.escaped_key(second)) == (first == second)


@pytest.mark.parametrize(
    "text", ["a" * 1021 + ".jpg", "é" * 600 + ".jpg", "\u0958" * 300, "d/" * 600 + "x.jpg", "\x01" * 600]
)
def test_a_long_name_is_cut_to_a_key_of_its_own(text: str) -> None:
    with pytest.raises(BadInput, match="unsafe item key"):
        sources.safe_key(text)
    key, other = sources.escaped_key(text), sources.escaped_key("b" + text)
    assert key != other
    assert len(key.encode()) <= sources.KEY_LIMIT
    assert sources.safe_key(key) == key == sources.escaped_key(text)
