"""Versions of this package and of those it works with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Return the version of this package."""
    return installed_version("flux_kernels") or "not installed (run from a checkout)"


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, None where there is none of the name."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
