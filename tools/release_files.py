"""Writes what a release has beside its wheel and sdist: checksums, and a list of what it needs.

python -m tools.release_files --dist=dist     (make release builds and tests these files first)

dist/SHA256SUMS     of every file; sha256sum -c SHA256SUMS checks them
dist/sbom.cdx.json  a CycloneDX 1.6 software bill of materials: the wheel with its hash, and all
                    packages that it needs without extras, in the versions of this environment
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("tools.release_files")

import importlib.metadata
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from microdit_jax.commands.parser import Parser
from microdit_jax.errors import UserError
from microdit_jax.files import sha256, write_json, write_text

PACKAGE = "microdit_jax"
SUMS, SBOM = "SHA256SUMS", "sbom.cdx.json"


def main(arguments: Sequence[str]) -> None:
    parser = Parser("tools.release_files", __doc__)
    parser.add_argument("--dist", type=Path, default=Path("dist"), help="folder of the wheel")
    folder = parser.parse_args(arguments).dist
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if len(wheels) != 1:
        raise UserError(f"expected one wheel in {folder}, found {len(wheels)}; make wheel-test")
    write_json(folder / SBOM, bill_of_materials(wheels[0]))
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SUMS]
    write_text(folder / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in files))
    print(f"{folder}: {', '.join(path.name for path in files)}, {SUMS}")


def canonical(name: str) -> str:
    """Returns a package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str) -> list[str]:
    """Returns the packages that a package needs here, extras that it asks for included."""
    requirement = Requirement(name)
    found = set()
    for text in importlib.metadata.requires(requirement.name) or ():
        wanted = Requirement(text)
        extras = requirement.extras or {""}
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in extras):
            extra = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
            found.add(canonical(wanted.name) + extra)
    return sorted(found)


def bill_of_materials(wheel: Path) -> dict[str, Any]:
    """Returns the CycloneDX document of a wheel of this version.

    Raises:
      UserError: a package that it needs is not installed here.
    """
    edges: dict[str, set[str]] = {}
    todo, seen = [PACKAGE], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            below = needed(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"expected {name} to be installed, found none; make setup") from error
        plain = canonical(name.partition("[")[0])
        edges.setdefault(plain, set()).update(canonical(n.partition("[")[0]) for n in below)
        todo += below
    version = importlib.metadata.version(PACKAGE)
    checksum = sha256(wheel)
    ours = _component(canonical(PACKAGE)) | {
        "type": "application",
        "hashes": [{"alg": "SHA-256", "content": checksum}],
        "licenses": [{"expression": "Apache-2.0 AND MIT"}],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{PACKAGE}-{checksum}')}",
        "version": 1,
        "metadata": {"component": ours | {"version": version}},
        "components": [_component(name) for name in sorted(edges) if name != canonical(PACKAGE)],
        "dependencies": [
            {
                "ref": _reference(name),
                "dependsOn": [_reference(below) for below in sorted(edges[name])],
            }
            for name in sorted(edges)
        ],
    }


def _reference(name: str) -> str:
    return f"pkg:pypi/{name}@{importlib.metadata.version(name)}"


def _component(name: str) -> dict[str, Any]:
    about = importlib.metadata.metadata(name)
    component = {
        "type": "library",
        "bom-ref": _reference(name),
        "name": name,
        "version": importlib.metadata.version(name),
        "purl": _reference(name),
    }
    if expression := about.get("License-Expression"):
        component["licenses"] = [{"expression": expression}]
    return component
