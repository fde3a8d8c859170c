"""Where the files that travel with hpcft are: in a wheel, an editable install and a plain checkout alike."""

from __future__ import annotations

from pathlib import Path


def templates() -> Path:
    """The folder of templates: script template, cluster profiles, run starters.

    A wheel carries it inside the package; a checkout or an editable install has it beside the package.
    Raises FileNotFoundError where neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "train.sbatch.j2").is_file() or (folder / "clusters").is_dir():
            return folder
    raise FileNotFoundError(f"hpcft's templates are neither in {package} nor beside it; install hpcft again")
