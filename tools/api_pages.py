"""Writes docs/api/: a page for each group of modules, which mkdocstrings fills from docstrings.

python -m tools.api_pages     (make docs runs it; the pages are not kept)
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

from collections.abc import Sequence
from pathlib import Path

from microdit_jax.commands.parser import Parser

ROOT = Path(__file__).parent.parent

# Page, title, and the modules on it: a name takes all that is below it. mkdocs.yml lists the pages.
GROUPS = (
    ("network", "Network", ("microdit_jax.models",)),
    (
        "sampling",
        "Diffusion and sampling",
        (
            "microdit_jax.create",
            "microdit_jax.sampling",
            "microdit_jax.diffusion",
            "microdit_jax.noise",
            "microdit_jax.images",
            "microdit_jax.app",
        ),
    ),
    ("encoders", "Text encoders and VAEs", ("microdit_jax.encoders", "microdit_jax.towers")),
    ("training", "Training", ("microdit_jax.train", "microdit_jax.training")),
    ("machine", "Machines", ("microdit_jax.machine", "microdit_jax.sharding")),
    ("checkpoints", "Checkpoints and assets", ("microdit_jax.checkpoints", "microdit_jax.assets")),
    ("data", "Data", ("microdit_jax.data", "microdit_jax.prepare")),
    ("evaluation", "Evaluation", ("microdit_jax.evaluate", "microdit_jax.metrics")),
    ("xla", "XLA lab", ("microdit_jax.xla",)),
    ("convert", "Conversion", ("microdit_jax.convert", "convert")),
    (
        "shared",
        "Shared",
        (
            "microdit_jax.commands",
            "microdit_jax.model_flags",
            "microdit_jax.errors",
            "microdit_jax.files",
            "microdit_jax.trees",
        ),
    ),
)


def modules() -> list[str]:
    """All public modules, packages before what is in them."""
    found = []
    for package in ("microdit_jax", "convert"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            if not any(part.startswith("_") for part in name.split(".")):
                found.append(name)
    return sorted(found)


def grouped() -> dict[str, list[str]]:
    """The modules of each page, in the order of the table.

    Raises:
      SystemExit: a module is on no page.
    """
    left = set(modules()) - {"microdit_jax"}
    pages: dict[str, list[str]] = {}
    for page, _, names in GROUPS:
        pages[page] = []
        for name in names:
            taken = sorted(m for m in left if m == name or m.startswith(f"{name}."))
            left -= set(taken)
            pages[page] += taken
    if left:
        raise SystemExit(f"on no page of tools/api_pages.py: {', '.join(sorted(left))}")
    return pages


def main(arguments: Sequence[str]) -> None:
    Parser("tools.api_pages", __doc__).parse_args(arguments)
    folder = ROOT / "docs" / "api"
    folder.mkdir(exist_ok=True)
    pages = grouped()
    for page, title, _ in GROUPS:
        parts = [f"# {title}", *(f"::: {name}" for name in pages[page])]
        (folder / f"{page}.md").write_text("\n\n".join(parts) + "\n")
    print(f"{sum(map(len, pages.values()))} modules on {len(pages)} pages")
