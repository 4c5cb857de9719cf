"""Run notebooks in this process, and write their outputs into them: what is printed, and figures.

    python examples/notebooks/run.py                              # all in this folder
    python examples/notebooks/run.py first_adapter.ipynb --pictures docs/pictures

It needs no kernel and no package of Jupyter. `--pictures` also writes the figures as files, `notebook-1.png`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

FOLDER = Path(__file__).resolve().parent


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells with code of a notebook."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[bytes]:
    """Run the cells of a notebook in order and set their outputs; return the figures as PNG files."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    figures = []
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        cell["execution_count"], cell["outputs"] = number, []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": lines})
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            picture = io.BytesIO()
            figure.savefig(picture, dpi=80, bbox_inches="tight")
            figures.append(picture.getvalue())
            data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<a figure>"]}
            cell["outputs"].append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close("all")
    return figures


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in the folder of this file")
    parser.add_argument("--pictures", type=Path, help="folder for the figures as files")
    args = parser.parse_args()
    for path in args.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        figures = run(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path}, with {len(figures)} figures")
        if args.pictures:
            for number, figure in enumerate(figures, 1):
                (args.pictures / f"{path.stem}-{number}.png").write_bytes(figure)


if __name__ == "__main__":
    main()
