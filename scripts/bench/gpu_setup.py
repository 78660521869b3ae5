"""What gpu.sh needs to know: python scripts/bench/gpu_setup.py FOLDER writes it there, or says which wheels to carry.

FOLDER/card has the card's name as a part of file names ("cpu" where there is none), FOLDER/code a digest of all code
that decides results.
"""

import hashlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PEER = ("torch", "peft")
TESTS = ("pytest", "hypothesis")


def missing() -> list[str]:
    """The packages that the project, its peer and its tests need, and that are not here, theirs included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    waiting, seen, absent = [*project["dependencies"], *PEER, *TESTS], set(), []
    while waiting:
        requirement = waiting.pop()
        name = re.match(r"[\w.-]+", requirement)[0]
        if "extra ==" in requirement or name in seen:
            continue
        seen.add(name)
        try:
            waiting += metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            if ";" not in requirement:  # a marker may be about another system
                absent.append(name)
    return sorted(absent)


def digest() -> str:
    """Of the code and the recipes."""
    found = hashlib.sha256()
    for folder in ("dataflex_jax", "configs", "scripts/bench", "tests"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def main() -> None:
    if absent := missing():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"error: this Python lacks {' '.join(absent)}. Where there is a package index:\n"
            f"  pip download -d wheels -c constraints.txt --only-binary=:all: --python-version={version} "
            f"{' '.join(absent)}\nand here: pip install --no-index --find-links=wheels {' '.join(absent)}"
        )
    import jax

    folder, device = Path(sys.argv[1]), jax.devices()[0]
    card = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()) if device.platform == "gpu" else "cpu"
    (folder / "card").write_text(card)
    (folder / "code").write_text(digest())
    print(f"{device.device_kind}, JAX {jax.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
