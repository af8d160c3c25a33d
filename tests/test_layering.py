"""Imports go one way (CONTRIBUTING.md), and nothing that runs imports torch or TensorFlow."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# A module may import from its own entry and from those above it, never from those below.
LAYERS = [
    {"microdit_jax.errors", "microdit_jax.background", "microdit_jax.trees"},
    {
        "microdit_jax.cli",
        "microdit_jax.hosts",
        "microdit_jax.memory",
        "microdit_jax.pictures",
        "microdit_jax.signals",
    },
    # Leaves: none imports another.
    {
        "microdit_jax.models",
        "microdit_jax.encoders",
        "microdit_jax.diffusion",
        "microdit_jax.noise",
        "microdit_jax.sharding",
        "microdit_jax.optim",
        "microdit_jax.data",
        "microdit_jax.chips",
        "microdit_jax.xla.presets",
    },
    {
        "microdit_jax.checkpoint",
        "microdit_jax.hub",
        "microdit_jax.instant",
        "microdit_jax.loss",
        "microdit_jax.run_packing",
        "microdit_jax.run_restore",
        "microdit_jax.run_checkpoint",
        "microdit_jax.weights",
        "microdit_jax.metrics",
        "convert",
    },
    {"microdit_jax.assets", "microdit_jax.train_step", "microdit_jax.sample"},
    {"microdit_jax.create", "microdit_jax.caption_tower"},
    {"microdit_jax.model_flags"},
    {
        "microdit_jax.app",
        "microdit_jax.data.precompute",
        "microdit_jax.evaluate",
        "microdit_jax.metric_writer",
        "microdit_jax.run_config",
        "microdit_jax.run_data",
    },
    {
        "microdit_jax.heldout",
        "microdit_jax.progress",
        "microdit_jax.start",
        "microdit_jax.report",
    },
    {"microdit_jax.train", "microdit_jax.xla"},
    {"microdit_jax.recipe"},
    {"microdit_jax", "microdit_jax.scripts", "configs", "train_main", "sample_main"},
]
# Within one layer, who may import whom: everything else of that layer is out of bounds.
ALLOWED_BESIDE = {
    ("convert", "microdit_jax.checkpoint"),
    ("convert", "microdit_jax.metrics"),
    ("microdit_jax.instant", "convert"),
    ("microdit_jax.instant", "microdit_jax.checkpoint"),
    ("microdit_jax.run_restore", "microdit_jax.checkpoint"),
    ("microdit_jax.run_restore", "microdit_jax.run_packing"),
    ("microdit_jax.run_checkpoint", "microdit_jax.checkpoint"),
    ("microdit_jax.run_checkpoint", "microdit_jax.run_packing"),
    ("microdit_jax.run_checkpoint", "microdit_jax.run_restore"),
    ("microdit_jax.heldout", "microdit_jax.report"),
    ("microdit_jax.weights", "microdit_jax.checkpoint"),
    ("microdit_jax.weights", "microdit_jax.run_restore"),
    ("microdit_jax.weights", "microdit_jax.run_checkpoint"),
    ("train_main", "configs"),
}


def unit_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    units = [unit for layer in LAYERS for unit in layer]
    matches = [u for u in units if module == u or module.startswith(u + ".")]
    assert matches, f"{module} stands in no layer: add it to LAYERS"
    unit = max(matches, key=len)
    # Every module directly under microdit_jax must be listed itself.
    assert unit != "microdit_jax" or module == unit, f"{module} stands in no layer"
    return unit


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, set[str]]:
    """Module name -> the full names it imports."""
    files = [ROOT / "train_main.py", ROOT / "sample_main.py"]
    for package in ("microdit_jax", "convert", "configs"):
        files += sorted((ROOT / package).rglob("*.py"))
    names = {}
    for file in files:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names[name] = imports(ast.parse(file.read_text()))
    return names


def violations(graph: dict[str, set[str]]) -> list[str]:
    level = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
    wrong = []
    for module, imported in graph.items():
        unit = unit_of(module)
        for name in imported:
            if name.split(".")[0] not in ("microdit_jax", "convert", "configs"):
                continue
            # "from package import thing": the thing may be a module or a name in the package.
            parent = name.rpartition(".")[0]
            target = unit_of(name if name in graph else parent if parent in graph else name)
            if target == unit or (unit, target) in ALLOWED_BESIDE:
                continue
            if level[target] >= level[unit]:
                wrong.append(f"{module} imports {name}: {target} is not below {unit}")
    return wrong


def test_imports_go_one_way():
    graph = modules()
    assert len(graph) > 15
    assert not violations(graph)


def test_a_turned_import_is_noticed():
    graph = modules()
    for module, name in [
        ("microdit_jax.models.dit", "microdit_jax.train_step"),
        ("microdit_jax.diffusion", "microdit_jax.models.dit"),
        ("convert.dit", "microdit_jax.sample"),
        ("microdit_jax.checkpoint", "convert.dit"),
    ]:
        assert violations(graph | {module: {name}}), (module, name)


def test_torch_only_in_the_reference_loader():
    heavy = {"torch", "tensorflow", "diffusers", "open_clip", "timm"}
    users = {m for m, names in modules().items() if {n.split(".")[0] for n in names} & heavy}
    assert users <= {"convert.reference"}
