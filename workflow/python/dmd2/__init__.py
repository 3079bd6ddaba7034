"""The package `dmd2` of this checkout, as stages and the planning find it.

They have this folder on their path and not the checkout's: a file there, such as a user's `numbers.py`, would
be executed in place of the standard library's module, or another package's, of that name.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_HOME = Path(__file__).parents[3] / "dmd2"
_SPEC = spec_from_file_location("dmd2", _HOME / "__init__.py", submodule_search_locations=[str(_HOME)])
assert _SPEC is not None
assert _SPEC.loader is not None
sys.modules["dmd2"] = _MODULE = module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
