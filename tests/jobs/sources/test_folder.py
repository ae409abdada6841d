"""The folder source: what it lists, in which order, what it refuses, and that it never ends early in silence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import sources
from jobs.sources import ImageRef, folder
from storage import objects
from storage.errors import BadInput, Unavailable
from storage.settings import Settings


def listed(root: Path, **more: object) -> list[ImageRef]:
    return list(sources.refs(str(root), Settings(**more)))  # type: ignore[arg-type]


def write(root: Path, *names: str | bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))


def test_images_below_the_folder_in_a_stable_order(tmp_path: Path) -> None:
    write(tmp_path, "b.JPG", "a.png", "z/deep/er/c.webp", "m/d.tiff", "notes.txt", "noSuffix", "m/.e.jpg")
    write(tmp_path, ".hidden/f.jpg", ".g.jpg", "dir.jpg/h.jpg")
    found = listed(tmp_path)
    assert [ref.key for ref in found] == ["a.png", "b.JPG", "dir.jpg/h.jpg", "m/d.tiff", "z/deep/er/c.webp"]
    info = (tmp_path / "a.png").stat()
    assert found[0] == ImageRef("a.png", (tmp_path / "a.png").as_uri(), f"mtime:{info.st_mtime_ns}+5")
    assert listed(tmp_path) == found


def test_the_order_is_by_name_whatever_the_disk_says(tmp_path: Path) -> None:
    names = [f"{number * 37 % 100:02d}.png" for number in range(100)]
    write(tmp_path, *names, *(f"{number * 37 % 100:02d}/x.png" for number in range(100)))
    keys = [ref.key for ref in listed(tmp_path)]
    assert keys == sorted(names) + [f"{number:02d}/x.png" for number in range(100)]


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (before,) = listed(tmp_path)
    os.utime(tmp_path / "a.png", ns=(1, 1))
    (after,) = listed(tmp_path)
    assert after.fingerprint == "mtime:1+5" != before.fingerprint
    assert after.key == before.key


@pytest.mark.parametrize(
    "spelling", ["{0}", "{0}/", "{0}//", "{0}/./", "{0}/../data", "file://{0}", "file://{0}/", "/{0}"]
)
def test_one_spelling(tmp_path: Path, spelling: str) -> None:
    root = tmp_path / "data"
    write(root, "a.png")
    assert sources.canonical(spelling.format(root)) == str(root)


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "data/a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert {sources.canonical(word) for word in ("~/data", "data", "./data", "~/../" + tmp_path.name + "/data")} == {
        str(tmp_path / "data")
    }


def test_a_link_to_the_folder_keeps_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, "v1/a.png", "v1/sub/x.png")
    (tmp_path / "current").symlink_to("v1")
    assert sources.canonical(str(tmp_path / "current")) == str(tmp_path / "current")
    (tmp_path / "deep").symlink_to("v1/sub")
    assert sources.canonical(f"{tmp_path}/deep/..") == str(tmp_path / "v1")
    assert [ref.key for ref in listed(tmp_path / "current")] == ["a.png", "sub/x.png"]


def test_a_link_to_a_file_counts_only_inside_the_roots(tmp_path: Path) -> None:
    write(tmp_path, "data/a.png", "other/b.png", "data2/c.png")
    root = tmp_path / "data"
    (root / "in.png").symlink_to("a.png")
    (root / "out.png").symlink_to("../other/b.png")
    (root / "near.png").symlink_to("../data2/c.png")
    (root / "gone.png").symlink_to("nothing.png")
    found = {ref.key: ref for ref in listed(root)}
    assert found["in.png"] == ImageRef("in.png", (root / "a.png").as_uri(), found["a.png"].fingerprint)
    assert found["gone.png"].fingerprint == "missing"
    for key in ("out.png", "near.png"):
        assert found[key].fingerprint == "refused"
        with pytest.raises(BadInput, match="IMAGEMILL_LOCAL_ROOTS"):
            objects.read(found[key].uri, Settings())
    opened = {ref.key: ref for ref in listed(root, local_roots=(tmp_path / "other",))}
    assert objects.read(opened["out.png"].uri, Settings()) == b"other/b.png"
    assert opened["near.png"].fingerprint == "refused"


def test_a_link_moved_after_the_listing_leads_nobody_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, "data/a.png", "secret.png")
    link = tmp_path / "data/link.png"
    link.symlink_to("a.png")
    found = {ref.key: ref for ref in listed(tmp_path / "data")}
    link.unlink()
    link.symlink_to("../secret.png")
    assert objects.read(found["link.png"].uri, Settings()) == b"data/a.png"


def test_linked_folders_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, "data/a.png")
    (tmp_path / "data/loop").symlink_to(".")
    (tmp_path / "data/loop.png").symlink_to(".")
    (tmp_path / "data/self.png").symlink_to("self.png")
    found = listed(tmp_path / "data")
    assert [(ref.key, ref.fingerprint == "missing") for ref in found] == [("a.png", False), ("self.png", True)]


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (ref,) = listed(tmp_path)
    assert (ref.key, ref.fingerprint, ref.uri.partition(":")[0]) == ("pipe.png", "refused", "refused")


def test_odd_names_are_rows_that_open(tmp_path: Path) -> None:
    names = [b"ok.png", b"latin\xe9.png", b"new\nline.png", b"back\\slash.png", b"\x7f.png", b"a%5Cb.png", b"a\\b.png"]
    names += [b"100%.png", b"q?a#b.png", b"sp ace.png", b"C:/x.png", "é😀.png".encode()]
    write(tmp_path, *names)
    found = listed(tmp_path)
    assert len({ref.key for ref in found}) == len(names)
    assert {objects.read(ref.uri, Settings()) for ref in found} == set(names)
    keys = {ref.key for ref in found}
    assert {"latin%E9.png", "new%0Aline.png", "back%5Cslash.png", "a%255Cb.png", "a%5Cb.png", "100%.png"} <= keys
    assert all(sources.safe_key(key) == key for key in keys)


def test_names_equal_after_normalisation_are_images_of_their_own(tmp_path: Path) -> None:
    names = ["\u00e9.png", "e\u0301.png", "\u212a.png", "K.png", "only e\u0301.png", "e%CC%81.png"]
    names += [f"{folder}/{name}.png" for folder in ("\u00fc", "u\u0308") for name in ("\u00e9", "e\u0301")]
    write(tmp_path, *names)
    found = listed(tmp_path)
    assert len({ref.key for ref in found}) == len({ref.uri for ref in found}) == len(names)
    assert {"\u00e9.png", "%C3%A9.png", "K.png", "%E2%84%AA.png", "only \u00e9.png"} <= {ref.key for ref in found}
    assert found == listed(tmp_path)


def test_long_paths_are_listed(tmp_path: Path) -> None:
    write(tmp_path, "/".join(["d" * 200] * 8) + "/a.png", "/".join(["d" * 200] * 8) + "/b.png")
    found = listed(tmp_path)
    assert len({ref.key for ref in found}) == 2
    assert all(len(ref.key.encode()) <= sources.KEY_LIMIT for ref in found)


def test_a_root_that_is_not_utf8_has_a_canonical_form_that_is(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write(root, "a.png")
    spelled = sources.canonical(str(root))
    assert spelled.encode()
    assert [ref.key for ref in sources.refs(spelled, Settings())] == ["a.png"]


def test_no_such_folder(tmp_path: Path) -> None:
    for word in (str(tmp_path / "nothing"), f"file://{tmp_path}/nothing", str(tmp_path / "nothing.png")):
        with pytest.raises(BadInput, match=r"folder .*nothing.* does not exist"):
            sources.canonical(word)
        with pytest.raises(BadInput, match="does not exist"):
            sources.refs(word, Settings())


def test_one_image_and_other_files(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "model.onnx")
    with pytest.raises(BadInput, match="give the folder that holds it"):
        sources.refs(str(tmp_path / "a.png"), Settings())
    with pytest.raises(BadInput, match="cannot tell what dataset"):
        sources.refs(str(tmp_path / "model.onnx"), Settings())


@pytest.mark.parametrize(
    "word", ["", "s3://bucket/photos", "https://host/photos", "prompts:list", "gone.tar", "gone.csv"]
)
def test_words_that_are_no_folder(word: str) -> None:
    assert not folder.claims(word)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "gone"), OSError(5, "EIO")]
)
def test_a_subfolder_that_cannot_be_listed_breaks_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    write(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    real = os.scandir

    def scandir(path: str) -> object:
        if path.rstrip("/").endswith("/b"):
            raise error
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = sources.refs(str(tmp_path), Settings())
    assert next(found).key == "a/1.png"
    with pytest.raises(Unavailable, match=r"/b/?'.*nothing was pruned"):
        list(found)


def test_a_listing_that_breaks_in_the_middle_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1.png", "2.png")
    real = os.scandir

    class Broken:
        def __init__(self, path: str) -> None:
            self.inner = real(path)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            yield from self.inner
            raise OSError(116, "Stale file handle")

        def __exit__(self, *_: object) -> None:
            self.inner.close()

    monkeypatch.setattr(os, "scandir", Broken)
    with pytest.raises(Unavailable, match="Stale file handle"):
        list(sources.refs(str(tmp_path), Settings()))


def test_a_file_deleted_while_listing_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png", "3.png")
    found = sources.refs(str(tmp_path), Settings())
    next(found)
    (tmp_path / "2.png").unlink()
    assert [ref.fingerprint == "missing" for ref in found] == [True, False]


def test_a_folder_replaced_while_listing_breaks_the_listing(tmp_path: Path) -> None:
    root = tmp_path / "mount"
    write(root, "1.png", "2.png")
    found = sources.refs(str(root), Settings())
    next(found)
    root.rename(tmp_path / "elsewhere")
    root.mkdir()
    with pytest.raises(Unavailable, match="nothing was pruned"):
        list(found)


_BYTES = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name and b"/" not in name)
_TEXT = (
    st.text(min_size=1, max_size=20)
    .map(lambda text: text.encode("utf-8", "replace"))
    .filter(lambda name: b"\0" not in name and b"/" not in name)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(st.one_of(_BYTES, _TEXT), min_size=1, max_size=8))
def test_any_name_is_one_row_that_opens(tmp_path_factory: pytest.TempPathFactory, names: set[bytes]) -> None:
    root = tmp_path_factory.mktemp("names")
    wanted = {b"x" + name + b".png" for name in names}
    write(root, *wanted)
    found = listed(root)
    assert sorted(objects.read(ref.uri, Settings()) for ref in found) == sorted(wanted)
    assert len({ref.key for ref in found}) == len(wanted)
    assert all(sources.safe_key(ref.key) == ref.key for ref in found)
    assert [ref.key for ref in listed(root)] == [ref.key for ref in found]
