"""Files from Hugging Face, played by a server on this machine; and from where a person put them."""

import hashlib
import http.server
import json
import socket
import threading

import pytest
from huggingface_hub import constants

from microdit_jax.assets import hub
from microdit_jax.errors import UserError

BIG = bytes(range(256)) * 4096  # 1 MiB
FILES = {
    "a/clip": {"open_clip_config.json": b"{}", "open_clip_pytorch_model.bin": BIG},
    "a/t5-small": {
        **{name: b"{}" for name in hub._T5_FILES},
        "pytorch_model.bin.index.json": json.dumps(
            {"weight_map": {"x": "p-1-of-2.bin", "y": "p-2-of-2.bin", "z": "p-1-of-2.bin"}}
        ).encode(),
        "p-1-of-2.bin": b"1",
        "p-2-of-2.bin": b"2",
    },
    "a/pipeline": {
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"v",
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors": b"t",
    },
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What hf_hub_download asks of the real one: HEAD for size and etag, GET with a range."""

    protocol_version = "HTTP/1.1"
    ranges: list[str] = []
    cut = 0  # bytes after which to break the connection, once

    def answer(self, body: bool) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        data = FILES.get(repository, {}).get(rest.partition("/")[2])
        if data is None:
            missing = "EntryNotFound" if repository in FILES else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", missing)
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if body:
            self.ranges.append(self.headers.get("Range", ""))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body and Hub.cut:
            self.wfile.write(data[start : start + Hub.cut])
            Hub.cut = 0
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif body:
            self.wfile.write(data[start:])

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Hub.ranges, Hub.cut = [], 0
        yield f"http://localhost:{running.server_port}"
        running.shutdown()


@pytest.fixture
def online(server, tmp_path, monkeypatch):
    """As if HF_ENDPOINT and HF_HOME had been set before huggingface_hub was imported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return monkeypatch


def test_fetched_once_and_then_found_without_network(online, tmp_path):
    folder = hub.text_encoder("openclip:hf-hub:a/clip")
    assert (folder / "open_clip_pytorch_model.bin").read_bytes() == BIG
    assert folder.is_relative_to(tmp_path / "hf")
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.text_encoder("openclip:hf-hub:a/clip") == folder
    assert len(Hub.ranges) == 2


def test_a_broken_download_goes_on_where_it_stopped(online):
    Hub.cut = 300_000
    online.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    (file,) = hub.fetch("a/clip", "open_clip_pytorch_model.bin")
    assert file.read_bytes() == BIG
    assert Hub.ranges == ["", "bytes=300000-"]


def test_what_is_in_a_pipeline_and_in_a_t5(online):
    assert hub.vae("a/pipeline").name == "vae"
    assert hub.text_encoder("a/pipeline").name == "text_encoder"
    folder = hub.text_encoder("a/t5-small")
    assert {"p-1-of-2.bin", "p-2-of-2.bin", "spiece.model"} <= {f.name for f in folder.iterdir()}


@pytest.mark.parametrize(
    "name, setting, why",
    [
        ("a/clip", {}, "it has no such file"),
        ("a/nothing", {}, "there is no such repository"),
        ("a/pipeline", {"HF_HUB_OFFLINE": True}, "no network, or offline mode"),
    ],
)
def test_what_cannot_be_had_is_told_with_the_place_to_put_it(
    online, tmp_path, capsys, name, setting, why
):
    for key, value in setting.items():
        online.setattr(constants, key, value)
    with pytest.raises(UserError, match="could not fetch it") as error:
        hub.vae(name)
    message = str(error.value)
    assert (
        why in message
        and message.endswith("docs/troubleshooting.md")
        and "vae/config.json" in message
    )
    assert str(tmp_path / "cache" / "microdit_jax" / "files" / name) in message
    assert ("asking the Hugging Face Hub" in capsys.readouterr().err) == (not setting)


def test_files_put_there_by_hand_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "microdit_jax" / "files" / hub.REPOSITORY / "ckpts"
    folder.mkdir(parents=True)
    file = folder / "dit_4_channel_0.5B_synthetic_data.pt"
    file.write_bytes(b"x")
    assert hub.released_checkpoint("dit_4_channel_0.5B_synthetic_data") == file
    assert hub.released_checkpoint(file.name) == file


def test_the_table_of_what_was_released():
    assert len(hub.RELEASED) == 4
    best = hub.RELEASED["dit_4_channel_37M_real_and_synthetic_data"]
    assert (best.fid, best.geneval, best.resolution, best.channels) == (12.66, 0.46, 512, 4)
    for released in hub.RELEASED.values():
        assert hub.DEFAULT_VAES[released.channels] == released.vae


def test_t5_by_name():
    assert hub.is_t5("DeepFloyd/t5-v1_1-xxl") and not hub.is_t5("t5/clip")


@pytest.mark.parametrize(
    "weights",
    [{"x": "../../secret"}, {"x": "/etc/passwd"}, {"x": ".hidden"}, {"x": "a/b.bin"}, {}, [], "p"],
)
def test_an_index_names_files_beside_it_alone(tmp_path, weights):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError, match="the names of weights beside"):
        hub._shards(index)
    index.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deep"):
        hub._shards(index)
