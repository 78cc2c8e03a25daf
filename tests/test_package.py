"""The package as installed: complete, lazy, typed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import isokern

ROOT = Path(isokern.__file__).parent
NOT_PACKAGED = {"tests", "benchmarks", "docs", "examples", "build", "dist"}
FRAMEWORKS = ("triton", "cupy", "numba")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_of_the_tree_is_listed():
    found = {"isokern"}
    for init in ROOT.rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts and not parts[0].startswith(".") and parts[0] not in NOT_PACKAGED:
            found.add(".".join(("isokern", *parts)))
    assert found == set(project()["tool"]["setuptools"]["packages"])


def test_every_module_lies_in_a_listed_package():
    packages = set(project()["tool"]["setuptools"]["packages"])
    for module in ROOT.rglob("*.py"):
        parts = module.parent.relative_to(ROOT).parts
        if parts and (parts[0].startswith(".") or parts[0] in NOT_PACKAGED):
            continue
        assert ".".join(("isokern", *parts)) in packages, f"{module} would not be installed"


def test_the_wheel_holds_data_files_and_the_typing_marker(tmp_path):
    import zipfile

    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(tmp_path), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert "isokern/py.typed" in names
    assert "isokern/registry/ops/fused_sigmoid_gating/models.toml" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"isokern"}, "no generic name may be installed at top level"


def test_importing_the_registry_imports_no_framework_and_not_torch():
    out = run("import sys, isokern; from isokern import registry; print(sorted(sys.modules))")
    for name in ("torch", "numpy", *FRAMEWORKS):
        assert f"'{name}'" not in out


def test_getting_an_op_imports_no_optional_framework_and_touches_no_device():
    out = run(
        "import sys, torch; before = set(sys.modules)\n"
        "from isokern import registry; op = registry.get('fused_sigmoid_gating')\n"
        "registry.backends('fused_sigmoid_gating')\n"
        "print(sorted(set(sys.modules) - before)); print('cuda', torch.cuda.is_initialized())"
    )
    for name in FRAMEWORKS:
        assert f"'{name}'" not in out
    assert "cuda False" in out


def test_the_version_is_the_projects():
    assert isokern.__version__ == project()["project"]["version"]
