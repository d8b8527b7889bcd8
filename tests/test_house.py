"""How the house is built: layers, a light front door, what the wheel holds, what the documents may say."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import hf_prune

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_prune"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
HEAVY = ("torch", "transformers", "datasets", "evaluate", "onnxruntime", "optimum", "matplotlib", "sklearn")

# A module imports only from rows above its own here, never sideways. A new module belongs in one of them.
ROWS = (
    "errors",
    "kinds ranking",
    "registry structure packing files folders given labels secrets settings sharding optimizers wrappers parts",
    "plan adapters tables",
    "architectures schedules scope scores allocation masks data metrics rules",
    "skipping patterns",
    "depth stock",
    "dense",
    "removal",
    "live",
    "evidence",
    "pruners targets checkpoint report selfcheck resume training_log",
    "card",
    "exporting distillation page measuring",
    "timing",
    "session",
    "rewinding recipe_outputs",
    "recipe callback layerwise similarity",
    "speech hub",
    "recipe_tasks run_folder",
    "job",
    "workflow arguments",
    "searching guessing reference interrupting demo",
    "commands batches inspecting listing shared_options",
    "cli",
    "__main__",
)
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row.split()}


def modules() -> list[Path]:
    """Return every source file of the package but the front door."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def owner(path: Path) -> str:
    """Return the module or folder directly under the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Yield the full names that a file of `package` imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def used_modules(source: str, package: str) -> set[str]:
    """Return which modules directly under hf_prune a file uses; a public name counts as the module it comes from."""
    parts = [name.split(".") for name in imported_modules(source, package)]
    names = {part[1] for part in parts if part[0] == "hf_prune" and len(part) > 1}
    return {hf_prune._PUBLIC.get(name, name) for name in names} - {"__version__"}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from .masks import Masks", "hf_prune", {"masks"}),
        ("def f():\n    from . import masks, __version__", "hf_prune", {"masks"}),
        (
            "from .. import registry\nfrom ..errors import PruningError",
            "hf_prune.architectures",
            {"registry", "errors"},
        ),
        ("from .conventions import TOWERS", "hf_prune.architectures", {"architectures"}),
        ("import hf_prune.hub\nfrom hf_prune import shrink\nimport torch", "hf_prune", {"hub", "removal"}),
    ],
)
def test_imports_are_found(source, package, expected):
    assert used_modules(source, package) == expected


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_rows(path):
    own = owner(path)
    assert own in RANK, f"{own} is in no row of tests/test_house.py"
    package = ".".join(["hf_prune", *path.relative_to(PACKAGE).parts[:-1]])
    for module in used_modules(path.read_text(encoding="utf-8"), package) - {own}:
        assert module in RANK, f"{own} imports {module}, which is in no row"
        assert RANK[module] < RANK[own], f"{own} imports {module}, which is not below it"


def test_every_module_in_the_rows_exists():
    assert set(RANK) == {owner(path) for path in modules()}


@cache
def sources() -> dict[str, tuple[str, str]]:
    """Return (package, source) of every file but the front door by its full name."""
    found = {}
    for path in modules():
        parts = ["hf_prune", *path.relative_to(PACKAGE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ".".join(parts[:-1]), path.read_text(encoding="utf-8")
    return found


def import_graph(files: Mapping[str, tuple[str, str]]) -> dict[str, set[str]]:
    """Return which of these files each one imports, wherever in it: also inside functions, and for types alone."""

    def file_of(name: str) -> str:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    found = {
        name: {file_of(one) for one in imported_modules(source, package)} for name, (package, source) in files.items()
    }
    return {name: imported - {"", name} for name, imported in found.items()}


def circle_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the files of one circle; none where there is no circle."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_a_circle_would_be_found():
    files = {
        "p": ("p", "from .a import b"),
        "p.a": ("p", "from . import b"),
        "p.b": ("p", "if TYPE_CHECKING:\n    from .c import C"),
        "p.c": ("p", "def f():\n    import p.a"),
    }
    graph = import_graph(files)
    assert graph == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}}
    assert set(circle_in(graph)) == {"p.a", "p.b", "p.c"}
    assert circle_in({"p": {"p.a"}, "p.a": {"p.b"}}) == []


def test_imports_make_no_circle():
    graph = import_graph(sources())
    assert circle_in(graph) == []


OTHERS_PRIVATE = {  # names that look private and are not ours
    "_replace": "of named tuples, where it is public",
    "_getframe": "of Python's sys: whose local variable a Trainer keeps a state in",
    "_parameters": "of torch: a module's own tensors and None, as its public iterators do not tell",
    "_buffers": "of torch, as above",
    "_foreach_mul_": "of torch: one kernel for all masks, as its own optimizers use",
    "_foreach_add_": "the same",
    "_NormBase": "of torch: what batch norms and instance norms have in common",
    "_BatchNorm": "of torch: batch norms of every dimension",
    "_orig_mod": "of torch.compile: the model inside",
    "_comm_hooks": "of DDP: there is a public way to register one, and none to read it",
    "_set_static_graph": "of DDP: the only way to say so after it was made",
    "_attn_implementation": "of transformers: there is a public way to set it, and none to read it",
    "_auto_class": "of transformers: what register_for_auto_class noted",
    "_get_feature_vector_attention_mask": "of transformers: how long sound is behind the convolutions",
    "_hf_peft_config_loaded": "of transformers: whether adapters lie inside",
    "_is_hf_initialized": "of transformers: what loading must not draw anew",
    "_keep_in_fp32_modules": "of transformers: what quantizers leave alone",
    "_model_mapping": "of transformers: config class to model class",
    "_name_or_path": "of transformers: where a config came from",
}


def is_private(name: object) -> bool:
    """Whether a name is private; marks that we leave on others' objects are read by whoever finds them."""
    private = isinstance(name, str) and name.startswith("_") and not name.startswith("__")
    return private and name not in OTHERS_PRIVATE and not name.startswith("_hf_prune")


def private_access(source: str) -> list[str]:
    """Return the private members that a file uses and does not define itself: imported, as attribute, or by name."""
    used, own = set[str](), set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (own if of_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            by_name = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
            used |= {node.args[1].value} if by_name else set()
    return sorted(name for name in used - own if is_private(name))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .plan import _some, read_record", ["_some"]),
        ("from . import plan\nplan._some()", ["_some"]),
        ("def f(pruning):\n    pruning._leaky = getattr(pruning, '_live')", ["_leaky", "_live"]),
        ("class A:\n    def __init__(self):\n        self._a = 1\n    def same(self, other):\n        other._a", []),
        ("class A:\n    _a: int = 0\n    def _b(self): ...\ndef f(a):\n    a._a\n    a._b()", []),
        ("import sys\nsys._getframe().f_locals\nmodel._hf_prune_changed = True\na.__dict__", []),
    ],
)
def test_private_access_would_be_found(source, expected):
    assert private_access(source) == expected


@pytest.mark.parametrize("name", sorted(sources()))
def test_no_module_reaches_for_anothers_private_members(name):
    assert private_access(sources()[name][1]) == []


def test_every_exception_is_needed():
    used = "\n".join(source for _, source in sources().values())
    assert [name for name in OTHERS_PRIVATE if name not in used] == []


def function_lengths() -> dict[str, tuple[int, int]]:
    """Return (lines, of which the docstring's) of every function by its file and name."""
    found = {}
    for module, (_, source) in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
                found[f"{module}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1, docstring
    return found


def test_modules_and_functions_are_short():
    assert [name for name, (_, source) in sources().items() if len(source.splitlines()) > 400] == []
    lengths = function_lengths()
    assert [name for name, (lines, docstring) in lengths.items() if lines - docstring > 60] == []
    assert sorted(lines for lines, _ in lengths.values())[int(0.9 * len(lengths))] <= 23, "with docstrings"


def heavy_after(statements: str) -> list[str]:
    """Return which heavy libraries are loaded once these statements ran in a process of their own."""
    report = f"import sys; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    command = [sys.executable, "-c", f"{statements}\n{report}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ast.literal_eval(result.stderr.splitlines()[-1])


def test_heavy_libraries_would_be_seen():
    assert heavy_after("import hf_prune; hf_prune.Group") == ["torch"]


def test_importing_the_package_loads_nothing_heavy():
    assert heavy_after("import hf_prune; dir(hf_prune); hf_prune.PruningError") == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    run = f"import sys; sys.argv = ['hf-prune', *{arguments}]\nfrom hf_prune.cli import main"
    assert heavy_after(f"{run}\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code") == []


@pytest.mark.parametrize("name", sorted(hf_prune._PUBLIC))
def test_public_name_can_be_imported(name):
    assert getattr(hf_prune, name) is not None
    assert name in dir(hf_prune)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prume'"):
        hf_prune.prume  # noqa: B018


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Build what a release uploads: sdist and wheel, by their suffix."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    return {path.suffix: path for path in folder.iterdir()}


DATA = [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("model_cards/*.j2")]


def test_wheel_holds_recipes_cards_and_the_typing_marker(built):
    names = set(zipfile.ZipFile(built[".whl"]).namelist())
    assert {path.parent.name for path in DATA} == {"recipes", "model_cards"}
    assert {f"hf_prune/{path.parent.name}/{path.name}" for path in DATA} <= names
    assert {f"hf_prune/{path.relative_to(PACKAGE).as_posix()}" for path in modules()} <= names
    assert {"hf_prune/py.typed", "hf_prune/page/report.html.j2", "hf_prune/demo/page.css"} <= names
    assert built[".whl"].name.startswith(f"hf_prune-{hf_prune.__version__}-")


def test_sdist_holds_what_the_wheel_is_built_from(built):
    assert built[".gz"].name == f"hf_prune-{hf_prune.__version__}.tar.gz"
    with tarfile.open(built[".gz"]) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    needed = [*DATA, *modules(), *(ROOT / name for name in ("pyproject.toml", "LICENSE", "README.md"))]
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "dist/")) or name.endswith(".pyc")]


def test_twine_finds_no_fault_with_what_is_uploaded(built):
    pytest.importorskip("twine", reason="the extra dev has it")
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.values())]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 2


def test_changelog_has_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(hf_prune.__version__)}\]", changelog, re.MULTILINE)


def test_ci_runs_the_readmes_command_two():
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1].removeprefix("exec ")
    assert f"\n{command}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def tracked_files() -> list[Path]:
    """Return what git would hand to a clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_tracked_file_is_over_a_megabyte():
    assert [path for path in tracked_files() if path.stat().st_size > 1_000_000] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_no_absolute_path(path):
    absolute = re.compile(r"(?<![\w.:/<~*})\]-])/[A-Za-z_][\w.-]*/\w|\b[A-Za-z]:\\")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if absolute.search(line)] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/*.json")), ids=lambda path: path.stem)
def test_results_name_no_folder_of_the_machine_that_made_them(path):
    assert (
        re.findall(r"(?<![\w.:/<~*})\]-])/(?:tmp|home|root|work|Users|mnt)/[\w./-]*", path.read_text(encoding="utf-8"))
        == []
    )


def python_blocks() -> list[str]:
    """Return the Python examples of every document."""
    texts = (path.read_text(encoding="utf-8") for path in DOCUMENTS)
    return [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.splitlines()[0][:50])
def test_examples_in_documents_parse_and_use_public_names(block):
    nodes = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in nodes if node.module == "hf_prune" for alias in node.names}
    assert names <= set(hf_prune.__all__)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_rows_of_tables_have_as_many_cells_as_their_rule(path):
    width = None
    lines = path.read_text(encoding="utf-8").splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        cells = len(re.findall(r"(?<!\\)\|", line))
        if re.fullmatch(r"\|(?:[-:]+\|)+", below):
            width = below.count("|")
        width = width if line.startswith("|") else None
        assert width in (None, cells), line[:80]
