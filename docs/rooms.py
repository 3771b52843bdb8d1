"""Draws the rooms of the package and who imports whom: ``python docs/rooms.py`` writes ``docs/rooms.svg``.

The order of the rooms stands here, once; ``tests/test_imports.py`` holds the package to it, and the picture to the
package.
"""

from __future__ import annotations

import ast
import html
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent / "src" / "w2v2"

FLOORS = [
    line.split()
    for line in """errors files serial
model text data
decoding checkpoint preparation
inference
serve
evaluation
training
recipes
report synthetic export
demo
cli""".splitlines()
]
"""A room imports rooms of the floors before its own, and none of its own floor; the first three, those before them."""


def imported(tree: ast.AST, package: list[str]) -> set[str]:
    """Dotted names of all that a module imports itself, wherever in it, but for type checkers alone.

    Args:
        package: names of the packages that the module is in, for relative imports.
    """
    names: set[str] = set()
    skipped: set[int] = set()
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


def room(file: Path) -> str:
    """The room that a file of the package is in."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports)."""
    pairs: set[tuple[str, str]] = set()
    for file in ROOT.rglob("*.py"):
        here = room(file)
        if here != "__init__":
            package = ["w2v2", *file.relative_to(ROOT).parent.parts]
            names = imported(ast.parse(file.read_text(encoding="utf-8")), package)
            pairs |= {(here, name.split(".")[1]) for name in names if name.startswith("w2v2.")}
    return {(one, other) for one, other in pairs if one != other and any(other in floor for floor in FLOORS)}


def needed(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without the arrows that follow from others, and those to the first floor, which everybody may import."""
    pairs = {(one, other) for one, other in pairs if other not in FLOORS[0] and one not in FLOORS[0]}
    reached: dict[str, set[str]] = {}
    for name in (name for floor in FLOORS for name in floor):
        direct = {other for one, other in pairs if one == name}
        reached[name] = direct.union(*(reached.get(other, set()) for other in direct))
    return {(one, other) for one, other in pairs if not any((one, a) in pairs and other in reached[a] for a in reached)}


def draw() -> str:
    """The picture: a floor a line, what is imported above who imports it."""
    width, height, wide, high = 900, 104, 270, 72
    places: dict[str, tuple[float, float]] = {}
    for row, floor in enumerate(FLOORS):
        for column, name in enumerate(floor):
            places[name] = (width * (column + 0.5) / len(floor), height * row + 44)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(FLOORS)}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height * len(FLOORS)}" fill="white"/>',
    ]
    for one, other in sorted(needed(arrows())):
        (x1, y1), (x2, y2) = places[one], places[other]
        lines.append(
            f'<path d="M{x1:.0f} {y1 - high / 2:.0f} C{x1:.0f} {y1 - 60:.0f} {x2:.0f} {y2 + 60:.0f} '
            f'{x2:.0f} {y2 + high / 2:.0f}" fill="none" stroke="#4878a8" stroke-width="1.5"/>'
        )
    for name, (x, y) in places.items():
        files = sorted(path.stem for path in (ROOT / name).glob("*.py") if path.stem != "__init__")
        rows = [" ".join(files[at : at + 4]) for at in range(0, len(files), 4)]
        if len(rows) > 3:
            rows = [" ".join(files[at : at + 6]) for at in range(0, len(files), 6)]
        lines.append(
            f'<rect x="{x - wide / 2:.0f}" y="{y - high / 2:.0f}" width="{wide}" height="{high}" rx="6" '
            'fill="#f4f1ea" stroke="#555"/>'
        )
        lines.append(f'<text x="{x:.0f}" y="{y - 20:.0f}" text-anchor="middle" font-weight="bold">{name}</text>')
        lines += [
            f'<text x="{x:.0f}" y="{y - 3 + 14 * at:.0f}" text-anchor="middle" font-size="9.5">'
            f"{html.escape(text)}</text>"
            for at, text in enumerate(rows)
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "rooms.svg").write_text(draw(), encoding="utf-8")
