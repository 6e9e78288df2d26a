"""What an entry settles before it imports anything heavy: package versions, where fastpref is, and
how threads wait.

Import this first. Libraries that are older than pyproject.toml allows often fail in the middle of
a run, with an error that does not mention versions. How OpenMP's threads wait can be set only
before torch is imported.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = ROOT / "pyproject.toml"

# Beside another busy process, idle threads that spin hold the core that the working thread needs:
# on two cores a step of the demo took 17 times as long or more. A value set outside is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def too_old(pyproject: Path = PYPROJECT) -> list[str]:
    """What is installed in a version that the project does not take, each as "needed (found)"."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads(pyproject.read_text())["project"]
    found = []
    for text in (*project["dependencies"], *project["optional-dependencies"]["train"]):
        requirement = Requirement(text)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue  # Python's own error will name it, if it is used
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{text} ({installed} is installed)")
    return found


if sys.version_info < (3, 11):  # noqa: UP036 - a checkout runs without having been installed
    sys.exit(f"Python >= 3.11 is needed ({sys.version.split()[0]} runs this)")
for _name, _folder in (("fastpref", ROOT), ("fastpref_kernels", ROOT / "kernels")):
    if find_spec(_name) is None:  # a checkout that is not installed
        sys.path.append(str(_folder))
if _found := too_old():
    sys.exit(f"this needs {', '.join(_found)}; pip install -e '.[train]' brings what is needed")
