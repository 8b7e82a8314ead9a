"""Imports point down only: what each module may know of."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"deepspeed", "datasets", "wandb", "transformers", "matplotlib", "tokenizers"}


class Import(NamedTuple):
    """One imported module, and whether importing the importer imports it too."""

    name: str
    eager: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text()) for path in ROOT.glob("moetrain/**/*.py")}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that a statement names: `from a import b` is a.b where that is one of ours."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"write the import in full: {ast.unparse(node)}"
    base = node.module or ""
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in TREES else base for name in submodules]


def imports(tree: ast.AST, eager: bool = True) -> set[Import]:
    """Every import below a node, without those for the type checker alone."""
    found: set[Import] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {Import(name, eager) for name in targets(node)}
        elif not is_type_checking(node):
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            found |= imports(node, eager and not in_function)
    return found


IMPORTS = {name: imports(tree) for name, tree in TREES.items()}


def reached(start: str) -> set[str]:
    """A module of ours and all that it imports, directly or not, at once or later."""
    seen, queue = set(), [start]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += [found.name for found in IMPORTS[name] if found.name in TREES]
    return seen


def third_party(names: set[str]) -> set[str]:
    tops = {found.name.partition(".")[0] for name in names for found in IMPORTS[name]}
    return tops - set(sys.stdlib_module_names) - {"moetrain"}


def modules(*packages: str) -> list[str]:
    return sorted(n for n in TREES for p in packages if n == p or n.startswith(f"{p}."))


def test_the_walk_sees_modules_imports_and_laziness() -> None:
    assert "moetrain.moe.routing" in TREES
    tree = ast.parse(
        "import a\nfrom moetrain import errors\nif TYPE_CHECKING:\n    import b\n"
        "class X:\n    import c\n    def f(self):\n        if 1:\n            import d.e"
    )
    eager = {Import("a", True), Import("moetrain.errors", True), Import("c", True)}
    assert imports(tree) == eager | {Import("d.e", False)}


def test_imports_have_no_cycle() -> None:
    # An import inside a function counts: it hides a cycle, it does not remove it. A package's
    # __init__ gathers its own modules, so what those ask of the package is not an edge.
    graph = {
        name: {
            found.name
            for found in IMPORTS[name]
            if found.name in TREES and not name.startswith(f"{found.name}.")
        }
        for name in TREES
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_config_needs_pydantic_alone() -> None:
    assert third_party(reached("moetrain.config")) == {"pydantic"}


def test_moe_needs_torch_alone_and_nothing_of_ours() -> None:
    names = modules("moetrain.moe")
    assert third_party(set(names)) == {"torch"}
    assert {module for name in names for module in reached(name)} <= {*names, "moetrain"}


def test_testing_needs_torch_alone_and_nothing_of_ours() -> None:
    names = modules("moetrain.testing")
    assert third_party(set(names)) == {"torch"}
    assert {module for name in names for module in reached(name)} <= {*names, "moetrain"}


def test_components_do_not_see_the_config() -> None:
    for name in modules("moetrain.model", "moetrain.loss", "moetrain.optim", "moetrain.moe"):
        assert "moetrain.config" not in reached(name), name


def test_model_knows_no_layout() -> None:
    above = set(modules("moetrain.parallel", "moetrain.engines", "moetrain.mesh"))
    assert not reached("moetrain.model") & above


@pytest.mark.parametrize(
    ("module", "importers"),
    [
        ("moetrain.cli", {"moetrain.__main__", "moetrain.lm_eval"}),
        ("moetrain.lm_eval", set()),
        ("moetrain.train", {"moetrain.commands.runs"}),
    ],
)
def test_the_top_is_imported_by_nobody_below(module: str, importers: set[str]) -> None:
    found = {name for name in TREES if module in {entry.name for entry in IMPORTS[name]}}
    assert found <= importers


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    eager = {
        (name, found.name)
        for name in TREES
        for found in IMPORTS[name]
        if found.eager and found.name.partition(".")[0] in HEAVY
    }
    assert eager == set()


# ---- process groups in moe -----------------------------------------------------------------------

OF_A_GROUP = {"get_rank", "get_world_size", "barrier", "broadcast"} | {
    f"{verb}{suffix}"
    for verb in ("all_reduce", "all_gather", "all_to_all", "reduce_scatter")
    for suffix in ("", "_single", "_tensor", "_into_tensor", "_object")
}


def global_group_uses(tree: ast.AST) -> list[str]:
    """Where code asks for the default process group: by its name, or by naming none."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "WORLD":
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and is_groupless(node):
            found.append(ast.unparse(node))
    return found


def is_groupless(call: ast.Call) -> bool:
    """A function of torch.distributed that takes a group, called without one."""
    function = ast.unparse(call.func)
    module, _, name = function.rpartition(".")
    if name not in OF_A_GROUP or module not in ("", "dist", "distributed", "torch.distributed"):
        return False
    asks_only = name in ("get_rank", "get_world_size")
    return not (asks_only and call.args) and "group" not in {word.arg for word in call.keywords}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("dist.group.WORLD", True),
        ("dist.get_world_size()", True),
        ("get_rank()", True),
        ("dist.all_reduce(x)", True),
        ("dist.get_world_size(group)", False),
        ("dist.all_reduce(x, group=group)", False),
        ("group.size()", False),
        ("mesh.get_rank()", False),
    ],
)
def test_global_groups_are_recognised(code: str, found: bool) -> None:
    assert bool(global_group_uses(ast.parse(code))) == found


def test_moe_never_asks_for_the_global_group() -> None:
    uses = {name: global_group_uses(TREES[name]) for name in modules("moetrain.moe")}
    assert {name: found for name, found in uses.items() if found} == {}


# ---- what really gets loaded ---------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_importing_moe_loads_torch_and_no_other_dependency() -> None:
    loaded = loaded_by("import moetrain.moe")
    assert "torch" in loaded
    assert not loaded & {"pydantic", "yaml", "tyro", "rich", *HEAVY}


def test_importing_config_loads_no_torch() -> None:
    assert not loaded_by("import moetrain.config") & {"torch", "yaml", "tyro", *HEAVY}


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", "missing.yaml"]])
def test_the_command_line_answers_without_torch(argv: list[str]) -> None:
    loaded = loaded_by(f"from moetrain.cli import main; sys.exit(main({argv}))")
    assert "moetrain" in loaded
    assert not loaded & {"torch", "numpy", *HEAVY}
