"""Dealing parts out to actors that are lost, by a stand-in for Ray; Ray itself: make test-ray."""

import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image
from support.latent_datasets import contents
from test_prepare_job import OPTIONS, TABLE, codec

from microdit_jax.errors import UserError
from microdit_jax.prepare import __main__, claims, job, ray_engine
from microdit_jax.prepare.encoding import make_towers
from microdit_jax.prepare.request import PrepareRequest
from microdit_jax.prepare.sources import listed_images


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__("a page of traceback")
        self.cause = cause


class Ray:
    """Computes a result when it is asked for; `fault(method, part)` may raise what Ray would."""

    exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, nodes, fault=lambda method, part: None):
        self._nodes, self._fault = nodes, fault
        self.calls, self.killed, self.shut = [], [], False

    def init(self, **options):
        self.options = options

    def shutdown(self):
        self.shut = True

    def nodes(self):
        return [{"Alive": True, "Resources": node} for node in self._nodes]

    def put(self, value):
        return value

    def kill(self, actor):
        self.killed.append(actor)

    def remote(self, **size):
        def actor_class(made):
            return types.SimpleNamespace(remote=lambda *given: self._actor(made(*given)))

        self.size = size
        return actor_class

    def _actor(self, actor):
        def method(name):
            return types.SimpleNamespace(remote=lambda *given: Result(actor, name, given))

        return types.SimpleNamespace(ready=method("ready"), write=method("write"))

    def wait(self, results, timeout):
        assert len(set(results)) == len(results)
        return results[:1], results[1:]

    def get(self, result):
        part = result.given[0] if result.given else None
        self.calls.append((result.name, part))
        self._fault(result.name, part)
        try:
            return getattr(result.actor, result.name)(*result.given)
        except Exception as error:
            raise RayTaskError(error) from error


class Result:
    def __init__(self, actor, name, given):
        self.actor, self.name, self.given = actor, name, given


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Seven images in three parts, and what the local engine makes of them."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "in").mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"in/{i}.png")
        (folder / f"in/{i}.txt").write_text(f"no. {i}")
    codec().save(folder / "codec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listed_images, "_PART", 3)
        asked = request(folder, folder / "whole")
        run = asked.open_source(), towers(), folder / "whole", OPTIONS
        job.run(*run, request=asked.settings(), progress=False)
    return folder


def towers():
    return make_towers(codec(), TABLE, OPTIONS.seed)


def request(folder, output):
    return PrepareRequest(
        source="folder", input=str(folder / "in"), fraction=1.0, source_options={"captions": None},
        vae=str(folder / "codec"), text_encoder=TABLE.name, dtype="float32", output=str(output),
        options=OPTIONS, threads=2,
    )  # fmt: skip


@pytest.fixture
def run(work, tmp_path, monkeypatch):
    monkeypatch.setattr(listed_images, "_PART", 3)

    def run(ray, **sizes):
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
        asked = request(work, tmp_path / "out")
        ray_engine.run(asked, asked.open_source(), towers()[0], progress=False, **sizes)
        return tmp_path / "out"

    return run


NODES = [{"CPU": 4.0}, {"CPU": 2.0}, {}]


def test_the_output_is_the_local_engines(run, work):
    ray = Ray(NODES)
    assert contents(run(ray)) == contents(work / "whole")
    assert [call for call in ray.calls if call[0] == "write"] == [
        ("write", 0), ("write", 1), ("write", 2)
    ]  # fmt: skip
    assert ray.size == {"num_cpus": 2.0, "num_gpus": 0.0}
    assert [name for name, _ in ray.calls].count("ready") == 3  # as many as there are parts
    assert ray.shut and not ray.killed


def test_parts_of_lost_actors_run_again(run, work, capsys):
    losses = iter([True, True])

    def fault(method, part):
        if part == 1 and next(losses, False):
            raise RayError("The node has died.\nmore")

    ray = Ray(NODES, fault)
    assert contents(run(ray)) == contents(work / "whole")
    assert ray.calls.count(("write", 1)) == 3 and len(ray.killed) == 2
    said = capsys.readouterr().err
    assert said.count("gone (The node has died.); part 000001 runs again elsewhere") == 2


@pytest.mark.parametrize(
    "method, message",
    [
        ("write", "expected part 00000[0-2] to be written, found 5 actors lost at it"),
        ("ready", "expected actors with 2 CPUs and 0 GPUs to start, found 5 lost before that"),
    ],
)
def test_actors_that_are_lost_every_time_end_the_job(run, method, message):
    def fault(called, part):
        if called == method:
            raise RayError("out of memory")

    with pytest.raises(UserError, match=f"{message}, the last one .*with: out of memory"):
        run(Ray(NODES, fault))


def test_a_fault_on_a_node_names_it(run, work, monkeypatch):
    monkeypatch.setattr(ray_engine.socket, "gethostname", lambda: "b")

    def fault(method, part):
        if part == 2:
            (work / "in/6.png").rename(work / "in/8.png")

    try:
        with pytest.raises(UserError, match=r"node b: .*begun with another listing: 1 changed"):
            run(Ray([{"CPU": 1.0}] * 3, fault))
    finally:
        (work / "in/8.png").rename(work / "in/6.png")


def test_another_disk_is_noticed_before_anything_is_written(work, tmp_path):
    actor = ray_engine.Actor(request(work, tmp_path))
    with pytest.raises(UserError, match="on a disk that all nodes share, found another folder"):
        actor.write(0, str(tmp_path / "claims/000000"), "text")
    assert not list(tmp_path.iterdir())


def test_other_software_on_a_node_is_named(run, monkeypatch):
    found = iter([{"version of jax": "1"}] + [{"version of jax": "2"}] * 9)
    monkeypatch.setattr(ray_engine.agreement, "software", lambda: next(found))
    with pytest.raises(UserError, match="found version of jax 1 here and 2 on"):
        run(Ray(NODES))


def test_parts_of_others_are_waited_for(run, work, monkeypatch, tmp_path):
    folder = tmp_path / "out" / claims.FOLDER / "000001"
    waits = []

    def wait():
        waits.append(1)
        folder.joinpath(".lock").unlink()  # the other has given it up

    monkeypatch.setattr(claims, "wait_a_moment", wait)

    def fault(method, part):
        if method == "ready" and not waits:
            folder.mkdir(parents=True, exist_ok=True)
            folder.joinpath(".lock").write_text('{"host": "elsewhere"}')

    ray = Ray([{"CPU": 1.0}], fault)
    assert contents(run(ray)) == contents(work / "whole")
    assert [part for _, part in ray.calls] == [None, 0, 2, 1] and waits == [1]


@pytest.mark.parametrize(
    "nodes, sizes, expected",
    [
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0}], {}, (1.0, 1.0, 2)),
        ([{"CPU": 8.0, "GPU": 2.0}] * 2, {"gpus": 0.5, "cpus": 3.0}, (3.0, 0.5, 4)),
        ([{"CPU": 8.0, "GPU": 2.0}] * 2, {"gpus": 0.0}, (8.0, 0.0, 2)),
        ([{"CPU": 8.0}], {"cpus": 9.0}, "expected a node with 9 CPUs and 0 GPUs, found 8 CPUs and"),
        ([{"CPU": 8.0}], {"cpus": 0.0}, "--ray_cpus must be above 0, found 0"),
        ([{}], {}, "found 0 CPUs and 0 GPUs at most"),
    ],
)
def test_sizes_of_actors(nodes, sizes, expected):
    ray, asked = Ray(nodes), {"cpus": None, "gpus": None} | sizes
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            ray_engine._size(ray, **asked)
    else:
        size = ray_engine._size(ray, **asked)
        assert (*size, ray_engine._room(ray, size)) == expected


def test_without_ray_one_line_names_the_extra(work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = ["--source=folder", f"--input={work / 'in'}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"pip install 'microdit_jax\[ray\]'"):
        __main__.main([*line, "--engine=ray"])
    with pytest.raises(UserError, match="--ray_cpus: it is for --engine=ray"):
        __main__.main([*line, "--ray_cpus=2"])
    assert not (tmp_path / "out").exists()


def test_actors_get_paths_that_hold_in_any_folder(work, monkeypatch):
    monkeypatch.chdir(work)
    asked = request(pathlib.Path("."), "out").with_absolute_paths()
    assert asked.input == str(work / "in") and asked.vae == str(work / "codec")
    assert asked.output == str(work / "out") and asked.text_encoder == TABLE.name
