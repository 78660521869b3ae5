"""What gpu.sh needs to know: python scripts/bench/gpu_setup.py FOLDER writes it there, or says which wheels to carry.

FOLDER/card has the card's name as a part of file names ("cpu" where there is none), FOLDER/code a digest of all that
decides results, FOLDER/peer "yes" where PyTorch is there to compare with, else "no".
"""

import hashlib
import platform
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
PEER = ("torch", "peft")
TESTS = ("pytest",)
ELSEWHERE = ("datasets", "zstandard")  # what the project needs of other data than gpu.sh has
# What wheels for Linux are called: pip takes the very names that it is given.
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in (35, 34, 31, 28, 27, 24, 17)), "manylinux2014", "manylinux1")


def lacking(needed: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Of these packages and all that they need: the absent ones, and those whose version is not asked for, in words."""
    waiting, seen, absent, other = [Requirement(name) for name in needed], set(), set(), set()
    while waiting:
        requirement = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            absent.add(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            other.add(f"{requirement.name} {version}, not {requirement.specifier}")
        if requirement.name not in seen:
            seen.add(requirement.name)
            waiting += map(Requirement, metadata.requires(requirement.name) or [])
    return sorted(absent), sorted(other)


def needed() -> tuple[str, ...]:
    """The requirements of what gpu.sh runs, but for the peer."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return *(text for text in project["dependencies"] if Requirement(text).name not in ELSEWHERE), *TESTS


def to_carry(absent: list[str]) -> str:
    """How to bring packages to a machine that reaches no index."""
    named = " ".join(absent)
    here = [f"--python-version={sys.version_info.major}.{sys.version_info.minor}"]
    here += [f"--platform={name}_{platform.machine()}" for name in PLATFORMS]
    return (
        f"this Python lacks {named}. Where there is a package index:\n"
        f"  pip download -d wheels -c constraints.txt --only-binary=:all: {' '.join(here)} {named}\n"
        f"and here: {sys.executable} -m pip install --no-index --find-links=wheels {named}"
    )


def digest() -> str:
    """Of the code and the recipes."""
    found = hashlib.sha256()
    for folder in ("dataflex_jax", "configs", "scripts/bench", "tests"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def main() -> None:
    absent, other = lacking(needed())
    if absent:
        sys.exit(f"error: {to_carry(absent)}")
    if other:
        print(f"other versions than the project asks for: {'; '.join(other)}")
    no_peer, _ = lacking(PEER)
    if no_peer:
        print(f"to compare with PyTorch: {to_carry(no_peer)}")
    import jax

    folder, device = Path(sys.argv[1]), jax.devices()[0]
    card = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()) if device.platform == "gpu" else "cpu"
    (folder / "card").write_text(card)
    (folder / "code").write_text(digest() + ("-alone" if no_peer else ""))
    (folder / "peer").write_text("no" if no_peer else "yes")
    print(f"{device.device_kind}, JAX {jax.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
