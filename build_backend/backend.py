"""Build backend (PEP 517, PEP 660): setuptools, building against the torch that is already there.

Under build isolation the build runs in an environment of its own, where the user's torch cannot be
imported. Asking for torch as a build requirement would download it a second time, often in another
version. So this backend looks for torch where the package is going to be installed, uses it when it
is new enough, and asks for the tested version only where there is none.

Nothing here runs setup.py to answer what a build needs: that could import torch.
"""

import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path

import toolchain
from setuptools import build_meta
from setuptools.build_meta import build_sdist, prepare_metadata_for_build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH_REQUIREMENT = "torch==2.13.0"

prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def _site_folders():
    """Yields the site-packages folders of the environment that the package is installed into.

    ``sysconfig`` still names that environment under pip's isolation, which only hides its packages.
    """
    bases = [{}]
    if sys.prefix != sys.base_prefix and _sees_system_packages():
        bases.append({"base": sys.base_prefix, "platbase": sys.base_prefix})
    for variables in bases:
        for scheme in (sysconfig.get_default_scheme(), "posix_prefix", "deb_system"):
            if scheme in sysconfig.get_scheme_names():
                for key in ("platlib", "purelib"):
                    yield sysconfig.get_path(key, scheme, vars=variables)
    if sys.prefix == sys.base_prefix or len(bases) > 1:
        yield site.getusersitepackages()


def _sees_system_packages():
    try:
        text = Path(sys.prefix, "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return False
    pattern = r"^\s*include-system-site-packages\s*=\s*true\s*$"
    return re.search(pattern, text, re.IGNORECASE | re.MULTILINE) is not None


def find_torch():
    """Returns the folder that holds a usable torch for the target environment, or None."""
    for folder in _site_folders():
        try:
            text = Path(folder, "torch", "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        version = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
        # The first torch found is the one that will be imported: an older one is no reason to look
        # further, it is going to be replaced.
        if version is None or tuple(map(int, version.groups())) < toolchain.OLDEST_TORCH:
            return None
        return folder
    return None


def _show_torch():
    folder = find_torch()
    # At the end: the isolated environment's own setuptools stays in front of the user's.
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)


def get_requires_for_build_sdist(config_settings=None):
    """Returns what an sdist needs: nothing."""
    return []


def get_requires_for_build_wheel(config_settings=None):
    """Returns what compiling needs and the target environment or the machine does not have."""
    if toolchain.pure_python_reason() is not None:
        return []
    requires = [] if find_torch() else [TORCH_REQUIREMENT]
    if shutil.which("ninja") is None:
        requires.append("ninja")
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Builds a wheel."""
    _show_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Builds an editable wheel and, in place, the extension."""
    _show_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
