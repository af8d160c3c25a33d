"""What is sent to the Hugging Face Hub, which a server on this machine plays."""

import base64
import hashlib
import http.server
import json
import re
import threading

import pytest
from conftest import load_golden
from huggingface_hub import constants
from support.convert_command import run as convert

from microdit_jax.assets import publish
from microdit_jax.checkpoints.model_folder import read_metadata
from microdit_jax.commands.boundary import outcome
from microdit_jax.convert.formats.safetensors_file import read_safetensors
from microdit_jax.convert.formats.torch_file import write_torch

# huggingface_hub's own call of httpx, for files of the old large file storage
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the real one to make a repository and to commit files to it."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]] = {}
    stored: dict[str, bytes] = {}  # large files, by their sha256
    asked: list[str] = []
    refuse: dict[str, int] = {}  # part of a path -> status of the answer

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        path, body = self.path.partition("?")[0], self.body()
        Hub.asked.append(f"{self.command} {path}")
        status = next((code for part, code in Hub.refuse.items() if part in path), 0)
        if self.headers.get("Authorization") != "Bearer hf_mine" and self.command != "PUT":
            status = 401
        if status:
            return self.send({"error": "refused"}, status)
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            if name in Hub.repositories:
                return self.send({"error": "it is there", "url": f"{self.home()}/{name}"}, 409)
            Hub.repositories[name] = {}
            return self.send({"url": f"{self.home()}/{name}", "private": about.get("visibility")})
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: microdit_jax\n")
            return self.send({"errors": [], "warnings": []})
        if path.startswith("/stored/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            Hub.stored[path.rpartition("/")[2]] = body
            return self.send({})
        name = path.removeprefix("/api/models/").removesuffix(".git/info/lfs/objects/batch")
        name = "/".join(name.strip("/").split("/")[:2])
        if name not in Hub.repositories:
            return self.send({"error": "no such repository"}, 404, "RepoNotFound")
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > 10_000 else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": wanted["oid"], "size": wanted["size"],
                    "actions": {"upload": {"href": f"{self.home()}/stored/{wanted['oid']}"}},
                }
                for wanted in json.loads(body)["objects"]
            ]  # fmt: skip
            return self.send({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for line in body.splitlines():
                about = json.loads(line)
                value = about["value"]
                if about["key"] == "file":
                    content = base64.b64decode(value["content"])
                elif about["key"] == "lfsFile":
                    content = Hub.stored[value["oid"]]
                else:
                    continue
                Hub.repositories[name][value["path"]] = content
            url = f"{self.home()}/{name}/commit/{'c' * 40}"
            return self.send({"success": True, "commitOid": "c" * 40, "commitUrl": url})
        self.send({"id": name, "sha": "c" * 40, "siblings": [], "private": False, "tags": []})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def home(self) -> str:
        return f"http://{self.headers['Host']}"

    def send(self, answer: dict, status: int = 200, code: str = ""):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    Hub.repositories, Hub.stored, Hub.asked, Hub.refuse = {}, {}, [], {}
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{running.server_port}")
        yield Hub
        running.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small converted network."""
    folder = tmp_path_factory.mktemp("publish")
    golden = load_golden("dit_small")
    names = golden.keys("state_dict/")
    tensors = {name.removeprefix("state_dict/"): golden.arrays[name] for name in names}
    write_torch(folder / "dit.pt", tensors)
    sizes = ("--head_dim=8", "--expert_capacity=2")
    convert("--input", folder / "dit.pt", "--output", folder / "model", *sizes)
    return folder / "model"


def run(*arguments) -> int:
    return outcome(lambda: publish.main([str(argument) for argument in arguments]))


def fails(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after the library's progress bar
    assert error.startswith("error: ")
    return error


def test_weights_card_and_samples_are_sent_in_one_commit(hub, model, tmp_path, capsys):
    (tmp_path / "sheet.png").write_bytes(b"an image")
    flags = (
        f"--input={model}", "--repository=me/small", f"--output={tmp_path / 'out'}",
        f"--images={tmp_path / 'sheet.png'}", "--license=apache-2.0", "--create", "--private",
    )  # fmt: skip
    assert run(*flags, "--dry_run") == 0
    assert "nothing was sent" in capsys.readouterr().out and not hub.asked
    # The author answers the card's questions; what was written stays.
    card = tmp_path / "out" / "README.md"
    assert card.read_text().count(publish.TO_DO) == 2
    card.write_text(card.read_text() + "\nIt draws badly.\n")
    assert run(*flags) == 0
    assert f"/me/small/commit/{'c' * 40}" in capsys.readouterr().out
    files = hub.repositories["me/small"]
    assert set(files) == {"README.md", "dit.safetensors", "samples.png"}
    assert sum("/commit/" in path for path in hub.asked) == 1
    (tmp_path / "got.safetensors").write_bytes(files["dit.safetensors"])
    golden = load_golden("dit_small")
    got, _ = read_safetensors(tmp_path / "got.safetensors")
    assert {f"state_dict/{name}" for name in got} == set(golden.keys("state_dict/"))
    text = files["README.md"].decode()
    assert text.endswith("It draws badly.\n") and "\nlicense: apache-2.0\n" in text
    assert "![Samples](samples.png)" in text and "hf download me/small --local-dir small" in text
    assert f"of {read_metadata(model)['parameters']:,} parameters" in text
    assert "converted from `dit.pt`, sha256" in text and str(tmp_path) not in text
    # A second version goes into the repository that is there by now.
    assert run(*flags) == 0


def test_a_run_brings_its_codec_and_the_card_its_towers(tmp_path, capsys):
    assert run("--input=instant", "--repository=me/e", "--dry_run", f"--output={tmp_path}") == 0
    assert "vae/codec.npz" in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text()
    assert "--vae=e/vae --text_encoder=table:width=256,tokens=16,seed=0" in text
    assert "Twemoji" in text and "instant/model" not in text
    assert (tmp_path / "vae" / "codec.json").is_file()


@pytest.mark.parametrize(
    "flags, refuse, words",
    [
        ((), {}, "there is no such repository; check its name, or add --create"),
        (("--create",), {"/create": 403}, r"may not write there \(status 403\)"),
        (("--create",), {"/commit/": 403}, r"may not write there \(status 403\)"),
        (("--create",), {"/api/": 401}, r"may not write there \(status 401\)"),
        (("--create",), {"/commit/": 418}, "it answers with status 418"),
    ],
)
def test_refusals(hub, model, tmp_path, capsys, flags, refuse, words):
    hub.refuse = refuse
    arguments = (f"--input={model}", "--repository=me/x", f"--output={tmp_path / 'out'}", *flags)
    error = fails(capsys, *arguments)
    assert re.search(words, error), error


def test_no_token_no_network_no_name(hub, model, tmp_path, capsys, monkeypatch):
    flags = (f"--input={model}", f"--output={tmp_path / 'out'}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    assert "no connection" in fails(capsys, *flags, "--repository=me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails(capsys, *flags, "--repository=me/x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "found none; make one at" in fails(capsys, *flags, "--repository=me/x")
    for name in ("x", "a/b/c", "me/x y", "me/../x", ""):
        assert "expected --repository=OWNER/NAME" in fails(capsys, *flags, f"--repository={name}")
    assert "--private goes with --create" in fails(capsys, *flags, "--repository=a/b", "--private")
    wrong = fails(capsys, f"--input={tmp_path}", "--repository=me/x", "--dry_run")
    assert "expected a training run or a converted network" in wrong
    assert not (tmp_path / "out").exists()


def test_convert_writes_a_card(model, tmp_path, capsys):
    card = tmp_path / "README.md"
    convert("--to=torch", "--input", model, "--output", tmp_path / "d.pt", "--card", card)
    assert '--model=d.pt --prompt="..."' in card.read_text()
    before = card.read_text()
    convert("--to=torch", "--input", model, "--output", tmp_path / "d.pt", "--card", card)
    assert "stays as it is" in capsys.readouterr().out and card.read_text() == before
