"""What a release has beside its wheel."""

import hashlib
import importlib.metadata
import json

import pytest

from microdit_jax.errors import UserError
from tools import release_files


def test_checksums_and_a_list_of_what_it_needs(tmp_path):
    wheel = tmp_path / "microdit_jax-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    (tmp_path / "microdit_jax-0.1.0.tar.gz").write_bytes(b"an sdist")
    for _ in range(2):  # the second time over the first one's files, and the same
        release_files.main([f"--dist={tmp_path}"])
    sums = (tmp_path / "SHA256SUMS").read_text()
    for line in sums.splitlines():
        checksum, name = line.split("  ")
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == checksum
    assert len(sums.splitlines()) == 3 and "sbom.cdx.json" in sums
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text())
    ours = bill["metadata"]["component"]
    assert ours["hashes"][0]["content"] == hashlib.sha256(b"a wheel").hexdigest()
    versions = {part["name"]: part["version"] for part in bill["components"]}
    assert versions["jax"] == importlib.metadata.version("jax")
    # jaxlib by jax, etils' extras by orbax; no tools of developers.
    assert {"jaxlib", "etils", "orbax-checkpoint"} <= set(versions)
    assert not {"pytest", "ruff", "torch"} & set(versions)
    refs = [ours["bom-ref"], *(part["bom-ref"] for part in bill["components"])]
    assert len(set(refs)) == len(refs)
    for edge in bill["dependencies"]:
        assert edge["ref"] in refs and set(edge["dependsOn"]) <= set(refs)
    assert bill["serialNumber"].startswith("urn:uuid:")


def test_a_folder_without_a_wheel(tmp_path):
    with pytest.raises(UserError, match="expected one wheel .* found 0; make wheel-test"):
        release_files.main([f"--dist={tmp_path}"])
    with pytest.raises(UserError, match="expected one wheel"):
        release_files.main([f"--dist={tmp_path / 'none'}"])
