"""scikit-build-core, and an sdist that carries the llama.cpp sources: they are fetched before it is packed."""

import pathlib

import fetch
from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403 (the other hooks, as they are)


def build_sdist(sdist_directory, config_settings=None):
    try:
        fetch.fetch(pathlib.Path(__file__).with_name("llama.cpp"))
    except fetch.FetchError as error:
        raise SystemExit(f"llamacancel: {error}") from None
    return build.build_sdist(sdist_directory, config_settings)
