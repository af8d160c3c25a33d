"""The house's own rules: short files, and signatures that say what goes in and out."""

import ast
import itertools
import pathlib
import re

import jaxtyping

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("microdit_jax", "convert", "configs", "tests", "benchmarks", "tools", "fuzz")
ARRAYS = {"Array", "ndarray", "ArrayLike"}
# Several arrays by name, or whatever another function takes: their shapes are the docstring's.
CONTAINERS = {"dict", "Mapping", "Callable"}


def sources(*folders: str) -> list[pathlib.Path]:
    return list(itertools.chain(*(sorted((ROOT / folder).rglob("*.py")) for folder in folders)))


def test_files_are_short():
    files = [*sources(*FOLDERS), ROOT / "train_main.py", ROOT / "sample_main.py"]
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert len(lines) > 200
    assert not {name: count for name, count in lines.items() if count > 350}


def bare_arrays(annotation: ast.expr | None) -> bool:
    """Whether an annotation names an array without jaxtyping's shape and type."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value).split(".")[-1]
        return (
            name not in CONTAINERS
            and not hasattr(jaxtyping, name)
            and any(
                map(bare_arrays, ast.iter_child_nodes(annotation.slice))
                if isinstance(annotation.slice, ast.Tuple)
                else [bare_arrays(annotation.slice)]
            )
        )
    if isinstance(annotation, ast.Name | ast.Attribute):
        return ast.unparse(annotation).split(".")[-1] in ARRAYS
    return annotation is not None and any(map(bare_arrays, ast.iter_child_nodes(annotation)))


def faults(body: list[ast.stmt], owner: str = "") -> list[str]:
    """What public functions and classes lack: "name: what"."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                found.append(f"{node.name}: no docstring")
            found += faults(node.body, f"{node.name}.")
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        # A command's docstring is its module's, a constructor's its class's.
        special = node.name in ("__init__", "__call__", "setup")
        if node.name == "main" or (node.name.startswith("_") and not special):
            continue
        name = owner + node.name
        if not (special or ast.get_docstring(node)):
            found.append(f"{name}: no docstring")
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given = [a for a in given if a.arg not in ("self", "cls")] + [
            a for a in (node.args.vararg,) if a
        ]
        annotations = {a.arg: a.annotation for a in given}
        if node.name not in ("__init__", "setup"):
            annotations["what it returns"] = node.returns
        found += [f"{name}: {what} has no type" for what, a in annotations.items() if a is None]
        found += [
            f"{name}: {what} is an array without shape"
            for what, annotation in annotations.items()
            if bare_arrays(annotation)
        ]
    return found


def test_public_functions_say_what_they_take():
    found = {
        str(file.relative_to(ROOT)): wrong
        for file in sources("microdit_jax", "convert", "fuzz")
        if (wrong := faults(ast.parse(file.read_text()).body))
    }
    assert not found, "\n".join(f"{file}: {', '.join(wrong)}" for file, wrong in found.items())


def test_a_bare_array_is_noticed():
    source = (
        'def scale(x: Array, y: Float[Array, "n"] | None, z: tuple[np.ndarray, int]) -> '
        '"Float[Array, \'n\'] | jax.Array":\n    """Scales."""\n'
        "class Scaler:\n    def apply(self, by, named: dict[str, Array]) -> None: ...\n"
    )
    assert faults(ast.parse(source).body) == [
        "scale: x is an array without shape",
        "scale: z is an array without shape",
        "scale: what it returns is an array without shape",
        "Scaler: no docstring",
        "Scaler.apply: no docstring",
        "Scaler.apply: by has no type",
    ]


def test_contributing_has_every_module():
    """And no module that is gone."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("## Where things are")[1].split("## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`([^`]+)`", " ".join(rows)))
    package = ROOT / "microdit_jax"
    places = {p.name for p in package.glob("*.py")} | {
        f"{p.parent.name}/" for p in package.glob("*/__init__.py")
    }
    mapped = {name.removeprefix("microdit_jax/") for name in named}
    assert places - {"__init__.py"} - mapped == set()
    gone = {n for n in mapped if not (package / n).exists() and not (ROOT / n).exists()}
    assert gone == set()


# ------------------------------------------------------------------ words
# A first line that opens so needs the name above it, or the sentence before it, to be understood.
HEADLESS = re.compile(
    r"(Of|What|Whether|As|By|That|Which|How|Who|Whose|Where|When|And|But|Also|Likewise|So|Same|It|"
    r"In|On|For|From|To|With|Without|If|Else|Nothing|Only)\b"
)
# The field says image, matmul, roofline, collective, sample (CONTRIBUTING, Style).
FOREIGN = re.compile(
    r"\b(pictures?|matrix products?|bound at the peaks|exchanges? between|draws? (?:a |the )?"
    r"(?:pictures?|images?|samples?))\b",
    re.IGNORECASE,
)


def docstrings(file: pathlib.Path) -> list[tuple[str, str]]:
    """Names and docstrings of everything in a file that has one, the module first."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                found.append((getattr(node, "name", "module"), text))
    return found


def test_docstrings_begin_with_a_noun_or_a_verb():
    found = [
        f"{file.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for file in sources("microdit_jax", "convert", "configs", "tools", "benchmarks", "fuzz")
        for name, text in docstrings(file)
        if HEADLESS.match(text)
    ]
    assert not found, "\n".join(found)


def test_the_words_are_the_fields():
    found = []
    for file in sources("microdit_jax", "convert", "configs", "tools", "benchmarks", "fuzz"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if match := FOREIGN.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


# ------------------------------------------------------------------ files from strangers
# What reads a file's or a message's contents stands in one place, which is bounded (SECURITY.md).
ONE_PLACE = {
    r"\bjson\.loads?\((?!json\.dumps)": {
        "files/reading.py",
        "xla/bench/loader.py",
    },  # its own child
    r"\bImage\.open\(": {"files/image_files.py"},
    r"\bnp\.load\(": {"files/reading.py"},
    r"\b(un)?pickle\.|\bUnpickler\b|\bmarshal\b|\byaml\.": set(),
    r"(?<![.\w])(eval|exec)\(": {"commands/config_file.py"},
    r"\btrust_remote_code=True|\ballow_pickle=True": set(),
}


def test_contents_are_read_in_one_place():
    found = []
    for file in sources("microdit_jax", "convert"):
        name = file.relative_to(ROOT).as_posix().removeprefix("microdit_jax/")
        for number, line in enumerate(file.read_text().splitlines(), 1):
            code = line.split("#")[0]
            for pattern, allowed in ONE_PLACE.items():
                if name not in allowed and re.search(pattern, code):
                    found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
