"""Sources that change between runs: refused by name, or grown by new parts; nothing vanishes."""

import dataclasses
import functools

import pytest
from support.latent_datasets import contents
from test_prepare_job import OPTIONS, Source, compute, png

from microdit_jax.data.stores import open_latents
from microdit_jax.errors import UserError
from microdit_jax.prepare import encoding, job
from microdit_jax.prepare.sources import listed_images
from microdit_jax.prepare.sources.listed_images import SourceImage


def listed(*names):
    return listed_images.ListedImages(
        [SourceImage(name, f"words of {name}", functools.partial(png, 1)) for name in names]
    )


def ids(folder):
    source = open_latents(folder, resolution=24)
    return [source[i]["id"] for i in range(len(source))]


def test_a_grown_source_is_refused_or_makes_new_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(listed_images, "_PART", 3)
    monkeypatch.setattr(listed_images.ListedImages, "part_size", 3)
    first, more = [f"b{i}" for i in range(4)], [f"a{i}" for i in range(4)]  # which sort first
    compute(tmp_path, listed(*first))
    before = contents(tmp_path / "000001")
    grown = listed(*sorted(first + more))
    with pytest.raises(UserError, match=r"4 are new \(a0, a1, a2, ...\); give --append"):
        compute(tmp_path, grown)
    assert ids(tmp_path) == first
    compute(tmp_path, grown, append=True)
    assert ids(tmp_path) == [*first, *more] and contents(tmp_path / "000001") == before
    assert [part.name for part in sorted(tmp_path.glob("[0-9]*"))] == [f"{i:06}" for i in range(4)]
    compute(tmp_path, grown)
    assert ids(tmp_path) == [*first, *more]
    with pytest.raises(UserError, match=r"1 changed or gone \(b0\), 0 new; bring back"):
        compute(tmp_path, listed(*sorted(first + more)[:4], *first[1:]), append=True)
    compute(tmp_path, grown, append=True)


def test_changed_and_grown_parts_are_named(tmp_path):
    class Changed(Source):
        def listing(self, part):
            return {self.parts[part]: "x" if part == 1 else ""}

    compute(tmp_path)
    with pytest.raises(UserError, match=r"1 changed or gone \(part 1\), 0 new"):
        compute(tmp_path, Changed())
    with pytest.raises(UserError, match=r"1 are new \(part 3\); give --append"):
        compute(tmp_path, Source(4))
    compute(tmp_path, Source(4), append=True)
    assert len(open_latents(tmp_path, resolution=24)) == 28
    for text in ("{", '{"parts": [1]}'):
        (tmp_path / "listing.json").write_text(text)
        with pytest.raises(UserError, match="expected .*found damage"):
            compute(tmp_path, Source(4))


def test_images_that_vanish_are_a_defect(tmp_path, monkeypatch):
    batches = encoding._batches

    def losing(decoded, size):
        return batches(((p, i) for p, i in decoded if i is None or i.id != "0/3"), size)

    monkeypatch.setattr(encoding, "_batches", losing)
    with pytest.raises(RuntimeError, match="17 images of 000000 became 6 records, 9 skipped"):
        compute(tmp_path)


def test_a_failed_run_without_a_record_lets_its_folder_go(tmp_path):
    class Bad(Source):
        def read(self, part):
            yield SourceImage("x", "x", lambda: b"")

    with pytest.raises(UserError, match="found 3 that are not"):
        compute(tmp_path, Bad())
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]
    compute(tmp_path, options=dataclasses.replace(OPTIONS, seed=4))
    with pytest.raises(UserError, match="begun with other settings: seed=4, now 3"):
        compute(tmp_path)
    shared = {"process_index": 0, "process_count": 2}
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "part_names", lambda *_, **__: (_ for _ in ()).throw(RuntimeError()))
        compute(tmp_path / "two", **shared)
    assert (tmp_path / "two/job.json").exists()  # another process may be at work
