"""Who may import what, directly and by way of others; that rooms run without what they must not need; sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import w2v2

ROOT = Path(w2v2.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
NAMES = {".".join(["w2v2", *Path(file).with_suffix("").parts]).removesuffix(".__init__"): file for file in MODULES}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics"}
sys.path.append(str(Path(__file__).parents[1] / "docs"))
import rooms  # noqa: E402

RANKS = {name: rank for rank, floor in enumerate(rooms.FLOORS) for name in floor}


def imported(tree, module="w2v2.x"):
    package = module.split(".") if NAMES.get(module, "").endswith("__init__.py") else module.split(".")[:-1]
    return rooms.imported(tree, package)


def known(name):
    """The module of the package that a dotted name is, or is in."""
    return name if name in NAMES else name.rpartition(".")[0]


DIRECT = {module: imported(MODULES[file], module) for module, file in NAMES.items()}
INSIDE = {module: {known(n) for n in names if known(n) in NAMES} - {module, "w2v2"} for module, names in DIRECT.items()}


def closure(module):
    """Every module of the package that one reaches, by whatever way, those imported late too."""
    reached, todo = set(), [module]
    while todo:
        for name in INSIDE[todo.pop()] - reached:
            reached.add(name)
            todo.append(name)
    return reached


def outside(module):
    """Packages from elsewhere that a module reaches."""
    return {name.split(".")[0] for m in {module, *closure(module)} for name in DIRECT[m]} - {"w2v2"}


def room(module):
    return module.split(".")[1] if "." in module else "__init__"


def in_rooms(*rooms):
    return [module for module in NAMES if room(module) in rooms]


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
    assert imported(ast.parse(code), "w2v2.data.x") == {"a.b", "c.d", "w2v2.data.f", "w2v2.data.g.h", "i"}
    assert "w2v2.model.wav2vec2" in closure("w2v2.training.pretrain")
    assert {"torch", "soundfile", "pytorch_lightning"} <= outside("w2v2.training.pretrain")


def test_every_room_has_its_place():
    assert {room(module) for module in NAMES} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("module", NAMES)
def test_a_room_reaches_only_those_that_stand_before_it(module):
    if module == "w2v2":
        return
    here = room(module)
    first = rooms.FLOORS[0]
    for name in closure(module):
        there = room(name)
        before = RANKS[there] < RANKS[here] or (here in first and first.index(there) < first.index(here))
        assert there == here or before, name


def test_the_picture_shows_the_rooms_as_they_are():
    assert (Path(rooms.__file__).parent / "rooms.svg").read_text() == rooms.draw(), "run python docs/rooms.py"


def test_there_are_no_circles():
    assert [module for module in NAMES if module in closure(module)] == []


@pytest.mark.parametrize("module", NAMES)
def test_only_one_room_each_knows_lightning_lhotse_and_transformers(module):
    tops = {name.split(".")[0] for name in DIRECT[module]}
    assert room(module) == "training" or not tops & LIGHTNING
    assert room(module) in ("data", "preparation") or "lhotse" not in tops
    assert room(module) in ("checkpoint",) or "transformers" not in tops


@pytest.mark.parametrize("module", in_rooms("model"))
def test_a_model_needs_torch_and_nothing_else(module):
    assert outside(module) <= {"torch", *sys.stdlib_module_names}
    assert {room(name) for name in closure(module)} <= {"model", "errors"}


@pytest.mark.parametrize("module", in_rooms("text", "data", "preparation"))
def test_text_data_and_preparation_reach_no_model(module):
    assert not {room(name) for name in closure(module)} & {"model", "checkpoint", "training", "inference"}


@pytest.mark.parametrize("module", NAMES)
def test_no_private_name_crosses_a_module(module):
    crossing = {name for name in DIRECT[module] if name.startswith("w2v2.") and name.rpartition(".")[2].startswith("_")}
    assert crossing == set()


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["w2v2.text.vocabulary", "w2v2.text.check", "w2v2.preparation.run", "w2v2.cli.main"])
def test_what_worker_processes_and_help_import_does_not_load_torch(name):
    """lhotse itself asks for torch; preparation must not, before it writes manifests."""
    result = run(f"import sys, {name}; print('torch' in sys.modules, 'pytorch_lightning' in sys.modules)")
    assert result.stdout == "False False\n", result.stderr


BLOCKED = """
import sys
for name in ("pytorch_lightning", "lightning", "lhotse", "transformers", "soundfile", "soxr", "numpy.never"):
    sys.modules[name] = None  # importing it raises ImportError
from types import SimpleNamespace
import torch
import w2v2
from w2v2 import ContrastiveConfig
model = ContrastiveConfig(
    n_layer=1, n_head=2, n_embd=32, ffn_dim=32, conv_channels=(32,) * 7, n_entries=8, codebook_dim=4
).build()
batch = SimpleNamespace(lengths=torch.tensor([16_000] * 2), offsets=torch.zeros(2), ids=["a", "b"], epochs=[0, 0])
draws = model.draw(batch, (0, 0))
out = model(torch.randn(2, 16_000), draws)
out.losses["contrastive"].backward()
assert out.num_targets > 0 and out.losses["contrastive"].isfinite()
try:
    import w2v2.data.batch
except ImportError:
    print("blocked")
"""


def test_the_model_runs_without_lightning_lhotse_and_transformers():
    result = run(BLOCKED)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "blocked\n"


# --- Code budget ------------------------------------------------------------------------------------------------------


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("file", MODULES)
def test_files_have_at_most_300_lines_and_functions_60(file):
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= (480 if file == "recipes.py" else 300)
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(MODULES[file])}
    assert {name: n for name, n in long.items() if n > 60} == {}


def test_the_whole_package_stays_small():
    """Moved up only with a capability beside it, and a reason in the commit."""
    assert sum(len((ROOT / file).read_text().splitlines()) for file in MODULES) <= 26_819
    assert len({Path(file).parts[0] for file in MODULES} - {"__init__.py"}) <= 19


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
