"""Who may import what, that the model runs without the trainer and the data tools, and how big the code may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import w2v2

ROOT = Path(w2v2.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics"}


def imported(tree, file="x.py"):
    """Dotted names of all that a module imports itself, wherever in it, but for type checkers alone."""
    package = ["w2v2", *Path(file).parent.parts]
    names, skipped = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped |= {id(inner) for branch in node.body for inner in ast.walk(branch)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def uses(file, packages):
    return {name for name in imported(MODULES[file], file) if name.split(".")[0] in packages}


def files(*prefixes):
    return [file for file in MODULES if file.startswith(prefixes)]


def test_the_checker_sees_imports_of_every_kind():
    code = """
import a.b
from c import d as e
from . import f
from .g import h
if TYPE_CHECKING:
    import never
def late():
    import i
"""
    assert imported(ast.parse(code), "data/x.py") == {"a.b", "c.d", "w2v2.data.f", "w2v2.data.g.h", "i"}
    assert len(files("model/")) >= 5
    assert uses("train.py", LIGHTNING)
    assert uses("data/datamodule.py", {"lhotse"})


@pytest.mark.parametrize("file", MODULES)
def test_only_training_tasks_and_the_data_module_import_lightning(file):
    if file not in ("train.py", "data/datamodule.py") and not file.startswith("tasks/"):
        assert uses(file, LIGHTNING) == set()


@pytest.mark.parametrize("file", files("model/", "losses.py"))
def test_model_and_losses_import_torch_and_each_other_and_nothing_else(file):
    for name in imported(MODULES[file], file):
        top = name.split(".")[0]
        assert top in ("torch", *sys.stdlib_module_names) or name.startswith(("w2v2.model.", "w2v2.model.losses.")), (
            name
        )


@pytest.mark.parametrize("file", files("data/"))
def test_data_knows_nothing_of_models(file):
    forbidden = ("w2v2.model", "w2v2.model.losses", "w2v2.tasks", "w2v2.training.run")
    assert [name for name in imported(MODULES[file], file) if name.startswith(forbidden)] == []


@pytest.mark.parametrize("file", MODULES)
def test_only_converters_import_transformers_and_only_data_imports_lhotse(file):
    if not file.startswith("convert/"):
        assert uses(file, {"transformers"}) == set()
    if not file.startswith("data/"):
        assert uses(file, {"lhotse"}) == set()


BLOCKED = """
import sys
for name in ("pytorch_lightning", "lightning", "lhotse", "transformers", "soundfile", "soxr"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
import w2v2
import w2v2.model.wav2vec2
from w2v2.model.pretraining import ContrastiveConfig
model = ContrastiveConfig(
    n_layer=1, n_head=2, n_embd=32, ffn_dim=32, conv_channels=(32,) * 7, n_entries=8, codebook_dim=4
).build()
draws = model.draw([16_000] * 2, [("a",), ("b",)], step_key=(0, 0))
out = model(torch.randn(2, 16_000), draws)
out.losses["contrastive"].backward()
assert out.num_targets > 0 and out.losses["contrastive"].isfinite()
try:
    import w2v2.data.batch
except ImportError:
    print("blocked")
"""


def test_the_model_runs_without_lightning_lhotse_and_transformers():
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "blocked\n"


# --- Code budget ------------------------------------------------------------------------------------------------------


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("file", MODULES)
def test_modules_have_at_most_600_lines_and_functions_80(file):
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= 600
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(MODULES[file])}
    assert {name: n for name, n in long.items() if n > 80} == {}


@pytest.mark.parametrize("file", MODULES)
def test_library_code_does_not_print(file):
    calls = [node for node in ast.walk(MODULES[file]) if isinstance(node, ast.Call)]
    printing = [ast.unparse(call) for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert printing == []


def undocumented(body, prefix=""):
    """Public functions, classes and methods without a docstring."""
    missing = []
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            missing.append(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            missing += undocumented(node.body, f"{prefix}{node.name}.")
    return missing


def test_the_docstring_checker_finds_what_lacks_one():
    code = 'class A:\n    "yes"\n    def b(self): ...\n    def _c(self): ...\n    def e(self): "yes"\ndef d(): ...'
    assert undocumented(ast.parse(code).body) == ["A.b", "d"]


@pytest.mark.parametrize("file", MODULES)
def test_everything_public_is_documented(file):
    tree = MODULES[file]
    assert ast.get_docstring(tree) is not None or not tree.body, file
    assert undocumented(tree.body) == []
