"""The public names, their docstrings, and the examples in these."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest
from numpydoc.docscrape import get_doc_object
from numpydoc.validate import validate

import ulysses_dp

FRAMEWORKS = ("jax", "torch")  # of users, for each of which there is a module of the same name
INSTALLED = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
MODULES = sorted(
    module.name
    for module in pkgutil.iter_modules(ulysses_dp.__path__, "ulysses_dp.")
    if not module.name.endswith("__main__")  # prints the report when imported
)
PUBLIC = {name: getattr(ulysses_dp, name) for name in ulysses_dp.__all__}
for framework in INSTALLED:
    module = importlib.import_module(f"ulysses_dp.{framework}")
    PUBLIC |= {f"{framework}.{name}": getattr(module, name) for name in module.__all__}
METHODS = {
    f"{owner}.{name}": method
    for owner, cls in PUBLIC.items()
    if inspect.isclass(cls)
    for name, method in vars(cls).items()
    if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_"))
}
# an enum is not made of the parameters of EnumType, and a block or a buffer raises nothing of its own
NOT_MADE_BY_CALL, RAISES_NOTHING = {"AttnType"}, {"AttnType", "free_workspace", "trace"}

# Not asked for: extended summaries and See Also everywhere (ES, SA), and types of options that are listed together because
# they are refused alike (PR04).
CHECKS = {
    *("GL01", "GL03", "GL05", "GL06", "GL07", "GL08", "GL09", "GL10"),
    *("SS01", "SS02", "SS03", "SS04", "SS05", "SS06"),
    *("PR01", "PR02", "PR03", "PR05", "PR06", "PR07", "PR08", "PR09", "PR10"),
    *("RT01", "RT02", "RT03", "RT04", "RT05", "YD01"),
}


@pytest.mark.single
def test_all_is_the_public_namespace():
    public = {
        name for name, value in vars(ulysses_dp).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted(ulysses_dp.__all__) == list(ulysses_dp.__all__) == sorted(public)


@pytest.mark.single
@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_docstring(name):
    document = get_doc_object((PUBLIC | METHODS)[name])
    checks = CHECKS | {"EX01"} if name in PUBLIC else CHECKS
    if name in NOT_MADE_BY_CALL:
        checks = {check for check in checks if not check.startswith("PR")}
    assert [error for error in validate(document)["errors"] if error[0] in checks] == []
    assert document["Raises"] or name in RAISES_NOTHING or name in METHODS


@pytest.mark.single
@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_whether_they_are_collective(name):
    if name not in ("AttnType",):
        pages = [PUBLIC[name], *(method for method_name, method in METHODS.items() if method_name.startswith(f"{name}."))]
        assert any("ollective" in inspect.getdoc(page) for page in pages)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    """On every number of ranks: those of collective functions are written for any."""
    framework = name.rpartition(".")[2]
    if framework in set(FRAMEWORKS) - set(INSTALLED):
        pytest.skip(f"needs {framework}, which is not installed")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.single
def test_frameworks_are_not_imported():
    """They take seconds, and may be missing."""
    code = f"import sys, ulysses_dp; assert not {{*{FRAMEWORKS}}} & {{*sys.modules}}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.single
def test_examples_are_found():
    """Each public name has one, so that `test_examples` tests something."""
    finder = doctest.DocTestFinder()
    assert [name for name, value in PUBLIC.items() if not any(test.examples for test in finder.find(value, name))] == []
