"""Imports go one way (CONTRIBUTING.md), and nothing that runs imports torch or TensorFlow."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# From the ground up: a module may import from its own unit and from units on the lines above, never
# from one on its own line or below. There are no exceptions.
LAYERS = [
    {"errors", "trees"},
    {"files"},
    {"towers"},
    {"machine"},
    {"models", "diffusion", "noise", "sharding"},
    {"encoders", "metrics", "images"},
    {"data"},
    {"checkpoints"},
    {"commands"},
    {"sampling"},
    {"convert"},
    {"assets"},
    {"create"},
    {"model_flags"},
    {"prepare"},
    {"evaluate", "app"},
    {"training"},
    {"train"},
    {"xla"},
    {"TOP"},  # what stands outside of the package, and what it offers to all: microdit_jax itself
]
OUTSIDE = {"convert", "configs", "train_main", "sample_main"}
LEVEL = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}


def unit_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    package, *rest = module.split(".")
    if package in OUTSIDE or not rest:
        return "TOP"
    assert rest[0] in LEVEL, f"{module} stands in no layer: add {rest[0]} to LAYERS"
    return rest[0]


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
    wrong = []
    for module, imported in graph.items():
        unit = unit_of(module)
        for name in imported:
            package, _, rest = name.partition(".")
            if package in OUTSIDE and module.startswith("microdit_jax"):
                wrong.append(f"{module} imports {name}, which stands outside of the package")
            if package != "microdit_jax" or f"{package}.{rest.split('.')[0]}" not in graph:
                continue  # another library's, or a name of microdit_jax itself such as __version__
            target = unit_of(name)
            if target != unit and LEVEL[target] >= LEVEL[unit]:
                wrong.append(f"{module} imports {name}: {target} is not below {unit}")
    return wrong


def test_imports_go_one_way():
    graph = modules()
    assert len(graph) > 100
    assert not violations(graph)


def test_a_turned_import_is_noticed():
    graph = modules()
    for module, name in [
        ("microdit_jax.models.dit", "microdit_jax.training.step"),
        ("microdit_jax.diffusion", "microdit_jax.models.dit"),
        ("microdit_jax.convert.dit", "microdit_jax.assets.hub"),
        ("microdit_jax.checkpoints.run", "microdit_jax.convert.dit"),
        ("microdit_jax.assets.load", "convert.dit"),
        ("microdit_jax.training.config", "configs.demo"),
    ]:
        assert violations(graph | {module: {name}}), (module, name)


def test_the_package_has_few_modules_at_its_top():
    assert len(list((ROOT / "microdit_jax").glob("*.py"))) <= 16


def test_torch_only_in_the_reference_loader():
    heavy = {"torch", "tensorflow", "diffusers", "open_clip", "timm"}
    users = {m for m, names in modules().items() if {n.split(".")[0] for n in names} & heavy}
    assert users <= {"convert.reference"}
