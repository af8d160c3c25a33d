"""Writes docs/api/: a page for each group of modules, which mkdocstrings fills from docstrings.

python -m tools.api_pages     (make docs runs it; the pages are not kept)
"""

from pathlib import Path

from microdit_jax.errors import Parser, exit_on_user_error

ROOT = Path(__file__).parent.parent

# Page, title, and the modules on it: a name takes all that is below it. mkdocs.yml lists the pages.
GROUPS = (
    ("network", "Network", ("microdit_jax.models",)),
    (
        "sampling",
        "Diffusion and sampling",
        (
            "microdit_jax.create", "microdit_jax.sample", "microdit_jax.diffusion",
            "microdit_jax.noise", "microdit_jax.pictures", "microdit_jax.app",
        ),
    ),
    ("encoders", "Text towers and VAEs", ("microdit_jax.encoders",)),
    (
        "training",
        "Training",
        (
            "microdit_jax.train", "microdit_jax.recipe", "microdit_jax.train_step",
            "microdit_jax.loss", "microdit_jax.optim", "microdit_jax.sharding",
            "microdit_jax.run_config", "microdit_jax.run_data", "microdit_jax.start",
            "microdit_jax.caption_tower",
            "microdit_jax.heldout", "microdit_jax.progress", "microdit_jax.metric_writer",
            "microdit_jax.report", "microdit_jax.hosts", "microdit_jax.signals",
            "microdit_jax.background",
        ),
    ),
    (
        "checkpoints",
        "Checkpoints and assets",
        (
            "microdit_jax.checkpoint", "microdit_jax.run_checkpoint", "microdit_jax.run_packing",
            "microdit_jax.run_restore", "microdit_jax.weights", "microdit_jax.assets",
            "microdit_jax.hub",
            "microdit_jax.instant",
        ),
    ),
    ("data", "Data", ("microdit_jax.data",)),
    ("evaluation", "Evaluation", ("microdit_jax.evaluate", "microdit_jax.metrics")),
    ("xla", "XLA lab", ("microdit_jax.xla",)),
    ("convert", "Conversion", ("convert",)),
    (
        "shared",
        "Shared",
        (
            "microdit_jax.cli", "microdit_jax.model_flags", "microdit_jax.scripts",
            "microdit_jax.errors", "microdit_jax.memory", "microdit_jax.chips",
            "microdit_jax.trees",
        ),
    ),
)  # fmt: skip


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


def main() -> None:
    folder = ROOT / "docs" / "api"
    folder.mkdir(exist_ok=True)
    pages = grouped()
    for page, title, _ in GROUPS:
        parts = [f"# {title}", *(f"::: {name}" for name in pages[page])]
        (folder / f"{page}.md").write_text("\n\n".join(parts) + "\n")
    print(f"{sum(map(len, pages.values()))} modules on {len(pages)} pages")


if __name__ == "__main__":
    with exit_on_user_error():
        Parser("tools.api_pages", __doc__).parse_args()
        main()
